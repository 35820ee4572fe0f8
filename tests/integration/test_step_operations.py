"""What a step costs, counted in operations: passes of networks, and reads that make the host wait for a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from rsmtdf_train.prepare import Part, part_to
from rsmtdf_train.processes import Processes
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.run import Run, open_run
from rsmtdf_train.state import TrainState, build_state
from rsmtdf_train.step import train_step
from tests.datasets import write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

TILE_PX = 64
TEACHER = "timm:test_resnet,pretrained=none,seed=3,layers=stage4+stage5"
#: What needs a value, or a number of values, on the host: on a GPU the host waits until all before it is done.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "item"}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.counts["index by a mask" if masks else name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> dict[str, int]:
        return {name: n for name, n in self.counts.items() if name in WAITS or name == "index by a mask"}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("operations")
    write_dataset(root / "data", tiles=9, tile_px=TILE_PX)
    build_store(BuildRequest.of({
        "data": root / "data", "out": root / "store", "teachers": [TEACHER], "threads": 1,
        "scales": [1.0], "codec": "int8",
    }))  # fmt: skip
    return root


def opened(root: Path, out: Path, **changes: object) -> tuple[Run, TrainState]:
    values = {
        "data": root / "data", "labeled": "10", "steps": 50, "crop_px": TILE_PX, "teachers": [TEACHER],
        "batch": {"labeled": 2, "unlabeled": 2}, "optim": {"clip_norm": 1.0},
        "student": {"encoder": "timm:test_resnet", "channels": 16}, **changes,
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    store = root / "store" if recipe.targets == "cached" else None
    run = open_run(recipe, out, store, "cpu", 1, Processes(), lambda event: None)
    state = build_state(run.recipe, len(run.identity.classes), run.identity.targets, run.device)
    state.student.train()
    return run, state


def step(run: Run, state: TrainState) -> _Operations:
    part: Part = part_to(run.loader.batch(state.step), run.device)
    operations = _Operations()
    with operations:
        train_step(state, [part], run.recipe, run.tools)
    return operations


@contextmanager
def counted(**networks: nn.Module) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
        for name, module in networks.items()
    ]
    yield counts
    for hook in hooks:
        hook.remove()


WEAK = {"view": "weak"}
SECOND = {"passes": {"*": 32}}


@pytest.mark.parametrize(
    ("changes", "student", "ema"),
    [
        ({"targets": "none"}, 1, 1),
        ({"targets": "cached"}, 1, 1),  # distillation and fusion share the pass of segmentation
        ({"targets": "cached", "distill": SECOND}, 2, 2),  # RS-MTDF's second pass, which the EMA fuses too
        ({"targets": "cached", "distill": SECOND, "fuse": False}, 2, 1),
        ({"targets": "cached", "distill": WEAK}, 2, 1),
        ({"targets": "cached", "method": "unimatch"}, 1, 1),
        ({"targets": "cached", "method": "supervised"}, 1, 0),
    ],
)
def test_passes_of_student_and_ema_are_as_few_as_the_method_needs(
    root: Path, tmp_path: Path, changes: dict[str, object], student: int, ema: int
) -> None:
    run, state = opened(root, tmp_path / "run", **changes)
    with counted(student=state.student.student.encoder, ema=state.ema.student.encoder) as passes:
        step(run, state)
    assert (passes["student"], passes["ema"]) == (student, ema)


def test_teachers_run_once_in_an_online_step_and_not_at_all_in_a_cached_one(root: Path, tmp_path: Path) -> None:
    online, state = opened(root, tmp_path / "online", targets="online")
    assert online.tools.live is not None
    (teacher,) = online.tools.live.teachers.values()
    network: nn.Module = teacher.network  # type: ignore[attr-defined]
    live = step(online, state)
    run, state = opened(root, tmp_path / "cached", targets="cached")
    assert run.tools.live is None
    cached = step(run, state)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in network.modules())
    # The online step is the cached one and the teacher's own convolutions, once for both layers and all crops
    # (in inference mode an operator is counted under its own name, before it is taken apart).
    assert live.counts["convolution"] == cached.counts["convolution"] > 0
    assert (live.counts["conv2d"], cached.counts["conv2d"]) == (convolutions, 0)


@pytest.mark.parametrize("targets", ["cached", "online", "none"])
def test_a_step_never_waits_for_its_device(root: Path, tmp_path: Path, targets: str) -> None:
    run, state = opened(root, tmp_path / "run", targets=targets)
    probe = _Operations()
    with probe:
        _ = torch.ones(3)[torch.tensor([True, False, True])].sum().item()
    assert probe.waits  # the counter sees what it is to find
    for _ in range(2):
        assert step(run, state).waits == {}
