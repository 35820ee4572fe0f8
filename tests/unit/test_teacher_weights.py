"""Weights are taken whole or refused; seeded ones are the same everywhere; no file is ever run."""

from __future__ import annotations

import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rsmtdf_cache import teachers
from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError
from rsmtdf_cache.plugins import find, plugin_names
from rsmtdf_cache.teachers._dense import DenseTeacher
from rsmtdf_cache.teachers._weights import seed_weights, weights_digest
from rsmtdf_cache.teachers.base import TeacherRequest

#: Pinned: the same bits on every machine, for every version of torch, timm and numpy.
LITE0 = "f83ad12d04aa9ca0776bad95924e246fe4e06e513c148811a26c5322713f7759"
LITE2 = "3a16fc083e364b647371395227ec8fc08dc9ee8d431cc8f80283de621e26c32a"
VIT_TINY_SEED_0 = "00bc866b170d25784f2aeb2d284bd4ba2576c7e2c0939f1883a8b813678f0a3f"


pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str, weights: str | Path | None = "none", seed: int = 0) -> DenseTeacher:
    teacher = teachers.load(TeacherRequest(name, weights, seed))
    assert isinstance(teacher, DenseTeacher)
    return teacher


@cache
def seeded(name: str) -> DenseTeacher:
    """Read-only: shared by the tests of this file."""
    return load(name)


def state(teacher: DenseTeacher) -> dict[str, Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in teacher.network.state_dict().items()}


@pytest.mark.parametrize(("name", "digest"), [("efficientnet_lite0", LITE0), ("efficientnet_lite2", LITE2)])
def test_the_sample_teachers_carry_the_published_weights(name: str, digest: str) -> None:
    teacher = load(name, None)
    assert teacher.spec.weights == digest != seeded(name).spec.weights
    assert "package" in teacher.spec.weights_origin and teacher.spec.license == "Apache-2.0"


def test_the_pretrained_weights_are_in_their_right_places() -> None:
    # Two tensors of one shape in each other's places would pass every check of shapes, but then batch norms would meet
    # other means than those they were trained on.
    image = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    right = load("efficientnet_lite0", None)
    inputs: list[tuple[Tensor, Any]] = []
    for module in right.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, i, _: inputs.append((i[0], m)))
    right.encode(image, 64, ["stage5"])
    off = [float((x.mean((0, 2, 3)) - m.running_mean).abs().div(m.running_var.sqrt()).median()) for x, m in inputs]
    assert len(off) > 40 and np.max(off) < 1.2  # in standard deviations; 100 with biases and means exchanged


def test_seeded_weights_are_a_function_of_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = seeded("timm:vit_tiny_patch16_224")
    torch.manual_seed(2)
    torch.rand(3)
    before = torch.random.get_rng_state()
    second, other = load("timm:vit_tiny_patch16_224"), load("timm:vit_tiny_patch16_224", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.spec.weights == second.spec.weights == VIT_TINY_SEED_0
    assert other.spec.weights != first.spec.weights
    assert (first.spec.weights_origin, other.spec.weights_origin) == ("seed 0", "seed 1")


def test_seeded_weights_keep_the_scale_of_a_fresh_network() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(256, 128))
    seed_weights(network, 0)
    convolution: Any = network[0].weight
    linear: Any = network[3].weight
    assert float(convolution.detach().std()) == pytest.approx((2 / 27) ** 0.5, rel=0.05)
    assert float(linear.detach().std()) == pytest.approx((1 / 256) ** 0.5, rel=0.02)
    assert float(linear.detach().mean()) == pytest.approx(0, abs=1e-3)
    norm: Any = network[1]
    assert torch.equal(norm.weight, torch.ones(64)) and torch.equal(norm.bias, torch.zeros(64))


def test_the_digest_sees_name_shape_dtype_and_value_and_not_the_order_or_counters() -> None:
    def digest(**tensors: Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module)

    a, b = torch.arange(6.0), torch.ones(2)
    base = digest(a=a, b=b)
    assert base == digest(b=b.clone(), a=a.clone()) == digest(a=a, b=b, num_batches_tracked=torch.tensor(9))
    changed = a.clone()
    changed[5] += 1e-6
    others = [digest(a=changed, b=b), digest(a=a.view(2, 3), b=b), digest(a=a, c=b), digest(a=a.double(), b=b)]
    assert len({base, *others}) == 5


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("dinov2_vits14", "safetensors"),
        ("clip_vitb32", "pth"),
        ("timm:resnet18", "wrapped.pth"),
        ("timm:vit_tiny_patch16_224", "safetensors"),
        ("efficientnet_lite0", "pth"),
    ],
)
def test_a_file_of_a_networks_own_weights_gives_the_same_teacher(name: str, form: str, tmp_path: Path) -> None:
    teacher, file = seeded(name), tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(state(teacher), file)
    elif form == "pth":
        torch.save(state(teacher), file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state(teacher).items()}}, file)
    read = load(name, file)
    assert read.spec.weights == teacher.spec.weights
    assert read.spec.weights_origin == f"file {file.name}"


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_the_original_dinov2_layout_is_read(name: str, tmp_path: Path) -> None:
    teacher = seeded(name)
    original = state(teacher)
    original["mask_token"] = torch.zeros(1, 384)
    if name.endswith("_reg"):  # the release keeps a position embedding for the class token and adds it itself
        original["register_tokens"] = original.pop("reg_token")
        place = torch.full((1, 1, 384), 0.5)
        original["pos_embed"] = torch.cat([place, original["pos_embed"]], dim=1)
        original["cls_token"] = original["cls_token"] - place
    torch.save(original, tmp_path / "dinov2.pth")
    read = load(name, tmp_path / "dinov2.pth")
    for key, tensor in state(teacher).items():
        torch.testing.assert_close(read.network.state_dict()[key], tensor, rtol=0, atol=1e-6)


