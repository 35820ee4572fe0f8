"""Weights of DINOv2 and DINOv3 as their authors released them (``.pth``), under timm's names.

For teachers and students alike. Nothing is resampled or cut: shapes stay as they are in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["in_timm_layout"]


def in_timm_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a released DINOv2 or DINOv3 file under timm's names; timm's own pass through.

    DINOv2: timm has no mask token, calls the gated MLP's layers ``fc1`` and ``fc2``, and, with registers, folds the
    class token's position embedding into the class token. DINOv3: ``storage_tokens`` are registers, positions are
    computed, the bias of the keys is masked to 0 and left out; ``q_bias`` and ``v_bias`` come out in any case, and are
    all 0 in the files of the networks that timm builds without them.
    """
    if "storage_tokens" in tensors:
        return _dinov3(tensors)
    out = {
        re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", name)): tensor
        for name, tensor in tensors.items()
        if name != "mask_token"
    }
    if "register_tokens" in out and {"cls_token", "pos_embed"} <= out.keys():
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


_DINOV3 = (("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"),
           ("mlp.w1.", "mlp.fc1_g."), ("mlp.w2.", "mlp.fc1_x."), ("mlp.w3.", "mlp.fc2."))  # fmt: skip


def _dinov3(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "mask_token" or name.startswith("local_cls_norm") or name.endswith((".periods", ".bias_mask")):
            continue  # of pre-training, or computed
        if name.endswith("attn.qkv.bias"):
            query, _, value = torch.chunk(tensor, 3)
            out[name.replace("qkv.bias", "q_bias")] = query.clone()
            out[name.replace("qkv.bias", "v_bias")] = value.clone()
            continue
        for theirs, timms in _DINOV3:
            name = name.replace(theirs, timms)
        out[name] = tensor
    return out
