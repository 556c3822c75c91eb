"""The routed experts' weight matrices of a layer, straight from the checkpoint, one expert in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from expertsmith.arch.base import Layout, roles_of, split
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Claim, Inventory

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class ExpertWeights:
    """The weight matrices of one expert, in float32 (with any names)."""

    expert: int
    matrices: tuple[np.ndarray[Any, Any], ...]


def expert_weights(inventory: Inventory, layer: int) -> Iterator[ExpertWeights]:
    """Yield the experts in ascending order with all their matrices, in float32, decoded if they are quantised; without biases.

    Raises:
        UserError: NaN or inf.
    """
    inventory = inventory.floats
    for expert, claims in enumerate(inventory.expert_claims(layer)):
        found = (matrix_of(inventory, claim, expert) for claim in claims)
        matrices = tuple(matrix.numpy() for matrix in found if matrix is not None)
        if not matrices:
            raise UserError(f"decoder layer {layer}: expert {expert} has no weight matrix")
        yield ExpertWeights(expert, matrices)


@dataclass(frozen=True)
class Projections:
    """The experts' matrices of one layer by role ("gate" if the family has one, "up", "down"), read on demand."""

    inventory: Inventory
    layer: int

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that this family's experts have."""
        held = {role for claim in self._claims(0) for role in _roles(claim, self.inventory)}
        return tuple(role for role in ("gate", "up", "down") if role in held)

    def of(self, role: str) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the matrices of the experts in ascending order: gate and up [neurons, inputs], down [outputs, neurons], float32."""
        for expert in range(len(self.inventory.expert_claims(self.layer))):
            for claim in self._claims(expert):
                if role not in _roles(claim, self.inventory):
                    continue
                matrix = matrix_of(self.inventory.floats, claim, expert)
                if matrix is not None:
                    layout = layout_of(claim, self.inventory)
                    assert layout is not None
                    yield split(layout, matrix)[role].numpy()

    def _claims(self, expert: int) -> list[Claim]:
        return [claim for claim in self.inventory.floats.expert_claims(self.layer)[expert] if is_matrix(claim)]


def neurons_in(inventory: Inventory, layer: int) -> int:
    """The number of neurons of each of a layer's experts: rows of the up projection.

    Raises:
        UserError: experts whose projections are not known.
    """
    floats = inventory.floats
    for claim in floats.expert_claims(layer)[0]:
        layout = layout_of(claim, floats) if is_matrix(claim) else None
        if layout is not None and "up" in roles_of(layout):
            shape = part_shape(claim)
            return shape[-1 if layout.endswith("_t") else 0] // len(roles_of(layout))
    raise UserError(f"decoder layer {layer}: the experts' up projection was not found", "please report this checkpoint")


def part_shape(claim: Claim) -> tuple[int, ...]:
    """The shape of one expert's part of a tensor."""
    if claim.kind == "expert":
        return claim.info.shape
    below = claim.info.shape[claim.row_axis + 1 :]
    return (claim.rows, *below) if claim.rows > 1 or not below else below


def layout_of(claim: Claim, inventory: Inventory) -> Layout | None:
    """The layout of an expert's projections in the tensor."""
    return inventory.layout(claim)


def _roles(claim: Claim, inventory: Inventory) -> tuple[str, ...]:
    layout = layout_of(claim, inventory)
    if layout is None:
        raise UserError(
            f"{claim.info.name}: unknown expert projection",
            "please report this checkpoint",
        )
    return roles_of(layout)


def is_matrix(claim: Claim) -> bool:
    """Whether the tensor holds expert matrices, not biases."""
    if claim.kind == "expert":
        return len(claim.info.shape) >= 2
    return claim.rows > 1 or len(claim.info.shape) > 2  # one row an expert is a bias


def matrix_of(inventory: Inventory, claim: Claim, expert: int) -> torch.Tensor | None:
    """One expert's matrix in float32, or None for a bias.

    Raises:
        UserError: NaN or inf, or a dtype that is not a float.
    """
    if not is_matrix(claim):
        return None
    info = claim.info
    if info.dtype not in FLOATS:
        raise UserError(f"{info.name} is {info.dtype}: this dtype is not for weights", "please report this checkpoint")
    values = inventory.rows(claim, expert).float()
    refuse_damaged(values, info.name)
    return values


def refuse_damaged(values: torch.Tensor, name: str) -> None:
    """Refuse NaN or inf. The sum of any such tensor is NaN or inf, and takes a fraction of the time of a look at every value.

    Raises:
        UserError: there are some.
    """
    import torch

    if not bool(torch.isfinite(values.sum(dtype=torch.float32))) and not bool(values.isfinite().all()):
        raise UserError(f"{name} has NaN or inf", "the checkpoint is damaged; download it again")