def test_a_whole_clip_in_half_precision_gives_its_image_tower(tmp_path: Path) -> None:
    teacher = seeded("clip_vitb32")
    whole = {f"visual.{k}": v.half() for k, v in state(teacher).items()}
    whole |= {"logit_scale": torch.ones(()), "token_embedding.weight": torch.zeros(10, 512)}
    save_file(whole, tmp_path / "clip.safetensors")
    read = load("clip_vitb32", tmp_path / "clip.safetensors")
    assert all(t.dtype == torch.float32 for t in read.network.state_dict().values())
    assert not any("token_embedding" in key for key in read.network.state_dict())
    torch.testing.assert_close(read.network.state_dict()["conv1.weight"], whole["visual.conv1.weight"].float())


def test_weights_of_another_network_are_refused_with_names_and_shapes(tmp_path: Path) -> None:
    own = state(seeded("timm:resnet18"))
    cases = {
        "missing": ({k: v for k, v in own.items() if k != "layer2.0.conv1.weight"}, "layer2.0.conv1.weight is missing"),
        "shape": (own | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"conv1.weight has shape \(64, 3, 3, 3\), needs"),
        "extra": (own | {"layer9.weight": torch.zeros(1)}, "layer9.weight is not part of the network"),
    }
    for name, (tensors, message) in cases.items():
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(MismatchError, match=message):
            load("timm:resnet18", tmp_path / f"{name}.safetensors")
    save_file(own | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, tmp_path / "head.safetensors")
    assert load("timm:resnet18", tmp_path / "head.safetensors").spec.weights == seeded("timm:resnet18").spec.weights
    for other in ("efficientnet_lite0", "clip_vitb32", "dinov2_vits14"):
        with pytest.raises(MismatchError):
            load(other, tmp_path / "head.safetensors")


class _Code:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_missing_damaged_and_executable_files_are_resource_errors(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no such file"):
        load("timm:resnet18", tmp_path / "nothing.pth")
    with pytest.raises(ResourceError, match="no such file"):
        load("timm:resnet18", tmp_path)
    for suffix in ("safetensors", "pth"):
        (tmp_path / f"damaged.{suffix}").write_bytes(b"\x80\x02 not weights at all")
        with pytest.raises(ResourceError, match=f"damaged.{suffix}"):
            load("timm:resnet18", tmp_path / f"damaged.{suffix}")
    mark = tmp_path / "ran"
    torch.save({"state_dict": _Code(mark)}, tmp_path / "code.pth")
    with pytest.raises(ResourceError, match="never run"):
        load("timm:resnet18", tmp_path / "code.pth")
    assert not mark.exists()
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(MismatchError, match="no named tensors"):
        load("timm:resnet18", tmp_path / "list.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # such archives are what OpenAI publishes, deprecated or not
        torch.jit.save(torch.jit.script(nn.Identity()), str(tmp_path / "archive.pt"))
    with pytest.raises(ResourceError, match=r"TorchScript archive.*state_dict\(\)"):
        load("timm:resnet18", tmp_path / "archive.pt")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("dinov2_vits14", "hf download timm/vit_small_patch14_dinov2.lvd142m model.safetensors"),
        ("clip_vitb32", "hf download timm/vit_base_patch32_clip_224.openai open_clip_model.safetensors"),
        ("timm:resnet18.a1_in1k", "hf download timm/resnet18.a1_in1k model.safetensors"),
    ],
)
def test_without_a_hub_the_error_names_the_download_command_and_the_weights_way(
    name: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    with pytest.raises(ResourceError, match=re.escape(command)) as caught:
        load(name, None)
    assert "weights=FILE" in str(caught.value) and "refused" in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        load(name, None)


def test_a_file_in_the_hubs_cache_is_used_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    teacher = seeded("timm:resnet18")
    repository = tmp_path / "models--timm--resnet18.a1_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state(teacher), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = load("timm:resnet18.a1_in1k", None)
    assert found.spec.weights == teacher.spec.weights
    assert found.spec.weights_origin == "hub timm/resnet18.a1_in1k"


def test_a_device_that_is_not_there_is_told_from_one_that_does_not_exist() -> None:
    with pytest.raises(ResourceError, match="choose cpu"):
        teachers.load(TeacherRequest("timm:resnet18", "none"), "cuda:99")
    with pytest.raises(UsageError, match="no such kind of device"):
        teachers.load(TeacherRequest("timm:resnet18", "none"), "no-such-device")


def test_plugins_are_the_modules_of_a_folder_and_unknown_ones_are_usage_errors() -> None:
    assert {"clip", "dinov2", "sample_weights", "timm_any"} <= set(plugin_names("teachers"))
    assert not {"base", "_weights"} & set(plugin_names("teachers"))
    assert callable(find("teachers", "dinov2").load)
    with pytest.raises(UsageError, match=r"Did you mean 'dinov2'\?"):
        find("teachers", "dinov3")
    with pytest.raises(UsageError):
        find("teachers", "base")
    with pytest.raises(UsageError):
        find("../teachers", "dinov2")


def test_another_package_adds_a_teacher_by_an_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rsmtdf.teachers]\nmine = other_teacher:load\n")
    (tmp_path / "other_teacher.py").write_text(
        "from dataclasses import replace\n"
        "from rsmtdf_cache.teachers import timm_any\n"
        "def load(request, device):\n"
        "    return timm_any.load(replace(request, name='timm:resnet18'), device)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "mine" in teachers.names()
    assert load("mine").spec.architecture == "resnet18"
