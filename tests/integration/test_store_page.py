"""The Python of docs/store.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from tests.datasets import write_dataset

PAGE = Path(__file__).parents[2] / "docs" / "store.md"


def test_the_worked_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    data = write_dataset(tmp_path / "data", tiles=6, tile_px=64)
    teachers = [{"name": "timm:test_resnet", "pretrained": "none"}]
    asked = {"data": data, "out": tmp_path / "demo-store", "teachers": teachers, "scales": [1.0], "pixels": True}
    build_store(BuildRequest.of(asked))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    shown = capsys.readouterr().out
    assert scope["pixels"] is not None
    assert "a token every" in shown and "True" in shown and "('tile', 'y', 'x', 'channel')" in shown
