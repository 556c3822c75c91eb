"""The routed experts' weight matrices of a layer, straight from the checkpoint, one expert in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from expertsmith.arch import config_get
from expertsmith.arch.base import Layout
from expertsmith.errors import UserError
from expertsmith.inventory import Claim, Inventory
from expertsmith.methods.base import ExpertWeights

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "F16", "BF16", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")


def expert_weights(inventory: Inventory, layer: int) -> Iterator[ExpertWeights]:
    """Experts in ascending order with all their matrices, in float32; biases and scales left out.

    FP8 weights with block scales (`…weight_scale_inv`) are dequantised first.

    Raises:
        UserError: NaN or inf, or a packed quantised format whose codes mean nothing by themselves.
    """
    for expert, claims in enumerate(inventory.expert_claims(layer)):
        found = (matrix_of(inventory, claim, expert) for claim in claims)
        matrices = tuple(matrix.numpy() for matrix in found if matrix is not None)
        if not matrices:
            raise UserError(f"decoder layer {layer}: expert {expert} has no weight matrix")
        yield ExpertWeights(expert, matrices)


@dataclass(frozen=True)
class Projections:
    """The experts' matrices of one layer by role ("gate" where the family has one, "up", "down"), read when they are asked for."""

    inventory: Inventory
    layer: int

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that this family's experts have."""
        held = {role for claim in self._claims(0) for role in _roles(claim, self.inventory)}
        return tuple(role for role in ("gate", "up", "down") if role in held)

    def of(self, role: str) -> Iterator[np.ndarray[Any, Any]]:
        """Experts in ascending order: gate and up [neurons, inputs], down [outputs, neurons], float32."""
        for expert in range(len(self.inventory.expert_claims(self.layer))):
            for claim in self._claims(expert):
                if role not in _roles(claim, self.inventory):
                    continue
                matrix = matrix_of(self.inventory, claim, expert)
                if matrix is not None:
                    layout = layout_of(claim, self.inventory)
                    assert layout is not None
                    yield split(layout, matrix)[role].numpy()

    def _claims(self, expert: int) -> list[Claim]:
        return [claim for claim in self.inventory.expert_claims(self.layer)[expert] if is_matrix(claim)]


def layout_of(claim: Claim, inventory: Inventory) -> Layout | None:
    """How the tensor holds the projections of an expert."""
    return inventory.architecture.layout_of(claim.rest)


def _roles(claim: Claim, inventory: Inventory) -> tuple[str, ...]:
    layout = layout_of(claim, inventory)
    if layout is None:
        raise UserError(
            f"{claim.info.name}: it is not known which projection of an expert this is",
            "use an unquantised checkpoint, or please report this one",
        )
    return ("gate", "up") if layout.startswith(("gate_up", "alternating")) else (layout.removesuffix("_t"),)


def split(layout: Layout, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of one expert's matrix (or bias) by role: gate and up [neurons, inputs], down [outputs, neurons]; biases [neurons], [outputs].

    Writing into a view writes into the tensor.
    """
    if layout.endswith("_t") and tensor.dim() == 2:
        tensor = tensor.T
    if layout.startswith("gate_up"):
        half = tensor.shape[0] // 2
        return {"gate": tensor[:half], "up": tensor[half:]}
    if layout.startswith("alternating"):
        return {"gate": tensor[::2], "up": tensor[1::2]}
    return {layout.removesuffix("_t"): tensor}


def is_scale(claim: Claim) -> bool:
    """Whether the tensor holds quantisation scales of another one."""
    return claim.info.name.endswith(("_scale_inv", "_scale"))


def is_matrix(claim: Claim) -> bool:
    """Whether the tensor holds expert matrices: no bias, no scale."""
    if is_scale(claim):
        return False
    if claim.kind == "expert":
        return len(claim.info.shape) >= 2
    return claim.rows > 1 or len(claim.info.shape) > 2  # one row an expert is a bias


def slice_of(inventory: Inventory, claim: Claim, expert: int) -> torch.Tensor:
    """What a tensor holds of one expert, in its own dtype: the whole of a per-expert tensor, [rows, …] or its entry of a stacked one."""
    if claim.kind == "expert":
        return inventory.checkpoint.read(claim.info.name)
    if claim.row_axis == 1:  # [1, experts]
        return inventory.checkpoint.read(claim.info.name)[0, expert * claim.rows : (expert + 1) * claim.rows]
    part = inventory.checkpoint.read(claim.info.name, expert * claim.rows, (expert + 1) * claim.rows)
    return part[0] if claim.rows == 1 and part.dim() > 1 else part


def matrix_of(inventory: Inventory, claim: Claim, expert: int) -> torch.Tensor | None:
    """One expert's matrix in float32, or None for a bias or scale.

    Raises:
        UserError: NaN or inf, or packed codes.
    """
    if not is_matrix(claim):
        return None
    info = claim.info
    if info.dtype not in FLOATS + FP8:
        raise UserError(
            f"{info.name} is packed ({info.dtype}): its codes cannot be scored",
            "use a checkpoint in float, bfloat16 or FP8, or a method that reads data",
        )
    values = slice_of(inventory, claim, expert).float()
    if info.dtype in FP8:
        values = values * _block_scales(inventory, claim, expert, values.shape)
    if not bool(values.isfinite().all()):
        raise UserError(f"{info.name} has NaN or inf", "the checkpoint is damaged: download it again")
    return values


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
