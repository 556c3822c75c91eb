"""The routed experts' weight matrices of a layer, straight from the checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from expertsmith.arch import config_get
from expertsmith.errors import UserError
from expertsmith.inventory import Claim, Inventory
from expertsmith.methods.base import ExpertWeights

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "F16", "BF16", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")


def expert_weights(inventory: Inventory, layer: int) -> Iterator[ExpertWeights]:
    """Experts in ascending order; every matrix (two axes or more) that belongs to the expert, biases and scales left out.

    FP8 weights with block scales (`…weight_scale_inv`) are dequantised first.

    Raises:
        UserError: NaN or inf, or a packed quantised format whose codes mean nothing by themselves.
    """
    cache: dict[str, torch.Tensor] = {}
    for expert, claims in enumerate(inventory.expert_claims(layer)):
        found = (_matrix(inventory, claim, expert, cache) for claim in claims)
        matrices = [matrix for matrix in found if matrix is not None]
        if not matrices:
            raise UserError(f"decoder layer {layer}: expert {expert} has no weight matrix")
        yield ExpertWeights(expert, tuple(matrices))


def _matrix(inventory: Inventory, claim: Claim, expert: int, cache: dict[str, torch.Tensor]) -> np.ndarray | None:
    info = claim.info
    if info.name.endswith(("_scale_inv", "_scale")) or (claim.kind == "expert" and len(info.shape) < 2):
        return None
    if info.dtype not in FLOATS + FP8:
        raise UserError(
            f"{info.name} is packed ({info.dtype}): its codes cannot be scored",
            "use a checkpoint in float, bfloat16 or FP8, or a method that reads data",
        )
    if claim.kind == "expert":
        tensor = inventory.checkpoint.read(info.name)
    else:
        if info.name not in cache:
            cache[info.name] = inventory.checkpoint.read(info.name)
        tensor = cache[info.name][expert * claim.rows : (expert + 1) * claim.rows]
        tensor = tensor.reshape(-1, tensor.shape[-1]) if claim.rows == 1 and tensor.dim() == 3 else tensor
        if tensor.shape[0] == 1:
            return None  # one row an expert: a bias or a scale
    values = tensor.float()
    if info.dtype in FP8:
        values = values * _block_scales(inventory, claim, expert, values.shape)
    array = values.numpy()
    if not np.isfinite(array).all():
        raise UserError(f"{info.name} has NaN or inf", "the checkpoint is damaged: download it again")
    return array


def _block_scales(inventory: Inventory, claim: Claim, expert: int, shape: tuple[int, ...]) -> torch.Tensor:
    name, scale_name = claim.info.name, f"{claim.info.name}_scale_inv"
    if scale_name not in inventory.checkpoint.tensors:
        raise UserError(f"{name} is FP8, but {scale_name} is missing")
    scales = inventory.checkpoint.read(scale_name).float()
    if claim.kind == "stacked" and scales.dim() == 3:
        scales = scales[expert]
    if scales.dim() != 2:
        raise UserError(f"{scale_name} has shape {list(scales.shape)}: only scales of two-dimensional blocks are known")
    blocks = config_get(inventory.checkpoint.config, "quantization_config.weight_block_size") or (128, 128)
    rows = scales.repeat_interleave(int(blocks[0]), 0)[: shape[0]]
    return rows.repeat_interleave(int(blocks[1]), 1)[:, : shape[1]]
