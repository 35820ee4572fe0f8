"""What a store holds, as JSON data, from its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rsmtdf_cache.codecs import codec_name
from rsmtdf_cache.head import recorded_snapshot
from rsmtdf_cache.specs import FeatureKey

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = ["describe_store"]


def describe_store(store: FeatureStore) -> dict[str, Any]:
    """Return what ``cache info`` shows of ``store``."""
    keys, manifest, ledger = store.keys(), store.manifest, store.ledger
    arrays, pixels = _arrays(store, keys), _arrays(store, store.pixel_keys())
    teachers = {key.teacher: store.spec(key).teacher for key in keys}
    profiles = [ledger.sets[ledger.set_of(key)].profile.to_json() for key in keys]
    return {
        "path": store.shown, "format_version": manifest.version, "dataset": manifest.dataset,
        "attribution": manifest.attribution, "tile_px": store.tile_px, "group_rows": manifest.group_rows,
        "tiles": sum(store.tiles.splits.values()), "quarantined": store.quarantined, "splits": store.tiles.splits,
        "snapshot": recorded_snapshot(store.paths, ledger),
        "nbytes": sum(a["nbytes"] for a in arrays + pixels),
        "teachers": [t.to_json() for _, t in sorted(teachers.items())],
        "profiles": [dict(p) for p in sorted({tuple(sorted(profile.items())) for profile in profiles})],
        "arrays": arrays, "pixels": pixels,
    }  # fmt: skip


def _arrays(store: FeatureStore, keys: Sequence[FeatureKey]) -> list[dict[str, Any]]:
    arrays = []
    for key in keys:
        spec, shards = store.spec(key), store.ledger.all_shards(key)
        record = store.ledger.sets[store.ledger.set_of(key)]
        quality = record.quality.get(key.layer)
        arrays.append({
            "key": str(key), "digest": spec.digest(), "grid": list(spec.grid), "channels": spec.layer.channels,
            "stride_tile_px": spec.stride_tile_px, "offset_tile_px": spec.offset_tile_px,
            "view": spec.view.to_json(),
            "codec": codec_name(spec.encoding), "tiles": int(store.committed(key).sum()),
            "shards": len(shards), "nbytes": sum(s.nbytes for s in shards),
            "calibration": record.calibrations.get(key.layer, ""),
            "quality": quality.to_json() if quality is not None else None,
        })  # fmt: skip
    return arrays
