"""Codecs: what comes back, what is refused, what the bytes are. Features are synthetic with outliers, seeded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rsmtdf_cache.codecs import Calibration, Codec, Moments, codec_name, load_codec, parse_codec
from rsmtdf_cache.codecs.compressors import canonical, compress, decompress
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_cache.errors import FindingsError, UsageError
from rsmtdf_cache.quality import Quality

CHANNELS = 48


def features(seed: int, tiles: int = 6, low_rank: bool = False) -> NDArray[np.float32]:
    """Return ``[tiles, 9, 7, 48]`` of rank 48 or 9: one channel of 30 times the usual scale, 2 % tokens of 10 times."""
    random = np.random.RandomState(7)  # one teacher
    mix = random.standard_normal((8 if low_rank else CHANNELS, CHANNELS))
    scale = np.ones(CHANNELS)
    scale[5] = 30
    centre = random.standard_normal(CHANNELS)
    draw = np.random.RandomState(seed)
    x = (draw.standard_normal((tiles, 9, 7, len(mix))) @ mix + centre) * scale
    x[draw.uniform(size=x.shape[:3]) < 0.02] *= 10
    return x.astype(np.float32)


def calibrated(name: str, maps: NDArray[np.float32]) -> Codec:
    moments = Moments(maps.shape[-1])
    for one in maps:
        moments.add(one)
    return load_codec(parse_codec(name), maps.shape[-1], Calibration.fit(moments, maps.shape[-1], {}))


def test_calibration_equals_numpy_moments() -> None:
    maps = features(0) + 1000  # far from the origin: sums of squares would lose digits
    tokens = maps.reshape(-1, CHANNELS).astype(np.float64)
    moments = Moments(CHANNELS)
    for one in maps:
        moments.add(one)
    assert np.allclose(moments.mean(), tokens.mean(0), rtol=1e-12)
    assert np.allclose(moments.covariance(), np.cov(tokens.T, bias=True), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["int8", "pca48-int8"])
def test_int8_keeps_outlier_channels_and_tokens(name: str) -> None:
    x = features(1)
    codec = calibrated(name, features(0))
    codes = codec.encode(x)
    assert codes.values.dtype == np.int8 and codes.nbytes <= x.size + 2 * x[..., 0].size
    quality = Quality.of(x, codec.decode(codes))
    assert quality.cosine > 0.9995 and quality.standardised > 0.9995
    # Without standardisation the outlier channel takes the levels of all others: what this codec is for.
    step = np.abs(x).max(-1, keepdims=True) / 127
    naive = np.rint(x / step) * step
    assert 1 - Quality.of(x, naive).standardised > 20 * (1 - quality.standardised)


def test_every_token_stays_within_half_a_step_of_its_scale() -> None:
    x, codec = features(2), calibrated("int8", features(0))
    codes = codec.encode(x)
    assert codes.scale is not None and codec.calibration is not None
    error = np.abs(codec.decode(codes).astype(np.float64) - x) / codec.calibration.spread()
    half_float16 = np.abs(x) * 2.0**-11 / codec.calibration.spread()  # features are given in half precision
    # A scale rounded down clips the largest code by at most 2**-11 of it.
    bound = 0.5 * codes.scale.astype(np.float64)[..., None] * (1 + 2.0**-3) + half_float16 + 1e-6
    assert (error <= bound).all()


def test_components_that_hold_everything_lose_nothing_but_rounding_and_fewer_lose_more() -> None:
    held = features(1, low_rank=True)
    worse = [Quality.of(held, c.decode(c.encode(held))) for c in
             (calibrated(f"pca{k}-int8", features(0, low_rank=True)) for k in (9, 6, 3))]  # fmt: skip
    assert worse[0].cosine > 0.9999
    assert worse[0].standardised > worse[1].standardised > worse[2].standardised
    assert worse[2].error > 0.1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["int8", "pca20-int8", "float16"]))
def test_bits_of_a_token_do_not_depend_on_its_neighbours(seed: int, name: str) -> None:
    codec = calibrated(name, features(0)) if name != "float16" else load_codec(parse_codec(name), CHANNELS)
    x = features(seed % 1000, tiles=1)[0]
    whole = codec.encode(x)
    cut = np.random.RandomState(seed).randint(1, 9)
    parts = [codec.encode(x[:cut]), codec.encode(x[cut:])]
    assert np.concatenate([p.values for p in parts]).tobytes() == whole.values.tobytes()
    if whole.scale is not None:
        assert b"".join(p.scale.tobytes() for p in parts if p.scale is not None) == whole.scale.tobytes()


@pytest.mark.parametrize("name", ["float16", "int8", "pca20-int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_what_cannot_be_held_comes_back_non_finite_never_wrong(name: str, bad: float) -> None:
    codec = calibrated(name, features(0)) if name != "float16" else load_codec(parse_codec(name), CHANNELS)
    x = features(3)
    x[0, 4, 4, 11] = bad
    decoded = codec.decode(codec.encode(x))
    assert not np.isfinite(decoded[0, 4, 4]).all()
    assert np.isfinite(decoded[1:]).all()


def test_a_channel_that_slept_in_the_sample_does_not_take_the_levels_when_it_wakes() -> None:
    sample = features(0)
    sample[..., 20] = 3.0
    x = features(1)
    x[..., 20] = 3.0
    x[0, :, :, 20] = 4.0
    codec = calibrated("int8", sample)
    decoded = codec.decode(codec.encode(x)).astype(np.float64)
    assert np.allclose(decoded[1:, ..., 20], 3.0, atol=2e-3)
    assert Quality.of(np.delete(x[:1], 20, -1), np.delete(decoded[:1], 20, -1)).cosine > 0.999


@pytest.mark.parametrize("name", ["float16", "int8", "pca20-int8"])
@pytest.mark.parametrize("standardised", [False, True])
def test_decoding_on_a_device_equals_numpy(name: str, standardised: bool) -> None:
    x = features(4)
    codec = calibrated(name, features(0)) if name != "float16" else load_codec(parse_codec(name), CHANNELS)
    codes = codec.encode(x)
    mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
    std[3] = np.inf  # a channel that carries nothing
    decoder = DeviceDecoder(codec, mean, std) if standardised else DeviceDecoder(codec)
    scale = None if codes.scale is None else torch.from_numpy(codes.scale)
    found = decoder(torch.from_numpy(codes.values), scale).numpy()
    wanted = codec.decode(codes).astype(np.float64)
    if standardised:
        wanted = (wanted - mean) / std
        assert not found[..., 3].any()
    # numpy rounds to half precision at the end, a device does not.
    assert np.allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
    if codes.scale is not None:
        codes.scale[0, 0, 0] = np.nan
        assert np.isnan(decoder(torch.from_numpy(codes.values), torch.from_numpy(codes.scale))[0, 0, 0].numpy()).any()


def test_an_artefact_is_its_own_digest_and_a_damaged_one_is_refused() -> None:
    codec = calibrated("pca20-int8", features(0))
    assert codec.calibration is not None
    data = codec.calibration.to_bytes()
    again = Calibration.from_bytes(data, "here")
    assert again.to_bytes() == data and again.digest == codec.calibration.digest
    x = features(1)
    other = load_codec(parse_codec("pca20-int8"), CHANNELS, again)
    assert other.encode(x).tobytes() == codec.encode(x).tobytes()
    for broken in (b"", data[:40], data[:-8], data.replace(b"rsmtdf-calibration", b"rsmtdf-calibratiom")):
        with pytest.raises(FindingsError, match="not a calibration"):
            Calibration.from_bytes(broken, "here")


@pytest.mark.parametrize("name", ["int9", "pca-int8", "pca0-int8", "pca49-int8", "pca-4-int8"])
def test_an_unknown_codec_or_parameter_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="codec"):
        load_codec(parse_codec(name), CHANNELS)


def test_a_codec_never_runs_with_the_calibration_of_another_width() -> None:
    narrow = Calibration(np.zeros(3, np.float32), np.ones(3, np.float32))
    for calibration in (None, narrow):
        with pytest.raises(FindingsError, match="48 channels"):
            load_codec(parse_codec("int8"), CHANNELS, calibration)


def test_names_are_read_as_they_are_written() -> None:
    for name in ("float16", "int8", "pca96-int8"):
        assert codec_name(parse_codec(name)) == name


@pytest.mark.parametrize(
    "name", ["none", "zstd", "zstd:9", "blosc:lz4", "blosc:zstd:3:bitshuffle", "blosc:zlib:1:shuffle"]
)
def test_compressors_give_back_the_bytes_and_refuse_damage(name: str) -> None:
    values = np.random.RandomState(0).randint(-20, 20, 4096).astype(np.int8)
    data = compress(name, values)
    assert bytes(decompress(name, data, values.nbytes, "here")) == values.tobytes()
    if name != "none":
        assert len(data) < values.nbytes
        with pytest.raises(FindingsError, match="here: a chunk"):
            decompress(name, data, values.nbytes // 2, "here")  # holds more than the array says
        with pytest.raises(FindingsError, match="here: a chunk"):
            decompress(name, data[: len(data) // 2], values.nbytes, "here")


@pytest.mark.parametrize(
    "name", ["gzip", "zstd:0", "zstd:x", "blosc", "blosc:snappy", "blosc:lz4:10", "blosc:lz4:1:swap"]
)
def test_an_unknown_compressor_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="compressor"):
        compress(name, np.zeros(3, np.int8))


def test_impossible_calibrations_are_refused() -> None:
    codec = calibrated("pca20-int8", features(0))
    sound = codec.calibration
    assert sound is not None and sound.basis is not None and sound.variances is not None
    wrong = {
        "deviations no feature has": replace(sound, std=np.full_like(sound.std, 3e38)),
        "a mean no feature has": replace(sound, mean=np.full_like(sound.mean, 1e9)),
        "axes that are not orthonormal": replace(sound, basis=sound.basis * 2),
        "axes of nothing": replace(sound, basis=np.zeros_like(sound.basis)),
        "negative variances": replace(sound, variances=-sound.variances),
        "not a number": replace(sound, mean=np.full_like(sound.mean, np.nan)),
    }
    for what, calibration in wrong.items():
        with pytest.raises(FindingsError, match="not a calibration"):
            Calibration.from_bytes(calibration.to_bytes(), what)


def test_a_nested_header_is_refused_without_a_traceback() -> None:
    header = (b'{"__metadata__":{"calibration":"' + b"[" * 100_000 + b'"}}').ljust(100_200)
    with pytest.raises(FindingsError, match="not a calibration"):
        Calibration.from_bytes(len(header).to_bytes(8, "little") + header, "here")


def test_one_compressor_has_one_name() -> None:
    assert {canonical(name) for name in ("zstd", "zstd:1", "zstd:+1", "zstd:01")} == {"zstd:1"}
    assert canonical("blosc:lz4") == canonical("blosc:lz4:5:bitshuffle") == "blosc:lz4:5:bitshuffle"
