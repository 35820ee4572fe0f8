"""What ``rsmtdf data tile`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.prepare.cutting import Cut
from rsmtdf_cache.rasters.scaling import Scale

__all__ = ["Held", "SPLIT_BY", "TileRequest", "parse_held", "parse_percentiles"]

SPLIT_BY = ("scene", "block")


@dataclass(frozen=True)
class Held:
    """What is held out as val or test: a ``share`` of the tiles, or the scenes whose names match ``patterns``."""

    share: Fraction = Fraction(0)
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TileRequest:
    """Scenes, labels and classes, and how they become tiles. None: the default that is found from the data.

    ``scenes``: files and folders. ``labels``: a folder, or one file; ``label_name``: the stem of the labels of
    ``{scene}``. ``classes``: a YAML file with keys of ``dataset.yaml``. ``scale``: a range, or a pair of percentiles
    that are measured. ``split_by``: what is dealt whole: ``scene``, or ``block`` of ``block`` x ``block`` tiles.
    """

    scenes: tuple[Path, ...]
    out: Path
    labels: Path | None = None
    classes: Path | None = None
    label_name: str = "{scene}"
    cut: Cut = field(default_factory=Cut)
    bands: tuple[int, int, int] | None = None
    scale: Scale | tuple[float, float] | None = None
    val: Held = Held(Fraction(1, 5))
    test: Held = Held(Fraction(1, 5))
    split_by: str | None = None
    block: int | None = None
    seed: int = 0
    percents: tuple[str, ...] = ("1", "5", "10", "100")
    name: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for what cannot be asked together."""
        if self.split_by not in (None, *SPLIT_BY):
            raise UsageError(f"--split-by {self.split_by}: give {' or '.join(SPLIT_BY)}")
        if self.split_by == "block" and self.cut.overlap_px:
            raise UsageError(
                "--overlap with --split-by block: neighbouring tiles share pixels, and one may be trained on and the "
                "other scored; leave one of them out"
            )
        if self.split_by == "scene" and self.block is not None:
            raise UsageError("--block belongs to --split-by block")
        if self.val.share + self.test.share >= 1:
            raise UsageError("--val and --test hold out all tiles; leave some to train on")
        if "{scene}" not in self.label_name:
            raise UsageError(f"--label-name {self.label_name}: it has no {{scene}}, which stands for the scene's name")


def parse_held(text: str, option: str) -> Held:
    """Return ``"20%"`` or ``"0.2"`` as a share, anything else as names of scenes. Raises ``UsageError``."""
    words = tuple(filter(None, (word.strip() for word in text.split(","))))
    if len(words) == 1:
        try:
            percent = words[0].endswith("%")
            share = Fraction(words[0].removesuffix("%")) / (100 if percent else 1)
        except (ValueError, ZeroDivisionError):
            return Held(patterns=words)
        if not 0 <= share < 1:
            raise UsageError(f"{option} {text}: a share is at least 0 and below 1 (below 100%)")
        return Held(share)
    if not words:
        raise UsageError(f"{option}: give a share such as 20%, or names of scenes such as 'north_*'")
    return Held(patterns=words)


def parse_percentiles(text: str) -> tuple[float, float] | None:
    """Return ``"2%,98%"`` as two percentiles, None for what is no pair of them. Raises ``UsageError``."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.endswith("%") for word in words):
        return None
    try:
        low, high = (float(word[:-1]) for word in words)
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 100:
        raise UsageError(f"--scale {text}: percentiles are two, the lower one first, such as 2%,98%")
    return low, high
