"""A training-free start for ToMoE's masks: co-cluster tokens and neurons from one forward pass over calibration text.

In each layer, u_ti = |a_ti| ||column i of W_down|| is the importance of neuron i for token t. From a balanced first split of the tokens,
repeat in turns:

    expert e takes the w neurons with the largest sum of u^2 over its tokens; every token goes to the expert that holds most of its u^2.

Then fit a linear router (ridge) to the assignment, and choose the experts once more from the tokens that this router sends them. This is
ours; the published start is a dense model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expertsmith.conversion.groups import importance
from expertsmith.conversion.routers import fit_linear
from expertsmith.conversion.sampling import EVEN

ROUNDS = 8
SPREAD = 1.0  # standard deviation of the start's mask logits
LOGIT_STD = 4.0  # of the router's logits: well above the router's Gumbel noise (1.28), far below certain choices


@dataclass
class Start:
    """One layer: mask logits [E, neurons] and router rows [E, hidden]."""

    logits: torch.Tensor
    router: torch.Tensor


@torch.no_grad()
def start_layer(mlp: Any, x: torch.Tensor, experts: int, width: int, seed: int) -> Start:
    """Masks and router of one layer from its MLP's inputs x [tokens, hidden]."""
    energy = importance(mlp, x).square_()
    tokens, neurons = energy.shape
    energy /= energy.sum(-1, keepdim=True).clamp_min(1e-30)  # every token has the same weight
    router = torch.zeros(1, x.shape[-1])
    if experts > 1:
        owner = _first_owners(x, experts, seed)
        for _ in range(ROUNDS):
            scores = energy @ _top(_sums(energy, owner, experts), width).float().T  # [tokens, E]
            owner = scores.argmax(-1)
            _refill(owner, scores, experts)
        targets = torch.nn.functional.one_hot(owner, experts).float()
        router = fit_linear(x, targets - targets.mean(0))
        logits = x.float() @ router.T
        router *= LOGIT_STD / logits.std().clamp_min(1e-12)
        owner = logits.argmax(-1)
    else:
        owner = torch.zeros(tokens, dtype=torch.long)
    sums = _sums(energy, owner, experts)
    sums += 0.02 * sums.sum(0, keepdim=True) + 1e-12  # add a little of what all tokens use, for experts with few tokens
    level = sums.log()
    edge = level.topk(min(width + 1, neurons), -1).values[:, -2:].mean(-1, keepdim=True)  # `width` neurons are above it
    spread = level.std(-1, keepdim=True).clamp_min(1e-6)
    return Start(EVEN + SPREAD * ((level - edge) / spread).clamp(-3, 3), router)


def _sums(energy: torch.Tensor, owner: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(experts, energy.shape[-1]).index_add_(0, owner, energy)


def _top(sums: torch.Tensor, width: int) -> torch.Tensor:
    return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, sums.topk(width, -1).indices, True)


def _first_owners(x: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """A balanced first split of the tokens by random directions in standardised input space; all experts get an equal share."""
    generator = torch.Generator().manual_seed(seed)
    centred = x.float() - x.float().mean(0)
    centred /= centred.std(0).clamp_min(1e-12)
    scores = centred @ torch.randn(x.shape[-1], experts, generator=generator)
    owner = torch.full((len(x),), -1)
    room = -(-len(x) // experts)
    for expert in range(experts):
        free = (owner < 0).nonzero().flatten()
        take = scores[free, expert].topk(min(room, len(free))).indices
        owner[free[take]] = expert
    return owner


def _refill(owner: torch.Tensor, scores: torch.Tensor, experts: int) -> None:
    """Fill experts with less than a quarter of an even share, in place, with the tokens that lose least by the change."""
    least = max(1, len(owner) // (4 * experts))
    counts = torch.bincount(owner, minlength=experts)
    for expert in (counts < least).nonzero().flatten().tolist():
        loss = scores.gather(-1, owner[:, None]).squeeze(-1) - scores[:, expert]
        loss[(owner == expert) | (torch.bincount(owner, minlength=experts)[owner] <= least)] = float("inf")
        owner[loss.topk(min(least - int(counts[expert]), len(owner)), largest=False).indices] = expert
