"""Identity: everything that changes bytes changes the digest, nothing else does."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rsmtdf_cache.specs import (
    CropSpec,
    EncodingSpec,
    FeatureKey,
    FeatureSpec,
    LayerSpec,
    PhotometrySpec,
    PixelSpec,
    TeacherSpec,
    ViewSpec,
    WindowSpec,
    canonical_json,
    differing_fields,
)

PIXEL = PixelSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TEACHER = TeacherSpec(
    name="t", family="timm", architecture="a", weights="0" * 64, weights_origin="hub", patch_px=32, native_px=224,
    prefix_tokens=1, norm=True, pixel=PIXEL,
)  # fmt: skip
SPEC = FeatureSpec(
    teacher=TEACHER,
    layer=LayerSpec(name="l", channels=8, stride_px=16, offset_px=8.0),
    view=ViewSpec(size_px=64, orientation=0),
    encoding=EncodingSpec(),
    tile_px=64,
    grid=(4, 4),
)

CHANGES = {
    "teacher": {
        "name": "u", "family": "clip", "architecture": "b", "weights": "1" * 64, "patch_px": 16, "native_px": 256,
        "prefix_tokens": 0, "norm": False,
        "pixel": {"mean": (0.4, 0.5, 0.5), "std": (0.4, 0.5, 0.5), "resize": "bilinear", "antialias": False},
    },
    "layer": {"name": "m", "channels": 9, "stride_px": 8, "offset_px": 7.5},
    "view": {"size_px": 128, "orientation": 4},
    "encoding": {"codec": "int8", "parameters": {"k": 1}},
    "tile_px": 128,
    "grid": (8, 8),
}  # fmt: skip


def variants(data: dict, changes: dict):  # type: ignore[type-arg, no-untyped-def]
    for name, value in changes.items():
        if isinstance(value, dict) and name != "parameters":
            for path, inner in variants(data[name], value):
                yield f"{name}.{path}", {**data, name: inner}
        else:
            yield name, {**data, name: value}


def test_every_field_that_changes_bytes_changes_the_digest() -> None:
    digests = {"": SPEC.digest()}
    for path, data in variants(SPEC.to_json(), CHANGES):
        digests[path] = FeatureSpec.from_json(data).digest()
    assert len(digests) == 23
    assert len(set(digests.values())) == len(digests)


def test_every_field_of_the_spec_is_among_the_changes_or_known_not_to_count() -> None:
    def leaves(data: dict, prefix: str = "") -> set[str]:  # type: ignore[type-arg]
        found: set[str] = set()
        for name, value in data.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}"}
        return found

    tried = {path for path, _ in variants(SPEC.to_json(), CHANGES)}
    assert leaves(SPEC.to_json()) - tried == {"teacher.weights_origin", "teacher.license"}


def test_where_weights_came_from_and_their_licence_do_not_change_the_digest() -> None:
    other = TEACHER.model_copy(update={"weights_origin": "a file", "license": "Apache-2.0"})
    assert SPEC.model_copy(update={"teacher": other}).digest() == SPEC.digest()


def test_the_digest_survives_a_round_trip_through_json_and_is_pinned() -> None:
    assert FeatureSpec.model_validate_json(SPEC.model_dump_json()).digest() == SPEC.digest()
    # A change of this number makes every store of every user unreadable: it needs a new format version.
    assert SPEC.digest() == "f37a81c018c207d4f334d14f39976744acb069132169f10650f433e83bbce9e7"


def test_differing_fields_are_named_by_their_path() -> None:
    new = FeatureSpec.from_json({**SPEC.to_json(), "view": {"size_px": 64, "orientation": 4}})
    assert differing_fields(SPEC.to_json(), new.to_json()) == ["view.orientation: 0 (store) != 4 (asked)"]


def test_keys_are_parsed_from_their_names_and_hostile_ones_refused() -> None:
    key = FeatureKey.parse("efficientnet_lite0/s256o4/stage3")
    assert str(key) == "efficientnet_lite0/s256o4/stage3" and key.view == ViewSpec(size_px=256, orientation=4).name
    for bad in ("a/b", "a/b/c/d", "../b/c", "a//c", "a/b/.c", ""):
        with pytest.raises(ValueError, match="not a feature key"):
            FeatureKey.parse(bad)


def test_different_views_have_different_names_that_can_be_folders() -> None:
    crops = (None, CropSpec(y=0, x=0, side_px=32), CropSpec(y=0, x=1, side_px=32))
    colours = (None, PhotometrySpec(), PhotometrySpec(hue=0.1))
    windows = (None, WindowSpec(side_px=32, overlap_px=8), WindowSpec(side_px=32, overlap_px=9))
    views = [
        ViewSpec(size_px=size, orientation=o, crop=crop, photometry=colour, windows=window)
        for size in (64, 128) for o in (0, 4) for crop in crops for colour in colours for window in windows
    ]  # fmt: skip
    names = {v.name for v in views}
    assert len(names) == len(views) == 108
    assert all(FeatureKey(teacher="a", view=name, layer="b").view == name for name in names)


def test_members_that_came_later_change_no_digest_at_their_default() -> None:
    for spec in (SPEC.view, SPEC.encoding, SPEC.teacher, SPEC.teacher.pixel):
        assert spec.LATER and not spec.LATER & spec.to_json().keys()
        assert type(spec).from_json(spec.to_json()) == spec
    packed = SPEC.model_copy(update={"encoding": EncodingSpec(compressor="zstd")})
    assert packed.digest() != SPEC.digest() and packed.to_json()["encoding"]["compressor"] == "zstd"


def test_specs_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        SPEC.tile_px = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        FeatureSpec.from_json({**SPEC.to_json(), "extra": 1})


def test_canonical_json_refuses_nan_and_sorts_keys() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "ä"]}) == '{"a":[1.5,"ä"],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_an_interrupt_while_a_spec_is_written_stays_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(frozenset[str]):
        def __contains__(self, item: object) -> bool:
            raise KeyboardInterrupt

    monkeypatch.setattr(ViewSpec, "LATER", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        SPEC.to_json()


def test_offsets_that_are_nowhere_are_refused() -> None:
    for offset in (1e308, float("inf"), float("nan"), -1e6):
        with pytest.raises(ValidationError):
            LayerSpec(name="a", channels=1, stride_px=8, offset_px=offset)
