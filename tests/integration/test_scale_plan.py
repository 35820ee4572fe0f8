"""The arithmetic of docs/scale.md: sizes are those of stores that are built, the page quotes what the script says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.request import BuildRequest
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

ROOT = Path(__file__).parents[2]
SCRIPT, PAGE = ROOT / "bench" / "scale_plan.py", ROOT / "docs" / "scale.md"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_plan", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("codec", ["float16", "int8", "pca2-int8"])
def test_bytes_shards_and_units_are_those_of_a_store(tmp_path: Path, codec: str, script: ModuleType) -> None:
    data = write_dataset(tmp_path / "data", tiles=7, splits={"train": range(7)})
    values = {"data": data, "out": tmp_path / "s", "teachers": ["mean,layers=mean8"], "group_rows": 3, "codec": codec}
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)
    ledger = Ledger.load(StorePaths(tmp_path / "s"))
    commits = [c for units in ledger.commits.values() for c in units.values()]
    shards = [s for c in commits for s in c.shards]
    found = script.sizes(7, list(ledger.specs().values()), group_rows=3)
    assert found["units"] == len(commits) == 6 and found["groups"] == 3
    assert found["shards"] == len(shards)
    assert found["nbytes"] == sum(s.nbytes for s in shards)


def test_the_page_quotes_what_the_script_prints() -> None:
    quoted = re.findall(
        r"^\$ python (bench/scale_plan\.py.*?)\n(.*?)(?=^\$ python|^```)", PAGE.read_text(), re.M | re.S
    )
    assert len(quoted) >= 3
    for words, said in quoted:
        done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said.strip(), words
