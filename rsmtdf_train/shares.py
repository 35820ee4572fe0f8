"""Which crops of a batch are whose: processes, and the parts that each accumulates, share it, each crop to one share.

Shares are of nearly equal size; losses divide by counts over the whole batch, so that they need not be equal.
"""

from __future__ import annotations

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.sections import BatchConfig

__all__ = ["check_shares", "labeled_places", "unlabeled_places"]


def check_shares(batch: BatchConfig, shares: int, labeled_only: bool = False) -> None:
    """Raise ``UsageError`` unless each of ``shares`` gets a labelled crop and a pair of unlabelled ones.

    ``labeled_only``: no unlabelled crops are drawn.
    """
    least = {"labeled": (batch.labeled, shares, "a crop")}
    if not labeled_only:
        least["unlabeled"] = (batch.unlabeled, 2 * shares - 1, "a pair of crops, for CutMix")
    for name, (size, needed, one) in least.items():
        if shares > 1 and size < needed:
            raise UsageError(
                f"batch.{name} {size} cannot be shared by {shares} (processes x batch.accumulate): each takes at least "
                f"{one}; set batch.{name} to {needed} or more, or take fewer processes or parts"
            )


def labeled_places(size: int, share: int, shares: int) -> list[int]:
    """Return the positions 0 to ``size - 1`` of a batch that are in ``share`` 0, 1, … of ``shares``, in order."""
    _check(share, shares)
    return list(range(share * size // shares, (share + 1) * size // shares))


def unlabeled_places(size: int, share: int, shares: int) -> list[int]:
    """Return the positions that are in ``share``: with a position ``i`` its CutMix partner ``size - 1 - i``.

    Partners lie mirrored in the share, as in the batch. Rounded the other way than labelled ones, so that the share
    with more of these has fewer of those.
    """
    _check(share, shares)
    pairs = (size + 1) // 2  # the crop in the middle of an odd batch is its own partner
    first = range(-(-share * pairs // shares), -(-(share + 1) * pairs // shares))
    return [*first, *(size - 1 - i for i in reversed(first) if 2 * i != size - 1)]


def _check(share: int, shares: int) -> None:
    if not 0 <= share < shares:
        raise ValueError(f"part {share} of {shares}")
