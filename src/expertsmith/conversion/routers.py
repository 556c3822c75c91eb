"""A linear router, and the share of a layer's output energy that a choice of experts captures.

With u_ti = |a_i| ||column i of W_down|| (`groups.importance`), the energy of expert e for token t is the sum of u over its neurons.
Captured energy: the sum of u over all tokens and the neurons that ran (shared and chosen), divided by the sum over all neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from expertsmith.conversion.groups import importance, normalised
from expertsmith.conversion.split import Split, chosen

RIDGE = 1e-2  # times the mean square of the inputs
DELTA = 1e-6  # added inside the logarithm, times the mean energy


@torch.no_grad()
def expert_energy(u: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The energy [tokens, E] of every expert."""
    return torch.stack([u[:, ids].sum(-1) for ids in experts], -1)


@torch.no_grad()
def fit_linear(x: torch.Tensor, targets: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """The ridge solution [E, hidden]: R^T = (X^T X + lambda I)^-1 X^T T, lambda = ridge * mean diagonal of X^T X; computed in float64."""
    x64 = x.double()
    gram = x64.T @ x64
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    made: torch.Tensor = torch.linalg.solve(gram, x64.T @ targets.double()).T.float()
    return made


@torch.no_grad()
def make_router(kind: str, mlp: Any, x: torch.Tensor, experts: Sequence[torch.Tensor], seed: int = 0) -> torch.Tensor:
    """Router rows [E, hidden] for disjoint experts.

    ridge: least squares to log(energy + delta), standardised over the tokens, minus each token's mean over experts, which does not change
    the order. centroid: mean of the normalised gate rows (MoEfication's similarity router). gate_mean: mean of the gate rows
    (ExpertWeaver). random: seeded rows, the baseline. MoEfication's tanh MLP and CMoE's |up silu(gate)| of a representative neuron are not
    linear, so stock architectures cannot hold them.
    """
    gate = mlp.gate_proj.weight.float()
    if kind == "centroid":
        return torch.stack([normalised(gate[ids]).mean(0) for ids in experts])
    if kind == "gate_mean":
        return torch.stack([gate[ids].mean(0) for ids in experts])
    if kind == "random":
        return torch.randn(len(experts), x.shape[-1], generator=torch.Generator().manual_seed(seed))
    energy = expert_energy(importance(mlp, x), experts)
    target = (energy + DELTA * energy.mean().clamp_min(1e-30)).log()
    target = (target - target.mean(0)) / target.std(0).clamp_min(1e-6)
    return fit_linear(x, target - target.mean(-1, keepdim=True))


@torch.no_grad()
def representative_scores(mlp: Any, x: torch.Tensor, representatives: Sequence[int]) -> torch.Tensor:
    """CMoE's analytical router [tokens, E]: |(u^ x) silu(g^ x)| with the normalised rows of every expert's representative neuron."""
    gate, up = normalised(mlp.gate_proj.weight[list(representatives)]), normalised(mlp.up_proj.weight[list(representatives)])
    return ((x.float() @ up.T) * torch.nn.functional.silu(x.float() @ gate.T)).abs()


@torch.no_grad()
def measure(mlp: Any, x: torch.Tensor, split: Split, seed: int, representatives: Sequence[int] = ()) -> dict[str, Any]:
    """Captured energy of a layer by router (oracle: the best choice for every token, unknown to any router; random: a seeded draw), every
    expert's share of the tokens, and the standard deviation of the router's logits."""
    energy_all, captured = (
        0.0,
        dict.fromkeys(("oracle", "router", "centroid", "random", *(["representative"] if representatives else [])), 0.0),
    )
    count = torch.zeros(len(split.experts), dtype=torch.long)
    total = squares = 0.0
    generator = torch.Generator().manual_seed(seed)
    centroid = make_router("centroid", mlp, x, split.experts)
    for part in x.split(4096):  # type: ignore[no-untyped-call]
        u = importance(mlp, part)
        energy, always = expert_energy(u, split.experts), float(u[:, split.shared].sum())
        energy_all += float(u.sum())
        ours = chosen(split.router, part, split.top_k)
        count += ours.sum(0)
        logits = part.float() @ split.router.T
        total, squares = total + float(logits.double().sum()), squares + float((logits.double() ** 2).sum())
        choices = {
            "oracle": energy,
            "router": logits,
            "centroid": normalised(part) @ centroid.T,
            "random": torch.rand(energy.shape, generator=generator),
        }
        if representatives:
            choices["representative"] = representative_scores(mlp, part, representatives)
        for name, scores in choices.items():
            captured[name] += always + float(energy.gather(-1, scores.topk(split.top_k, -1).indices).sum())
    numbers = len(x) * len(split.experts)
    return {
        "captured": {name: value / max(energy_all, 1e-30) for name, value in captured.items()},
        "share": (count / (len(x) * split.top_k)).tolist(),
        "logit_std": max(0.0, squares / numbers - (total / numbers) ** 2) ** 0.5,
    }
