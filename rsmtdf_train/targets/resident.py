"""Targets whose codes lie on the training device: a batch carries token numbers, and the device gathers and decodes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_cache.allocate import Allocator, page_empty
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_cache.errors import ResourceError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.memory import available_nbytes
from rsmtdf_cache.specs import FeatureSpec
from rsmtdf_cache.units import size
from rsmtdf_cache.views import token_box
from rsmtdf_train.targets.base import TargetMode, TargetRequest
from rsmtdf_train.targets.stored import CachedTargets

__all__ = ["ResidentTargets"]

#: Codes are sent to the device in pieces of about this size.
_PIECE_NBYTES = 2**26


class _Gather(DeviceDecoder):
    """Decodes tokens by their numbers in ``values`` ``[tokens, C]`` and ``scale`` ``[tokens]`` on a device."""

    def __init__(self, decoder: DeviceDecoder, values: Tensor, scale: Tensor | None) -> None:
        self._decoder, self._values, self._scale = decoder, values, scale

    def __call__(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return ``[..., D]`` float32 of token numbers ``[..., 1]`` int64 on that device."""
        tokens = values.squeeze(-1)
        return self._decoder(self._values[tokens], None if self._scale is None else self._scale[tokens])


@dataclass(frozen=True)
class _Block:
    """Where the tokens of one target begin: ``(orientation's place * maps + row's place) * tokens of a map``."""

    specs: dict[int, FeatureSpec]
    places: dict[int, int]
    maps: int


class ResidentTargets(TargetMode):
    """``cached`` targets, all their codes on a device. The features of a batch are the same, bit for bit."""

    def __init__(self, cached: CachedTargets, rows: Collection[int], device: torch.device, on_event: EventSink) -> None:
        """Use ``ResidentTargets.of``."""
        self.cached = cached
        held = sorted(set(cached.rows_read(rows)))
        self._place = {row: place for place, row in enumerate(held)}
        self._blocks: dict[str, _Block] = {}
        self.specs = {}
        total = sum(len(by) for by in cached.by_key.values()) * len(held)
        on_event(ProgressStart("hold", f"copying features to {device}", total, unit="maps"))
        for key, by_orientation in cached.by_key.items():
            orientations = [o for o in cached.geometry.orientations if o in by_orientation]
            specs = {o: by_orientation[o] for o in orientations}
            values, scale = self._filled(specs, held, device, on_event)
            self._blocks[key] = _Block(specs, {o: n for n, o in enumerate(orientations)}, len(held))
            decoder = _Gather(cached.specs[key].decoder, values, scale)
            self.specs[key] = replace(cached.specs[key], decoder=decoder)
        on_event(ProgressEnd("hold"))

    @classmethod
    def of(
        cls, mode: TargetMode | None, rows: Collection[int], device: torch.device, on_event: EventSink = ignore_events
    ) -> ResidentTargets:
        """Return the targets of ``mode`` for the tiles of ``rows``, on ``device``.

        Raises ``UsageError`` for targets that are not stored views of whole tiles, ``ResourceError`` with both numbers
        when they do not fit, before anything is copied.
        """
        if not isinstance(mode, CachedTargets) or mode.approximated:
            raise UsageError(
                "residency device holds stored views of whole tiles: it goes with targets cached, without "
                "augment.approximate_orientations; choose ram or stream"
            )
        specs = [s for by in mode.by_key.values() for o, s in by.items() if o in mode.geometry.orientations]
        need = len(set(rows)) * sum(_map_nbytes(mode, spec) for spec in specs)
        room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_nbytes()
        if room is not None and need > room:
            raise ResourceError(
                f"residency device: {len(specs)} arrays of {mode.store.shown} take {size(need)} of memory on {device}, "
                f"{size(room)} are available; choose residency ram or stream, or distil from fewer or smaller features "
                "(distill.keys, an int8 codec)"
            )
        return cls(mode, rows, device, on_event)

    def _filled(
        self, specs: dict[int, FeatureSpec], rows: Sequence[int], device: torch.device, on_event: EventSink
    ) -> tuple[Tensor, Tensor | None]:
        """Return all codes ``[orientations * rows * tokens, C]``, and scales where the codec has them."""
        store, spec = self.cached.store, next(iter(specs.values()))
        one = store.empty_codes(spec.key, 1)
        count, tokens = len(specs) * len(rows), one.values[0, ..., 0].size
        values = torch.empty(
            count * tokens, one.values.shape[-1], dtype=torch.from_numpy(one.values).dtype, device=device
        )
        scale = None if one.scale is None else torch.empty(count * tokens, dtype=torch.float16, device=device)
        step, start = max(1, _PIECE_NBYTES // one.nbytes), 0
        for entry in specs.values():
            if store.remote:
                store.will_read(entry.key, rows)
            for first in range(0, len(rows), step):
                codes = store.read_codes(entry.key, rows[first : first + step])
                stop = start + len(codes.values) * tokens
                values[start:stop] = torch.from_numpy(codes.values).flatten(0, 2)
                if scale is not None and codes.scale is not None:
                    scale[start:stop] = torch.from_numpy(codes.scale).flatten()
                start = stop
                on_event(Progress("hold", len(codes.values), codes.nbytes))
        return values, scale

    def row_of(self, tile_id: str) -> int:
        return self.cached.row_of(tile_id)

    def check_tiles(self, tile_ids: Iterable[str], data: Path) -> None:
        self.cached.check_tiles(tile_ids, data)

    def check_pixels(self, tile_id: str, image: NDArray[np.uint8]) -> None:
        self.cached.check_pixels(tile_id, image)

    def read(self, requests: Sequence[TargetRequest], empty: Allocator = page_empty) -> dict[str, Codes]:
        """Return ``{key: token numbers [n, h, w, 1] int64}``; the decoders of ``specs`` make features of them.

        Raises what ``CachedTargets.read`` raises.
        """
        found: dict[str, Codes] = {}
        source = self.cached.source_rows(requests)
        for key, block in self._blocks.items() if requests else ():
            first = np.empty((len(requests), 1, 1), np.int64)
            boxes = []
            for n, (row, request) in enumerate(zip(source, requests, strict=True)):
                spec = block.specs.get(request.orientation)
                if spec is None:
                    raise UsageError(
                        f"{key}: orientation {request.orientation} is not stored; have {sorted(block.specs)}"
                    )
                box = token_box(spec, request.box)
                height, width = spec.grid
                place = block.places[request.orientation] * block.maps + self._place[row]
                first[n] = place * height * width + box.y * width + box.x
                boxes.append((box.height, box.width, width))
            h, w, width = boxes[0]
            if any(other != boxes[0] for other in boxes):
                raise UsageError(f"{key}: the boxes of a batch are of one size")
            tokens = empty((len(requests), h, w, 1), np.dtype(np.int64))
            np.add(first, np.arange(h)[:, None] * width + np.arange(w), out=tokens[..., 0])
            found[key] = Codes(tokens)
        return found


def _map_nbytes(cached: CachedTargets, spec: FeatureSpec) -> int:
    return cached.store.empty_codes(spec.key, 1).nbytes
