"""How training meets stores: the one that fits is found, snapshots are exact, digests pinned, runs outlive growth."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import Interrupted, MismatchError, ResourceError, UsageError
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.catalogue import register_store, registered_runs, registered_stores
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import TeacherRequest
from rsmtdf_cli.app import app
from rsmtdf_cli.console import command
from rsmtdf_train.experiment.jobs import TrainingJob, run_jobs
from rsmtdf_train.find_store import build_command, find_store
from rsmtdf_train.loop import train
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.run_store import read_run_store
from tests.datasets import write_dataset
from tests.servers import web_folder
from tests.teachers import MeanTeacher, load_mean_teacher


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("fit") / "data", tiles=9, tile_px=64)


def build(data: Path, out: Path, on_event: EventSink = ignore_events, **values: Any) -> Path:
    asked = {"data": data, "out": out, "teachers": ["mean"], "scales": [1.0], "group_rows": 2, "threads": 1}
    build_store(BuildRequest.of(asked | values), on_event, load_teacher=load_mean_teacher)
    return out


def while_built(data: Path, out: Path, act: Callable[[], None]) -> Path:
    """Build, and call ``act`` once when two of the three units are committed."""
    done: list[bool] = []

    def watch(event: object) -> None:
        if not done and len(list((out / "ledger" / "commits").rglob("*.json"))) == 2:
            done.append(True)
            act()

    return build(data, out, watch)


def digests_of(store: Path) -> dict[str, str]:
    opened = FeatureStore.open(store)
    keys = opened.keys()
    return {str(key): opened.spec(key).digest() for key in keys}


@pytest.fixture(scope="module")
def built(data: Path) -> Path:
    return build(data, data.parent / "store")


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "store"))


def recipe(data: Path, **changes: object) -> Recipe:
    values: dict[str, object] = {
        "data": str(data), "steps": 3, "crop_px": 64, "batch": {"labeled": 2, "unlabeled": 2},
        "student": {"encoder": "timm:mobilenetv3_small_050", "channels": 8}, "distill": {"hidden": 8},
        "checkpoint_every": 1,
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def run(chosen: Recipe, out: Path, store: Path | str, **options: Any) -> dict[str, Any]:
    return train(chosen, out, store, device="cpu", tensorboard=False, **options).metrics


def cli(*words: object) -> tuple[int, str, str]:
    code = "import torch; torch.set_num_threads(1); from rsmtdf_cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# -- finding


def test_the_fitting_store_is_found_and_the_newest_of_several_is_taken(data: Path, store: Path, tmp_path: Path) -> None:
    other = build(write_dataset(tmp_path / "other", tiles=9, tile_px=64, seed=5), tmp_path / "s-other")
    larger = build(write_dataset(tmp_path / "large", tiles=9, tile_px=128), tmp_path / "s-large")
    for path in (store, larger, other):
        register_store(path)
    assert find_store(recipe(data)).path == str(store) and find_store(recipe(data)).others == 0
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    register_store(copy)
    found = find_store(recipe(data))
    assert (found.path, found.others) == (str(copy), 1)
    assert found.snapshot == FeatureStore.open(store).snapshot


def test_when_none_fits_each_store_gets_its_reason(data: Path, store: Path, tmp_path: Path) -> None:
    tiles = {
        "pixels": build(write_dataset(tmp_path / "d1", tiles=9, tile_px=64, seed=5), tmp_path / "pixels"),
        "side": build(write_dataset(tmp_path / "d2", tiles=9, tile_px=128), tmp_path / "side"),
        "fewer": build(write_dataset(tmp_path / "d3", tiles=6, tile_px=64), tmp_path / "fewer"),
        "gone": Path(shutil.copytree(store, tmp_path / "gone")),
        "broken": Path(shutil.copytree(store, tmp_path / "broken")),
        "keys": store,
    }
    for path in tiles.values():
        register_store(path)
    shutil.rmtree(tiles["gone"])
    (tiles["broken"] / "manifest.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        find_store(recipe(data, distill={"keys": ["mean/s32/*"]}))
    text = str(caught.value)
    said = {
        "pixels": "was built from another dataset: its tile 't000' has other pixels",
        "side": "holds tiles of 128 px",
        "fewer": "lacks 2 of 6 train tiles (t004, t005)",
        "gone": "the folder does not exist",
        "broken": "manifest.json",
        "keys": "holds no features that match 'mean/s32/*' (it has mean/s64/mean16, mean/s64/mean8)",
    }
    for name, reason in said.items():
        [line] = [line for line in text.splitlines() if line.strip().startswith(f"{tiles[name]}:")]
        assert reason in line
    assert "none of the 6 registered stores fits" in text


def stop() -> None:
    raise KeyboardInterrupt


def test_a_store_that_is_not_complete_is_not_offered(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        while_built(data, tmp_path / "store", stop)
    register_store(tmp_path / "store")
    with pytest.raises(UsageError, match=r"lacks 2 of 6 train tiles \(t004, t005\)"):
        find_store(recipe(data))


def test_a_tile_that_the_build_quarantined_does_not_keep_its_store_from_fitting(data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    (mine / "images" / "t001.png").write_bytes(b"no picture")
    register_store(build(mine, tmp_path / "s"))
    assert find_store(recipe(mine)).path == str(tmp_path / "s")


def test_only_registered_stores_are_offered(data: Path, store: Path) -> None:
    assert store.is_dir() and registered_stores() == []
    with pytest.raises(UsageError, match="no store is registered"):
        find_store(recipe(data))


def test_the_command_names_teachers_layers_and_scales_of_the_recipe(data: Path, tmp_path: Path) -> None:
    def command(**changes: object) -> list[str]:
        words = shlex.split(build_command(recipe(data, **changes), open_source(data)))
        return [words[i + 1] for i, word in enumerate(words) if word == "--teacher"]

    lite = "efficientnet_lite0,pretrained=none"
    assert command(teachers=[lite], distill={"keys": ["*/s64/stage4", "*/s32/stage3"]}) == [
        f"{lite},layers=stage4+stage3,scales=1+0.5"
    ]
    assert command(teachers=[f"{lite},layers=stage2,scales=2"], distill={"keys": ["*/s64/stage4"]}) == [
        f"{lite},layers=stage2,scales=2"
    ]
    assert command(teachers=[lite], distill={"keys": ["*"]}) == [lite]
    assert command(distill={"keys": ["timm-lcnet_050/s*/stage4"]}) == ["timm:lcnet_050,layers=stage4"]
    with pytest.raises(UsageError, match=r"section `teachers`.*\n.*--teacher NAME"):
        find_store(recipe(data))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teachers": ["efficientnet_lit0"]}, "'efficientnet_lit0'. Did you mean 'efficientnet_lite0'"),
        ({"teachers": ["timm:test_resnett"]}, "'timm:test_resnett'. Did you mean 'timm:test_resnet'"),
        ({"distill": {"keys": ["dinov2_vits/s64/block11"]}}, "'dinov2_vits'. Did you mean 'dinov2_vits14'"),
    ],
)
def test_an_unknown_teacher_gives_its_likely_name_instead_of_a_command_that_fails(
    data: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        find_store(recipe(data, **changes))
    assert f"names the unknown teacher {said}" in str(caught.value) and "rsmtdf cache build" not in str(caught.value)


# -- weights


def with_weights(store: Path, copy: Path, origin: str) -> Path:
    """Build a store like ``store`` whose teacher says that its weights came from ``origin``."""

    def load(request: TeacherRequest, device: str = "cpu") -> MeanTeacher:
        teacher = MeanTeacher(request.name)
        teacher.spec = teacher.spec.model_copy(update={"weights_origin": origin})
        return teacher

    data = store.parent / "data"
    asked = {"data": data, "out": copy, "teachers": ["mean"], "scales": [1.0], "threads": 1}
    build_store(BuildRequest.of(asked), load_teacher=load)
    return copy


@pytest.mark.parametrize(
    ("origin", "asked", "fits"),
    [
        ("seed 1", "mean,pretrained=none,seed=1", "yes"),
        ("seed 1", "mean,pretrained=none,seed=2", "no"),
        ("seed 1", "mean,pretrained=none,seed=11", "no"),
        ("package p", "mean,pretrained=none,seed=9", "no"),
        ("file a.pt", "mean,pretrained=none", "no"),
        ("package p", "mean", "yes"),
        ("seed 0", "mean", "no"),
        ("file a.pt", "mean", "unsaid"),
        ("file a.pt", "mean,weights=/x/a.pt", "yes"),
        ("file a.pt", "mean,weights=/x/b.pt", "unsaid"),
        ("package p", "mean,weights=/x/a.pt", "unsaid"),
        ("seed 0", "mean,weights=/x/a.pt", "no"),
    ],
)
def test_a_store_fits_when_its_teacher_has_the_recorded_weights_the_recipe_asks_for(
    built: Path, data: Path, tmp_path: Path, origin: str, asked: str, fits: str
) -> None:
    register_store(with_weights(built, tmp_path / "s", origin))
    chosen = recipe(data, teachers=[asked])
    if fits == "no":
        with pytest.raises(UsageError, match=f"its teacher mean has the weights '{origin}', the recipe asks for"):
            find_store(chosen)
    else:
        notes = find_store(chosen).notes
        assert len(notes) == (fits == "unsaid") and all(f"'{origin}'" in note for note in notes)


def cli_of_one_teacher(tmp_path: Path, data: Path, out: str, teacher: str) -> Path:
    words = ["cache", "build", str(data), "--out", str(tmp_path / out), "--teacher", teacher, "-q", "--device", "cpu"]
    shown = CliRunner().invoke(app, [*words, "--scales", "1", "--threads", "1"])
    assert shown.exit_code == 0, shown.output
    return tmp_path / out


def test_other_weights_of_a_real_teacher_are_not_offered_and_a_file_is_known_by_its_digest(
    data: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from rsmtdf_cache.teachers import load

    teacher: Any = load(TeacherRequest("timm:test_resnet", "none", seed=7))
    for name in ("a", "b", "c"):
        changed = {
            k: (v * (1.01 if name == "c" else 1)).to(v.dtype).contiguous()
            for k, v in teacher.network.state_dict().items()
        }
        save_file(changed, tmp_path / f"{name}.safetensors")
        old = (tmp_path / f"{name}.safetensors").stat().st_mtime - 60
        os.utime(tmp_path / f"{name}.safetensors", (old, old))  # a file of this moment is not remembered
    seeded = cli_of_one_teacher(tmp_path, data, "seeded", "timm:test_resnet,pretrained=none,seed=1")
    with pytest.raises(UsageError) as caught:
        find_store(recipe(data, teachers=["timm:test_resnet,pretrained=none,seed=2"]))
    assert "has the weights 'seed 1', the recipe asks for pretrained=none,seed=2" in str(caught.value)
    assert str(seeded) not in str(caught.value).splitlines()[-1]  # the command makes a new store
    filed = f"timm:test_resnet,weights={tmp_path}/"
    made = cli_of_one_teacher(tmp_path, data, "filed", f"{filed}a.safetensors")
    assert find_store(recipe(data, teachers=[f"{filed}a.safetensors"])).path == str(made)
    assert len(find_store(recipe(data, teachers=[f"{filed}b.safetensors"])).notes) == 1
    for name in ("b", "c"):  # any build remembers the digest of the file it read
        cli_of_one_teacher(tmp_path, data, name, f"{filed}{name}.safetensors")
        shutil.rmtree(tmp_path / name)
    assert find_store(recipe(data, teachers=[f"{filed}b.safetensors"])).notes == ()
    with pytest.raises(UsageError, match=r"has the weights 'file a\.safetensors', the recipe asks for weights="):
        find_store(recipe(data, teachers=[f"{filed}c.safetensors"]))


def test_quiet_training_prints_no_notes(data: Path, store: Path, tmp_path: Path) -> None:
    register_store(store)
    file = tmp_path / "r.yaml"
    file.write_text(recipe(data).to_yaml())
    words = ["train", str(file), "--use-cache", "--out", str(tmp_path / "run"), "--device", "cpu", "--no-tensorboard"]
    shown = CliRunner().invoke(app, [*words, "-q"])
    assert shown.exit_code == 0 and shown.output == ""
    assert "note:" in CliRunner().invoke(app, words).stderr


def test_a_store_without_arrays_is_said_to_have_none(data: Path, store: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["cache", "drop", str(store), "*/*/*"])
    assert shown.exit_code == 0, shown.output
    with pytest.raises(UsageError, match="holds no arrays; build features into it"):
        run(recipe(data), tmp_path / "run", store)
    register_store(store)
    with pytest.raises(UsageError, match=f"{store}: holds no arrays"):
        find_store(recipe(data))


def test_an_interruption_says_once_that_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def stopped() -> None:
        raise Interrupted("stopped; 3 units are safe")

    with pytest.raises(SystemExit):
        stopped()
    assert capsys.readouterr().err.split("\n")[0].endswith("stopped: 3 units are safe")


def test_an_unreadable_catalogue_is_an_error_of_the_machine(data: Path, home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(ResourceError, match="RSMTDF_HOME"):
        find_store(recipe(data))


def test_the_printed_command_run_as_printed_makes_the_same_train_command_work(data: Path, tmp_path: Path) -> None:
    chosen = recipe(
        data,
        name="printed",
        teachers=["efficientnet_lite0,pretrained=none,seed=3"],
        distill={"hidden": 8, "keys": ["efficientnet_lite0/s64/stage4"]},
    )
    file = tmp_path / "r.yaml"
    file.write_text(chosen.to_yaml())
    # An optional value: another option follows it.
    words = ("train", file, "--use-cache", "--out", tmp_path / "run", "--device", "cpu", "--no-tensorboard")
    code, _, errors = cli(*words)
    assert code == 2, errors
    printed = [line.strip() for line in errors.splitlines() if line.strip().startswith("rsmtdf cache build")]
    assert len(printed) == 1 and not (tmp_path / "run").exists()
    code, _, errors = cli(*shlex.split(printed[0])[1:], "-q", "--device", "cpu")
    assert code == 0, errors
    out = shlex.split(printed[0])[shlex.split(printed[0]).index("--out") + 1]
    assert [entry.path for entry in registered_stores()] == [str(Path(out).resolve())]
    code, stdout, errors = cli(*words, "--json")
    assert code == 0, errors
    assert f"--use-cache: {Path(out).resolve()} (snapshot " in errors
    assert json.loads(stdout)["store"] == FeatureStore.open(out).snapshot
    assert list(digests_of(Path(out))) == ["efficientnet_lite0/s64o0/stage4"]


@pytest.mark.parametrize("words", [("--use-cache",), ("--use-cache", "auto"), ("--use-cache=auto",)])
def test_use_cache_without_a_value_and_auto_are_the_same(data: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(recipe(data).to_yaml())
    shown = CliRunner().invoke(app, ["train", str(file), "--out", str(tmp_path / "run"), *words])
    assert shown.exit_code == 2 and "no store is registered" in shown.output
    shown = CliRunner().invoke(app, ["train", *words, "--out", str(tmp_path / "run"), str(file)])
    assert shown.exit_code == 2 and "no store is registered" in shown.output


def test_both_arms_find_one_store(data: Path, store: Path, tmp_path: Path) -> None:
    register_store(store)
    # Registered later and without what the recipe distils, so only the plain arm could mistake it for its own.
    register_store(build(data, tmp_path / "s32", teachers=["mean,layers=mean16"]))
    file = tmp_path / "r.yaml"
    file.write_text(recipe(data, distill={"hidden": 8, "keys": ["mean/s64/mean8"]}).to_yaml())
    for name, more in (("a", []), ("b", ["--no-distill"])):
        words = ["train", str(file), "--use-cache", *more, "--out", str(tmp_path / name), "-q", "--no-tensorboard"]
        shown = CliRunner().invoke(app, [*words, "--device", "cpu"])
        assert shown.exit_code == 0, shown.output
        record = read_run_store(tmp_path / name)
        assert record is not None and record.store == str(store)


# -- pinned digests


def test_pinned_digests_are_held_by_full_and_by_target_key(data: Path, store: Path, tmp_path: Path) -> None:
    digest = digests_of(store)["mean/s64o0/mean8"]
    for pins in ({"mean/s64o0/mean8": digest}, {"mean/s64/mean8": digest[:8]}):
        chosen = recipe(data, distill={"hidden": 8, "pins": pins})
        register_store(store)
        assert find_store(chosen).path == str(store)
    run(chosen, tmp_path / "run", store)


def test_another_digest_is_refused_with_both_digests_also_for_a_store_given_by_path(
    data: Path, store: Path, tmp_path: Path
) -> None:
    digests = digests_of(store)
    chosen = recipe(data, distill={"pins": {"mean/s64/mean8": "0123456789", "mean/s64/mean4": "01234567"}})
    with pytest.raises(MismatchError) as caught:
        run(chosen, tmp_path / "run", store)
    assert f"mean/s64/mean8: pinned 0123456789, the store has {digests['mean/s64o0/mean8']}" in str(caught.value)
    assert "mean/s64/mean4: pinned 01234567, not stored. Did you mean 'mean/s64/mean8'?" in str(caught.value)
    assert not (tmp_path / "run").exists()
    register_store(store)
    with pytest.raises(UsageError, match="pinned 0123456789, the store has"):
        find_store(chosen)


def test_a_pin_by_target_key_holds_for_every_stored_orientation(data: Path, tmp_path: Path) -> None:
    store = build(data, tmp_path / "turned", orientations=2)
    digests = {key: digest for key, digest in digests_of(store).items() if key.endswith("mean8")}
    assert len(set(digests.values())) == 2
    run(
        recipe(data, distill={"hidden": 8, "pins": {"mean/s64/mean8": digests["mean/s64o0/mean8"]}}),
        tmp_path / "r",
        store,
    )
    with pytest.raises(MismatchError, match="the store has"):
        run(recipe(data, distill={"pins": {"mean/s64/mean8": digests["mean/s64o4/mean8"]}}), tmp_path / "q", store)


@pytest.mark.parametrize(
    ("pins", "said"),
    [({"mean": "0" * 8}, "teacher/view/layer"), ({"a/b/c": "xyz"}, "no digest"), ({"a/b/c": "0" * 7}, "no")],
)
def test_a_malformed_pin_is_a_usage_error_of_the_recipe(
    data: Path, tmp_path: Path, pins: dict[str, str], said: str
) -> None:
    text = yaml.safe_load(recipe(data).to_yaml())
    text["distill"]["pins"] = pins
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(text))
    shown = CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml"), "--use-cache", "x"])
    assert shown.exit_code == 2 and "distill.pins" in shown.output and said in shown.output


# -- snapshots


def grow(data: Path, store: Path) -> str:
    """Append a teacher and return the snapshot from before."""
    before = FeatureStore.open(store).snapshot
    build(data, store, teachers=["other"])
    assert FeatureStore.open(store).snapshot != before
    return before


def test_a_run_reads_exactly_the_named_snapshot(data: Path, store: Path, tmp_path: Path) -> None:
    whole = run(recipe(data), tmp_path / "whole", store)
    before = grow(data, store)
    named = run(recipe(data), tmp_path / "named", f"{store}@{before[:12]}")
    now = run(recipe(data), tmp_path / "now", store)
    assert named["store"] == whole["store"] == before and named["scores"] == whole["scores"]
    assert named["targets"]["keys"] == ["mean/s64/mean16", "mean/s64/mean8"]
    assert len(now["targets"]["keys"]) == 4 and now["store"] != before


def begin(chosen: Recipe, out: Path, store: Path) -> None:
    """Train one step."""

    def watch(event: object) -> None:
        if getattr(event, "step", -1) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chosen, out, store, on_event=watch)


def test_a_run_continues_on_its_own_snapshot_after_the_store_has_grown(data: Path, store: Path, tmp_path: Path) -> None:
    whole = run(recipe(data), tmp_path / "whole", store)
    stopped = tmp_path / "stopped"
    begin(recipe(data), stopped, store)
    assert (stopped / "checkpoints" / "last.pt").is_file() and not (stopped / "metrics.json").exists()
    before = grow(data, store)
    result = train(recipe(data), stopped, store, device="cpu", tensorboard=False)
    assert 0 < result.resumed_at < 3
    assert result.metrics["store"] == before and result.metrics["scores"] == whole["scores"]
    # A complete run stays what it is, and finds its store without a path.
    again = train(recipe(data), tmp_path / "whole", store, device="cpu", tensorboard=False)
    assert again.resumed_at == 3 and again.metrics["store"] == before
    file = tmp_path / "r.yaml"
    file.write_text(recipe(data).to_yaml())
    shown = CliRunner().invoke(app, ["train", str(file), "--use-cache", "--out", str(stopped), "--device", "cpu"])
    assert shown.exit_code == 0 and "the store this run began with" in shown.stderr


def test_a_run_that_began_during_a_build_continues_after_it(data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    chosen = recipe(data, distill=None, fuse=None, targets="none")
    began: list[dict[str, Any]] = []
    while_built(data, store, lambda: began.append(run(chosen, tmp_path / "run", store)))
    [first] = began
    again = train(chosen, tmp_path / "run", store, device="cpu", tensorboard=False)
    assert again.resumed_at == 3 and again.metrics["store"] == first["store"] != FeatureStore.open(store).snapshot


def test_an_unfinished_run_is_refused_when_its_snapshot_is_gone(data: Path, store: Path, tmp_path: Path) -> None:
    begin(recipe(data), tmp_path / "run", store)
    shutil.rmtree(store)
    build(data, store, teachers=["mean,layers=mean16"])
    with pytest.raises(
        MismatchError, match=r"reads a snapshot that .* does not hold .*\n  store: '[0-9a-f]{64}' \(run\)"
    ) as caught:
        run(recipe(data), tmp_path / "run", store)
    assert "place:" not in str(caught.value)  # it is where it was
    assert str(store) in str(read_run_store(tmp_path / "run"))


@pytest.mark.parametrize("length", [{}, {"steps": None, "epochs": 0.5}])
def test_a_complete_run_says_so_without_its_store(
    data: Path, store: Path, tmp_path: Path, length: dict[str, object]
) -> None:
    asked = recipe(data, **length)
    first = run(asked, tmp_path / "run", store)
    file = tmp_path / "r.yaml"
    file.write_text(asked.to_yaml())
    shutil.rmtree(store)
    for rebuilt in (False, True):
        if rebuilt:
            build(data, store, teachers=["mean,layers=mean16"])
        again = train(asked, tmp_path / "run", store, device="cpu", tensorboard=False)
        assert again.resumed_at == again.steps and again.metrics == first
        run_jobs([TrainingJob("a", asked, tmp_path / "run", store=store, device="cpu")])
        shown = CliRunner().invoke(app, ["train", str(file), "--use-cache", "--out", str(tmp_path / "run")])
        assert shown.exit_code == 0 and "is complete already" in shown.stderr
    for other in (recipe(data, seed=1), recipe(data, steps=4)):
        with pytest.raises(MismatchError):
            run(other, tmp_path / "run", store)
    with pytest.raises(MismatchError):  # nothing is left that a pin could keep
        run(asked, tmp_path / "run", store, pin=True)


def test_naming_another_snapshot_than_the_runs_own_is_refused(data: Path, store: Path, tmp_path: Path) -> None:
    run(recipe(data), tmp_path / "run", store)
    grow(data, store)
    now = FeatureStore.open(store).snapshot
    with pytest.raises(MismatchError, match=r"store: '[0-9a-f]{64}' \(run\) != "):
        run(recipe(data), tmp_path / "run", f"{store}@{now}")


def test_jobs_of_one_call_read_one_snapshot_however_the_store_grows(data: Path, store: Path, tmp_path: Path) -> None:
    chosen = recipe(
        data, distill=None, fuse=None, targets="none", method="supervised", steps=None, epochs=3
    )  # an epoch is counted before the first run
    jobs = [TrainingJob(n, chosen, tmp_path / n, store=store, device="cpu") for n in ("a", "b")]
    run_jobs(jobs[:1])
    before = grow(data, store)
    run_jobs(jobs)
    assert {json.loads((tmp_path / n / "metrics.json").read_text())["store"] for n in ("a", "b")} == {before}


def test_training_registers_the_run_and_pins_on_demand(data: Path, store: Path, tmp_path: Path) -> None:
    from rsmtdf_cache.upkeep.pins import list_pins

    run(recipe(data, name="mine"), tmp_path / "run", store, pin=True)
    snapshot = FeatureStore.open(store).snapshot
    [entry] = registered_runs()
    assert (entry.run, entry.store, entry.snapshot, entry.recipe) == (
        str(tmp_path / "run"),
        str(store),
        snapshot,
        "mine",
    )
    [pin] = list_pins(store)
    assert (pin.snapshot, pin.owner) == (snapshot, str((tmp_path / "run").resolve()))
    run(recipe(data, name="mine"), tmp_path / "run", store, pin=True)
    assert len(list_pins(store)) == 1


def test_a_url_reaches_the_store_and_trains_to_the_same_scores(
    data: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = run(recipe(data), tmp_path / "local", store)
    with web_folder(store.parent) as server:
        url = f"{server.url}/{store.name}"
        remote = run(recipe(data), tmp_path / "remote", url)
        named = run(recipe(data), tmp_path / "named", f"{url}@{local['store'][:16]}")
        with pytest.raises(UsageError, match="--pin writes into the store"):
            run(recipe(data), tmp_path / "pinned", url, pin=True)
    assert remote["scores"] == named["scores"] == local["scores"]
    assert remote["store"] == named["store"] == local["store"]
    assert {e.store for e in registered_runs()} == {str(store), url}
    assert not (tmp_path / "pinned").exists()
