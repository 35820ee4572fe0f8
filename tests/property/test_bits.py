"""Within a numerics profile a tile's stored bytes are a function of the tile alone; across profiles they stay close."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rsmtdf_cache import teachers
from rsmtdf_cache.build import BuildReport, build_store
from rsmtdf_cache.encode import encode_shown
from rsmtdf_cache.errors import Interrupted
from rsmtdf_cache.events import Progress, Warned
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.plan import TeacherLoader, decide_profile, plan_teacher
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.steady import bits_depend_on_place, steady_profile
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from tests.datasets import make_tile, write_dataset, write_split
from tests.teachers import MeanTeacher

TILES = 7
NETWORKS = ("timm:test_resnet,pretrained=none,layers=stage4", "timm:test_vit,pretrained=none,layers=block5")

pytestmark = pytest.mark.usefixtures("one_thread")


class Maps(dict[tuple[str, int], bytes]):
    """Stored bytes by array and picture. Short in messages."""

    def __repr__(self) -> str:
        return f"{len(self)} maps"


@cache
def _load(request: TeacherRequest) -> Teacher:
    return teachers.load(request)


def load_once(request: TeacherRequest, device: str = "cpu") -> Teacher:
    return _load(request)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bits") / "data"
    return write_dataset(root, tiles=TILES, splits={"train": range(TILES)}, labeled={"5": [0]})


def ordered(pictures: Path, root: Path, order: Sequence[int]) -> Path:
    """Write the same tiles in another order: picture ``order[i]`` has the id of place ``i``."""
    shutil.copytree(pictures, root)
    for folder in ("images", "masks"):
        for place, picture in enumerate(order):
            shutil.copy(pictures / folder / f"t{picture:03}.png", root / folder / f"t{place:03}.png")
    return root


def stored(out: Path, order: Sequence[int]) -> Maps:
    """Return the stored bytes by array and picture."""
    store = FeatureStore.open(out)
    found = Maps()
    for key in list(store.keys()):
        for place, picture in enumerate(order):
            read = store.read(key, [store.tiles.row_of(f"t{place:03}")])
            assert read.valid.all()
            found[str(key), picture] = read.values.tobytes()
    return found


def build(data: Path, out: Path, events: list[object], stop_after: int | None = None, **changes: Any) -> BuildReport:
    """Build; with ``stop_after`` the build is interrupted when so many maps have been written."""

    def on_event(event: object) -> None:
        events.append(event)
        written = [e for e in events if isinstance(e, Progress) and e.task.startswith("timm-")]
        if stop_after is not None and len(written) == stop_after and event is written[-1]:
            raise KeyboardInterrupt

    load: TeacherLoader = changes.pop("load", load_once)
    values = {"data": data, "out": out, "teachers": list(NETWORKS), "threads": 1, "scales": (1.0,), **changes}
    return build_store(BuildRequest.of(values), on_event, load_teacher=load)


@pytest.fixture(scope="module")
def reference(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int | None], Maps]:
    """What an undisturbed build in the first order stores, by threads and micro-batch."""
    made: dict[tuple[int, int | None], Maps] = {}
    for threads in (1, 2):
        for micro_batch in (3, None):
            out = tmp_path_factory.mktemp("reference") / "s"
            build(pictures, out, [], threads=threads, micro_batch=micro_batch, group_rows=TILES)
            made[threads, micro_batch] = stored(out, range(TILES))
    return made


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    order=st.permutations(range(TILES)),
    group_rows=st.integers(1, TILES + 1),
    first=st.integers(1, TILES),
    stop_after=st.integers(1, 2 * TILES),
    threads=st.sampled_from([1, 2]),
    micro_batch=st.sampled_from([3, None]),
    workers=st.sampled_from([1, 2, 9]),
)
def test_order_row_groups_appends_workers_and_resume_point_change_no_stored_byte(
    order: list[int], group_rows: int, first: int, stop_after: int, threads: int, micro_batch: int | None, workers: int,
    pictures: Path, reference: dict[tuple[int, int | None], Maps],
) -> None:  # fmt: skip
    numerics = {"threads": threads, "micro_batch": micro_batch, "group_rows": group_rows, "decoders": workers}
    with tempfile.TemporaryDirectory() as folder:
        data, out = ordered(pictures, Path(folder) / "data", order), Path(folder) / "s"
        ids = [f"t{place:03}" for place in range(TILES)]
        events: list[object] = []
        for names in (ids[:first], ids):  # the first tiles, interrupted and continued; then the others as an append
            write_split(data, "train", names)
            try:
                build(data, out, events, stop_after, **numerics)
            except Interrupted:
                build(data, out, events, **numerics)
        # A micro-batch that the user fixed although it is not steady on this machine promises nothing, and says so.
        assume(not any(isinstance(e, Warned) and "leave --micro-batch out" in e.text for e in events))
        assert stored(out, order) == reference[threads, micro_batch]


def tokens(maps: Maps, channels: dict[str, int]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    for (key, _), raw in maps.items():
        yield key, np.frombuffer(raw, "<f2").astype(np.float64).reshape(-1, channels[key])


def test_across_threads_and_micro_batches_features_stay_the_same_to_a_cosine_of_0_9999(
    pictures: Path, tmp_path: Path
) -> None:
    stores: list[tuple[Maps, dict[str, int]]] = []
    for number, (threads, micro_batch) in enumerate([(1, 1), (2, 1), (1, 8), (2, 8)]):
        report = build(pictures, tmp_path / f"{number}", [], threads=threads, micro_batch=micro_batch)
        channels = {a["key"]: a["channels"] for a in report.arrays}
        stores.append((stored(tmp_path / f"{number}", range(TILES)), channels))
    first, channels = stores[0]
    for other, _ in stores[1:]:
        assert other.keys() == first.keys()
        for (key, a), (_, b) in zip(tokens(first, channels), tokens(other, channels), strict=True):
            lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
            cosine = (a * b).sum(1) / np.maximum(lengths[0] * lengths[1], 1e-12)
            assert cosine[lengths[0] > 0].min() > 0.9999, key
            np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-3, atol=1e-3)


def arrays_of(name: str, request: BuildRequest, tile_px: int, load: TeacherLoader) -> tuple[Teacher, list[ArraySet]]:
    job = plan_teacher(request.teachers[0], request, tile_px, load)
    views = dict.fromkeys(s.view for s in job.specs)
    return job.teacher, [ArraySet(tuple(s for s in job.specs if s.view == view)) for view in views]


@pytest.mark.parametrize("tile_px", [32, 64, 96])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threads", [1, 2])
def test_in_settled_numerics_no_place_and_no_neighbour_changes_a_bit(name: str, threads: int, tile_px: int) -> None:
    """Four patches and a class token, twice, on two threads, are the 10 rows that MKL takes by two kinds of code."""
    for micro_batch in (2, 3, 5):
        values = {"data": "-", "out": "-", "teachers": [name], "threads": threads, "micro_batch": micro_batch}
        request = BuildRequest.of({**values, "scales": [1.0]})
        teacher, (arrays,) = arrays_of(name, request, tile_px, load_once)
        profile = steady_profile(decide_profile(request, teacher), teacher, arrays, fixed=False)
        view, layers = arrays.specs[0].view, [s.layer.name for s in arrays.specs]
        images = [make_tile(i, tile_px)[0] for i in range(4)]
        seen: list[dict[int, dict[str, bytes]]] = []
        for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 3, 0], [1, 0, 2, 3]):
            found: dict[int, dict[str, bytes]] = {}
            for start in range(0, len(order), profile.micro_batch):
                batch = order[start : start + profile.micro_batch]
                maps = encode_shown(teacher, view, layers, [images[i] for i in batch], profile)
                for n, i in enumerate(batch):
                    found[i] = {layer: m[n].tobytes() for layer, m in maps.items()}
            seen.append(found)
        for found in seen[1:]:
            assert all(found[i] == seen[0][i] for i in found)
        assert seen[0][0] != seen[0][1]


class Placed(MeanTeacher):
    """Adds a little that depends on the place in the micro-batch, as an unsteady kernel does."""

    def encode(
        self, tiles_BHW3: torch.Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, torch.Tensor]:
        maps = super().encode(tiles_BHW3, size_px, layers, precision)
        return {k: m + torch.arange(len(m)).view(-1, 1, 1, 1) for k, m in maps.items()}


def load_placed(request: TeacherRequest, device: str = "cpu") -> Teacher:
    return Placed(request.name, "0" * 64)


def test_a_teacher_whose_bits_depend_on_the_place_is_run_tile_by_tile_and_the_build_says_so(
    pictures: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"teachers": ["mean"], "load": load_placed, "orientations": 1}
    events: list[object] = []
    order = [3, 1, 0, 2, 6, 5, 4]
    build(pictures, tmp_path / "a", events, **options)
    build(ordered(pictures, tmp_path / "data", order), tmp_path / "b", [], **options)
    assert stored(tmp_path / "a", range(TILES)) == stored(tmp_path / "b", order)
    warned = [e.text for e in events if isinstance(e, Warned)]
    assert len(warned) == 1 and "encoded one by one" in warned[0]
    later: list[object] = []
    assert build(pictures, tmp_path / "a", later, **options).units == 0
    assert later and not any(isinstance(e, Warned) for e in later)


def test_a_micro_batch_that_the_user_fixed_stays_with_a_warning(pictures: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"teachers": ["mean"], "load": load_placed, "micro_batch": 2, "scales": (1.0,)}
    events: list[object] = []
    order = [1, 0, *range(2, TILES)]
    build(pictures, tmp_path / "a", events, orientations=1, **options)
    build(ordered(pictures, tmp_path / "data", order), tmp_path / "b", [], orientations=1, **options)
    assert any(isinstance(e, Warned) and "leave --micro-batch out" in e.text for e in events)
    assert stored(tmp_path / "a", range(TILES)) != stored(tmp_path / "b", order)
    request = BuildRequest.of({"data": pictures, "out": tmp_path / "c", "teachers": ["mean"], "micro_batch": 2})
    teacher, sets = arrays_of("mean", request, 64, load_placed)
    assert bits_depend_on_place(decide_profile(request, teacher), teacher, sets[0])


class Small(MeanTeacher):
    """Has memory for three tiles at once."""

    def encode(
        self, tiles_BHW3: torch.Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, torch.Tensor]:
        if len(tiles_BHW3) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 tile")
        return super().encode(tiles_BHW3, size_px, layers, precision)


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does_and_recorded(pictures: Path, tmp_path: Path) -> None:
    request = BuildRequest.of({"data": pictures, "out": tmp_path / "store", "teachers": ["mean"], "scales": [1.0]})
    events: list[object] = []
    build_store(request, events.append, load_teacher=lambda r, device="cpu": Small(r.name))
    said = [e.text for e in events if isinstance(e, Warned) and "does not fit" in e.text]
    assert [m[m.index("micro-batch of ") + 15 :][:7] for m in said] == ["8 tiles", "4 tiles"]
    (profile,) = FeatureStore.open(tmp_path / "store").describe()["profiles"]
    assert profile["micro_batch"] == 2
    fixed = request.model_copy(update={"out": tmp_path / "fixed", "micro_batch": 4})
    with pytest.raises(torch.cuda.OutOfMemoryError):
        build_store(fixed, load_teacher=lambda r, device="cpu": Small(r.name))
