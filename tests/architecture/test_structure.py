"""The rules of the house, held over the source text of all modules."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from tests.architecture.modules import PACKAGES, ROOT, Module, modules


def _each(*packages: str) -> pytest.MarkDecorator:
    chosen = [m for m in modules() if m.package in packages]
    return pytest.mark.parametrize("module", chosen, ids=[m.name for m in chosen])


MODULES = _each(*PACKAGES)
BELOW = {
    "rsmtdf_cache": {"rsmtdf_cache"},
    "rsmtdf_train": {"rsmtdf_cache", "rsmtdf_train"},
    "rsmtdf_cli": set(PACKAGES),
}


def _top(name: str) -> str:
    return name.partition(".")[0]


def test_the_walk_finds_every_package() -> None:
    """Guards the other tests: a rule over no modules would hold."""
    assert {m.package for m in modules()} == set(PACKAGES)
    assert {"rsmtdf_cache.errors", "rsmtdf_train.recipe", "rsmtdf_cli.app"} <= {m.name for m in modules()}


@MODULES
def test_imports_go_from_cli_to_train_to_cache_only(module: Module) -> None:
    backwards = [
        f"{module.path}:{line}: {name}"
        for name, line in module.imports()
        if _top(name) in PACKAGES and _top(name) not in BELOW[module.package]
    ]
    assert not backwards


@_each("rsmtdf_train")
def test_the_trainer_reaches_teachers_through_the_interface_only(module: Module) -> None:
    """A run with cached targets must not load a teacher by accident; online targets import inside a function."""
    at_import = [
        node.module
        for node in module.tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rsmtdf_cache.teachers")
    ]
    families = [
        name
        for name, _ in module.imports()
        if name.startswith("rsmtdf_cache.teachers.") and name != "rsmtdf_cache.teachers.base"
    ]
    assert not at_import
    assert not families


@_each("rsmtdf_cache", "rsmtdf_train")
def test_only_the_command_line_prints(module: Module) -> None:
    prints = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            prints.append(f"line {node.lineno}: print()")
        if (
            isinstance(node, ast.Attribute)
            and node.attr in {"stdout", "stderr"}
            and isinstance(node.value, ast.Name)
            and node.value.id == "sys"
        ):
            prints.append(f"line {node.lineno}: sys.{node.attr}")
    prints += [f"line {line}: {name}" for name, line in module.imports() if _top(name) in {"rich", "typer", "tqdm"}]
    assert not prints


def _public_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {n for n in names if not n.startswith("_")}


@MODULES
def test_all_is_present_sorted_and_names_only_what_exists(module: Module) -> None:
    lists = [
        node.value
        for node in module.tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    public = _public_names(module.tree)
    if not lists:
        assert not public, f"{module.path}: no __all__, but public names {sorted(public)}"
        return
    listed = ast.literal_eval(lists[0])
    assert listed == sorted(listed)
    assert len(listed) == len(set(listed))
    imported = {
        alias.asname or alias.name
        for node in module.tree.body
        if isinstance(node, (ast.ImportFrom, ast.Import))
        for alias in node.names
    }
    assert set(listed) <= public | imported


@MODULES
def test_no_module_is_longer_than_400_lines(module: Module) -> None:
    assert module.text.count("\n") <= 400


@MODULES
def test_every_module_opens_with_a_docstring(module: Module) -> None:
    assert ast.get_docstring(module.tree) or not module.text.strip()


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [item for extra in project["optional-dependencies"].values() for item in extra]
    declared = {
        re.split(r"[<>=!~;\[ ]", item)[0].lower().replace("_", "-") for item in [*project["dependencies"], *optional]
    }
    by_import = packages_distributions()
    missing = set()
    for module in modules():
        for name, line in module.imports():
            top = _top(name)
            if top in sys.stdlib_module_names or top in PACKAGES:
                continue
            owners = {owner.lower().replace("_", "-") for owner in by_import.get(top, [top])}
            if not owners & declared:
                missing.add(f"{module.path.relative_to(ROOT)}:{line}: {name}")
    assert not missing


def test_every_package_folder_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join((package, *path.parent.relative_to(folder).parts))
        for package, folder in PACKAGES.items()
        for path in folder.rglob("__init__.py")
    }
    assert folders <= listed


def test_help_imports_nothing_heavy() -> None:
    """Holds the speed of ``rsmtdf --help`` without measuring time."""
    script = (
        "import sys\n"
        "sys.argv = ['rsmtdf', '--help']\n"
        "from rsmtdf_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('\\nLOADED', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    heavy = {"torch", "torchvision", "numpy", "zarr", "xarray", "dask", "pydantic", "timm", "open_clip", "matplotlib",
             "pandas", "pyarrow", "PIL", "rich", "rsmtdf_train", "torchmetrics", "tensorboard"}  # fmt: skip
    assert "rsmtdf_cli" in loaded
    assert not loaded & heavy


#: Spelled in two parts, so that this file does not mention them either.
MACHINE_PATHS = tuple(f"/{name}/" for name in ("wor" + "k", "roo" + "t", "Use" + "rs", "hom" + "e"))


def test_no_file_mentions_a_path_of_the_machine_it_was_written_on() -> None:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in done.stdout.split("\0") if name]
    assert "pyproject.toml" in names
    found = []
    for name in names:
        path = ROOT / name
        if not path.is_file():
            continue
        data = path.read_bytes()
        if b"\0" in data[:8000] or path.suffix in {".jpg", ".png", ".tif"}:
            continue
        text = data.decode(errors="replace")
        found += [f"{name}: {bad}" for bad in MACHINE_PATHS if re.search(rf"(?<![\w.\-]){bad}", text)]
    assert not found
