"""The inputs of the static measures for one layer: matrices of the experts, router rows, shared experts, and a dense model's FFN.

Every matrix has one row per neuron: gate and up are [neurons, inputs] as stored, down is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from expertsmith.arch.base import split
from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.floats import floats
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.experts.weights import FLOATS, Projections, is_matrix, refuse_damaged

SHARED = re.compile(r"(?:^|\.)(?:shared_experts?|shared_mlp)\.(?P<leaf>\w+)(?:\.weight)?$")
DENSE = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(?P<layer>\d+)\.(?:mlp|feed_forward|ffn)\.(?P<leaf>\w+)\.weight$")
ROLES = {
    "gate_proj": "gate", "linear_gate": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down",
    "output_linear": "down", "gate_up_proj": "gate_up", "input_linear": "gate_up",
}  # fmt: skip


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one MoE layer."""

    inventory: Inventory
    layer: int
    dense: DenseModel | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles among "gate", "up" and "down" that the experts have."""
        return Projections(self.inventory, self.layer).roles

    @property
    def count(self) -> int:
        """Routed experts."""
        return self.inventory.experts_in(self.layer)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds the experts' matrices without loss."""
        stored = {claim.info.dtype for claim in self.inventory.floats.expert_claims(self.layer)[0] if is_matrix(claim)}
        return torch.bfloat16 if stored == {"BF16"} else torch.float16 if stored == {"F16"} else torch.float32

    def experts(self, role: str) -> Iterator[torch.Tensor]:
        """Yield the routed experts' matrices [neurons, width] in ascending order, float32.

        Raises:
            UserError: NaN or inf.
        """
        for matrix in Projections(self.inventory, self.layer).of(role):
            value = torch.from_numpy(matrix)
            yield value.T if role == "down" else value

    def router(self) -> torch.Tensor:
        """The router rows [experts, hidden] of the routed experts, float32. A router with several layers is represented by its last one.

        Raises:
            UserError: NaN or inf, or no such matrix.
        """
        for claim in self.inventory.floats.by_layer[self.layer]:
            if claim.entry is not None and claim.entry.role == "router" and len(claim.info.shape) == 2 and claim.row_axis == 0:
                return _finite(self.inventory.floats.checkpoint, claim.info.name)[: self.count]
        raise UserError(f"decoder layer {self.layer} has no router matrix")

    def shared(self) -> dict[str, torch.Tensor]:
        """The shared experts' matrices by role; several experts are concatenated. Empty if the family has none."""
        names = {}
        for claim in self.inventory.floats.by_layer[self.layer]:
            found = SHARED.search(claim.rest) if claim.kind == "other" else None
            if found and found["leaf"] in ROLES and claim.info.dtype in FLOATS:
                names[found["leaf"]] = claim.info.name
        return _by_role(self.inventory.floats.checkpoint, names)

    def dense_ffn(self) -> dict[str, torch.Tensor]:
        """The matrices of the dense model's FFN at the same depth, by role; empty without a dense model or such a layer."""
        return self.dense.ffn(self.layer) if self.dense else {}


@dataclass(frozen=True)
class DenseModel:
    """A dense checkpoint for comparing the experts with its FFNs."""

    checkpoint: Checkpoint

    def layers(self) -> dict[int, dict[str, str]]:
        """Decoder layer → leaf → tensor name."""
        found: dict[int, dict[str, str]] = {}
        for name, info in self.checkpoint.tensors.items():
            place = DENSE.search(name)
            if place and place["leaf"] in ROLES and info.dtype in FLOATS:
                found.setdefault(int(place["layer"]), {})[place["leaf"]] = name
        return found

    def ffn(self, layer: int) -> dict[str, torch.Tensor]:
        """Matrices of one layer by role, [neurons, width], float32."""
        return _by_role(self.checkpoint, self.layers().get(layer, {}))


def dense_model(checkpoint: Checkpoint, hidden: int) -> DenseModel:
    """Open a dense model for comparison.

    Raises:
        UserError: no known FFN in it, or another hidden size.
    """
    made = DenseModel(floats(checkpoint))
    layers = made.layers()
    if not layers:
        raise UserError(
            f"{checkpoint.source} has no dense FFN (layers.N.mlp.{{gate,up,down}}_proj) to compare with",
            "--dense needs a dense model such as a Llama, Mistral or Qwen checkpoint",
        )
    name = next(iter(next(iter(layers.values())).values()))
    if hidden not in checkpoint.tensors[name].shape:
        raise UserError(
            f"{checkpoint.source} has a different hidden size: {name} is {list(checkpoint.tensors[name].shape)}, the experts work on {hidden}",
            "compare with a dense model of the same hidden size",
        )
    return made


def _by_role(checkpoint: Checkpoint, names: dict[str, str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for leaf, name in names.items():
        matrix = _finite(checkpoint, name)
        role = ROLES[leaf]
        if matrix.dim() == 3:  # several shared experts: concatenate them
            matrix = matrix.transpose(1, 2).reshape(-1, matrix.shape[1]).T if role == "down" else matrix.flatten(0, 1)
        if role == "gate_up":
            found.update(split("gate_up", matrix))
        else:
            found[role] = matrix.T if role == "down" else matrix
    return found


def _finite(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    value = checkpoint.read(name).float()
    refuse_damaged(value, name)
    return value
