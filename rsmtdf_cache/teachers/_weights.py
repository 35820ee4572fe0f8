"""Weights: from a file, from a hub, or from a seed; checked key by key before they are used, and digested after."""

from __future__ import annotations

import hashlib
import os
import pickle
import urllib.error
import urllib.request
import weakref
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError
from rsmtdf_cache.teachers._digests import Stamp, find_digest, keep_digest, stamp_of, state_mark
from rsmtdf_cache.teachers.base import TeacherRequest

__all__ = [
    "fit_weights",
    "hub_file",
    "read_weights",
    "seed_weights",
    "take_weights",
    "usable_device",
    "weights_digest",
]

_FILE_HINT = "give a safetensors file, or a torch file that holds tensors only"

#: Networks that hold one file's weights and nothing else: the file, what was asked for, and the tensors' state then.
_filled: weakref.WeakKeyDictionary[nn.Module, tuple[Stamp, str, tuple[Any, ...]]] = weakref.WeakKeyDictionary()


def usable_device(device: str | torch.device) -> torch.device:
    """Return ``device`` as a ``torch.device``.

    Raises ``UsageError`` for a name that is no device, ``ResourceError`` when this machine does not have it.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device}: no such kind of device; use cpu, cuda or cuda:1") from None
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"device {device}: not usable here ({reason}); choose cpu or another device") from None
    return found


def weights_digest(network: nn.Module) -> str:
    """Return the sha256 over name, dtype, shape and bytes of every tensor of the state dict, sorted by name.

    Counters of training batches are left out: they change no feature, and published files differ in them. For a network
    that holds a file's weights untouched (``take_weights``) the digest is looked up, if it was computed before.
    """
    stamp, asked, mark = _filled.get(network, (None, "", ()))
    if stamp is None or mark != state_mark(network):
        return _hash_state(network)
    digest = find_digest(stamp, network, asked)
    if digest is None:
        digest = _hash_state(network)
        keep_digest(stamp, network, asked, digest)
    return digest


def _hash_state(network: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        data = tensor.detach().cpu().contiguous()
        total.update(f"{name}|{str(data.dtype).removeprefix('torch.')}|{tuple(data.shape)}|".encode())
        total.update(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def seed_weights(network: nn.Module, seed: int) -> None:
    """Fill ``network`` in place with weights that are a function of (seed, parameter name, shape) alone.

    Matrices and kernels: uniform with standard deviation ``gain / sqrt(fan_in)``, gain 1 for linear layers and
    sqrt(2) for convolutions; other randomly initialised parameters (tokens, position embeddings): standard deviation
    0.02. What the architecture sets to a constant (biases, norms) stays, except layer scales far below one, which
    become 1 so that every block takes part. Integer arithmetic and one rounding: the same bits on every machine.
    """
    owners = dict(network.named_modules())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            first = parameter.reshape(-1)[0]
            if bool((parameter == first).all()):
                if 0 < abs(float(first)) < 1e-2:
                    parameter.fill_(1.0)
                continue
            owner, _, leaf = name.rpartition(".")
            std = 0.02
            if parameter.ndim > 1 and leaf.endswith("weight"):
                gain = 2.0 if isinstance(owners[owner], nn.Conv2d) else 1.0
                std = (gain / float(np.prod(parameter.shape[1:]))) ** 0.5
            key = hashlib.sha256(f"{seed}|{name}|{tuple(parameter.shape)}".encode()).digest()
            raw = np.random.PCG64(int.from_bytes(key[:16], "little")).random_raw(parameter.numel())
            unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
            unit *= np.float32(std * 3.0**0.5)
            parameter.copy_(torch.from_numpy(unit).view(parameter.shape))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch file by name, without wrappers (``state_dict``, ``module.``).

    Code in a file is never run. Raises ``ResourceError`` for a file that is missing, unreadable or holds code,
    ``MismatchError`` for one without named tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise ResourceError(f"weights {file}: no such file; {_FILE_HINT}")
    try:
        content = _read(file)
    except pickle.UnpicklingError:
        raise ResourceError(f"weights {file}: holds pickled code, which is never run; {_FILE_HINT}") from None
    except ResourceError:
        raise
    except Exception as error:  # the two readers raise many kinds for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ResourceError(f"weights {file}: cannot be read ({reason}); {_FILE_HINT}") from None
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise MismatchError(f"weights {file}: holds no named tensors (found {type(content).__name__}); {_FILE_HINT}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any("/code/" in entry or entry.endswith("constants.pkl") for entry in archive.namelist()):
                raise ResourceError(
                    f"weights {file}: a TorchScript archive, which holds code; if you trust it, convert it once: "
                    f"python -c \"import torch; torch.save(torch.jit.load('{file.name}', map_location='cpu')"
                    f".state_dict(), 'converted.pt')\" and give the converted file"
                )
    return torch.load(file, map_location="cpu", weights_only=True)


def take_weights(
    request: TeacherRequest,
    network: nn.Module,
    published: Callable[[], tuple[Path, str]],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    spare: Sequence[str] = (),
) -> str:
    """Fill ``network`` as ``request`` asks and return where its weights came from, for people.

    ``published`` returns the family's own file and its origin; ``convert`` gives a file's tensors the network's names;
    ``spare``: see ``fit_weights``. Raises ``ResourceError`` and ``MismatchError``.
    """
    if request.weights == "none":
        seed_weights(network, request.seed)
        return f"seed {request.seed}"
    path, origin = published() if request.weights is None else (Path(request.weights), "")
    before = stamp_of(path) if path.is_file() else None
    fit_weights(network, convert(read_weights(path)), request.name, spare)
    if before is not None and before == stamp_of(path):  # else the file was exchanged while it was read
        _filled[network] = (before, request.name, state_mark(network))
    return origin or f"file {path.name}"


def fit_weights(network: nn.Module, tensors: Mapping[str, Tensor], asked: str, spare: Sequence[str] = ()) -> None:
    """Copy ``tensors`` into ``network``: all it needs, and nothing left over but names that start with ``spare``.

    ``asked`` names teacher and source for the message. Raises ``MismatchError`` that lists the first keys and shapes
    that do not fit; nothing is copied then.
    """
    own = network.state_dict()
    faults = [f"{name} is missing" for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, needs {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    faults += [f"{name} is not part of the network" for name in tensors if name not in own and not _starts(name, spare)]
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise MismatchError(
            f"{asked}: the weights do not fit the network: {shown}. Give the weights of this very network"
        )
    network.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)


def _starts(name: str, prefixes: Collection[str]) -> bool:
    return any(name.startswith(prefix) for prefix in prefixes)


def hub_file(teacher: str, repository: str, filenames: Sequence[str]) -> Path:
    """Return the local path of the first of ``filenames`` that ``repository`` of the Hugging Face hub has.

    A file in the local cache is taken without asking the network. Raises ``ResourceError`` with the download command
    and the ``weights=FILE`` way; asks whether the hub answers at all first, because the client retries for a minute.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for filename in filenames:
        cached = try_to_load_from_cache(repository, filename)
        if isinstance(cached, str) and os.path.isfile(cached):
            return Path(cached)
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(str(constants.ENDPOINT))
    for filename in () if reason else filenames:
        try:
            return Path(hf_hub_download(repository, filename))
        except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError, but means: no network
            reason = _first_line(error)
            break
        except EntryNotFoundError:
            reason = f"it has none of {', '.join(filenames)}"
        except Exception as error:  # the client lets errors of several HTTP libraries through
            reason = _first_line(error)
            break
    raise ResourceError(
        f"teacher {teacher}: its published weights are not on this machine, and {repository} on {constants.ENDPOINT} "
        f"could not be read ({reason}). On a machine with network run: hf download {repository} {filenames[0]} ; "
        f"then give that file as weights=FILE (pretrained=none,seed=N makes random weights, for tests)"
    )


def _unreachable(url: str) -> str:
    """Return why ``url`` does not answer within some seconds, or an empty text."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=8).close()
    except urllib.error.HTTPError:
        return ""  # any answer of the server is an answer
    except (OSError, ValueError) as error:
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
