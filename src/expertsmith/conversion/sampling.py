"""Straight-through Gumbel masks: the random part of ToMoE (arXiv 2501.15316), shared by its MLP and attention modules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

NOISE, HALF = 32, 64  # hypernetwork: input width, hidden width of either direction
EMBEDDING = 2 * HALF
TAU, BIAS = 0.4, 3.0
EVEN = math.log(math.log(2)) - BIAS  # the mask logit at which P(m = 1) = 1/2


def gumbel(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise, drawn on the CPU so that every device and rank sees the same numbers."""
    draw = torch.empty(tuple(shape)).exponential_(generator=generator)
    return -draw.clamp_min_(1e-30).log_().to(device)


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """`hard` in the forward pass, the gradient of `soft` in the backward pass."""
    return hard + soft - soft.detach()


def sample_mask(q: torch.Tensor, noise: torch.Tensor, eta: float) -> torch.Tensor:
    """m = round(sigmoid((q + eta G + b) / tau)), straight-through. `noise`: G, with the shape of q."""
    soft = torch.sigmoid((q + eta * noise + BIAS) / TAU)
    return straight_through((soft > 0.5).to(soft.dtype), soft)


def keep_probability(q: torch.Tensor) -> torch.Tensor:
    """P(m = 1) with full noise: 1 - exp(-exp(q + b)). At q = 0 it is 1 - 2e-9, so training without a start begins dense."""
    return -torch.expm1(-torch.exp(q + BIAS))


def seeded(module: nn.Module, generator: torch.Generator) -> None:
    """Apply torch's default initialisation, drawn from `generator`: the same on every rank, whatever was drawn before."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.GRU):
                for weight in part.parameters():
                    weight.uniform_(-(HALF**-0.5), HALF**-0.5, generator=generator)
            elif isinstance(part, nn.Linear):
                bound = part.in_features**-0.5
                part.weight.uniform_(-bound, bound, generator=generator)
