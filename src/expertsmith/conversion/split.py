"""The result of any conversion method for one MLP: the neurons of every expert, the neurons that always run, and a linear router.

A dense MLP is a sum over its neurons, so any set of them can be left out. With the activations a = act(gate x) * up x, a token that is
routed to experts S gets down(a * [neuron in shared or in an expert of S]). `sparse` applies exactly this to the dense model. It is
the reference for the written checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn


@dataclass
class Split:
    """One layer. Neuron ids are those of the dense MLP, ascending; experts may overlap (ToMoE) or partition the neurons (all others).

    A neuron of several chosen experts runs once, so in a written checkpoint with top_k > 1 experts must be disjoint.
    """

    experts: list[torch.Tensor]  # E of [width_e], int64
    shared: torch.Tensor  # [shared width], int64; no neuron is in both
    router: torch.Tensor  # [E, hidden], float32
    top_k: int

    @property
    def width(self) -> int:
        """The width of the widest expert."""
        return max(int(ids.numel()) for ids in self.experts)

    def members(self, width: int) -> torch.Tensor:
        """[E, width] bool: which neurons each expert has, without shared ones."""
        member = torch.zeros(len(self.experts), width, dtype=torch.bool)
        for row, ids in zip(member, self.experts, strict=True):
            row[ids] = True
        return member

    def core(self) -> Split:
        """The same function, with neurons of all experts moved to the shared part (card ToMoE, "shared-core export")."""
        total = 1 + max(int(ids.max()) for ids in (*self.experts, self.shared) if ids.numel())
        everywhere = self.members(total).all(0)
        experts = [ids[~everywhere[ids]] for ids in self.experts]
        shared = torch.cat([self.shared, everywhere.nonzero().flatten()]).sort().values
        return Split(experts, shared, self.router, self.top_k)

    def whole(self) -> Split:
        """The same function, with the shared part copied into every expert; needs top_k = 1."""
        experts = [torch.cat([self.shared, ids]).sort().values for ids in self.experts]
        return Split(experts, self.shared[:0], self.router, self.top_k)


def mlps_of(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The dense MLPs (gate_proj, up_proj, down_proj, act_fn) of decoder layers."""
    return [layer.mlp for layer in layers]  # type: ignore[misc]


def activations(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """act(gate x) * up x, [..., neurons]."""
    made: torch.Tensor = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return made


def chosen(router: torch.Tensor, x: torch.Tensor, top_k: int) -> torch.Tensor:
    """[..., E] bool: the experts with the highest router logits, computed in float32."""
    logits = nn.functional.linear(x.float(), router.float())
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(top_k, -1).indices, True)


def token_mask(split: Split, x: torch.Tensor, neurons: int, picked: torch.Tensor | None = None) -> torch.Tensor:
    """[..., neurons] in x's dtype: 1 for the neurons that a token runs. `picked` [..., E] bool: its experts, else the router's choice."""
    member = split.members(neurons).to(x)
    if picked is None:
        picked = chosen(split.router.to(x.device), x, split.top_k)
    mask = (picked.to(x) @ member).clamp_(max=1)
    mask[..., split.shared.to(x.device)] = 1
    return mask


@contextmanager
def sparse(layers: Sequence[nn.Module], splits: Mapping[int, Split]) -> Iterator[None]:
    """Run the dense model with the MLPs of `splits` (decoder layer → split) restricted to the neurons of each token's experts."""
    mlps = mlps_of(layers)
    try:
        for index, split in splits.items():
            mlps[index].forward = partial(sparse_forward, mlps[index], split)  # type: ignore[method-assign]
        yield
    finally:
        for index in splits:
            mlps[index].__dict__.pop("forward", None)


def sparse_forward(mlp: Any, split: Split, x: torch.Tensor, picked: torch.Tensor | None = None) -> torch.Tensor:
    """The MLP's output with only the neurons of each token's experts (`token_mask`)."""
    a = activations(mlp, x)
    made: torch.Tensor = mlp.down_proj(a * token_mask(split, x, a.shape[-1], picked))
    return made
