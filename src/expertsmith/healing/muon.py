"""Muon: descend with steps that are as long in every direction of a matrix, and relative to its size.

    M <- MOMENTUM M + G,    W <- W - rate rms(W_0) sqrt(max(rows, columns)) orth(G + MOMENTUM M)

G is the gradient of a matrix W [..., rows, columns], W_0 its start, and orth(X) = U V^T with X = U S V^T, roughly, by Newton-Schulz iterations. The
entries of sqrt(max(rows, columns)) orth(X) have a root mean square of about 1 (arXiv 2502.16982, section 2.2), so `rate` is the share of its
own size that a matrix moves in a step, whatever the model's scale. Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
Rows and columns of zeros, which fill up narrower experts (`engine.narrow`), get no gradient and do not count in rms, rows and columns.
Vectors, biases and router rows are no such maps: they take Adam's steps, of rate rms(W_0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

MOMENTUM = 0.95
BETAS = (0.9, 0.95)  # of Adam; with a few hundred steps, a longer memory of squared gradients was worse
SCHULZ = (3.4445, -4.7750, 2.0315)  # X <- a X + b (X X^T) X + c (X X^T)^2 X
ITERATIONS = 3  # two more take a quarter longer, and were no better


class Muon:
    """One training run.

    Args:
        matrices: weights whose last two axes are a linear map; `others`: all other weights.
        rate: the first step's length, relative to the root mean square of each weight. It falls linearly to 0 over `steps`.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], rate: float, steps: int) -> None:
        self.matrices, self.rate, self.steps, self.step_ = list(matrices), rate, steps, 0
        self.moved = [torch.zeros_like(weight) for weight in self.matrices]
        self.lengths = [_length(weight.detach()) for weight in self.matrices]
        groups = [{"params": [weight], "size": float(weight.detach().square().mean().sqrt())} for weight in others]
        self.adam = torch.optim.Adam(groups, lr=rate, betas=BETAS, fused=True) if groups else None

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights along their gradients, and drop these."""
        rate = self.rate * (1 - self.step_ / self.steps)
        self.step_ += 1
        for weight, moved, length in zip(self.matrices, self.moved, self.lengths, strict=True):
            assert weight.grad is not None
            moved.mul_(MOMENTUM).add_(weight.grad)
            weight.sub_(orthogonal(weight.grad + MOMENTUM * moved) * (length * rate))
            weight.grad = None
        if self.adam is not None:
            for group in self.adam.param_groups:
                group["lr"] = rate * group["size"]
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)


def living(weight: torch.Tensor) -> torch.Tensor:
    """The numbers of rows and of columns of matrices [..., rows, columns] that are not all zeros: [..., 2]."""
    seen = weight != 0
    return torch.stack((seen.any(-1).sum(-1), seen.any(-2).sum(-1)), -1)


def _length(weight: torch.Tensor) -> torch.Tensor:
    """rms(W_0) sqrt(max(rows, columns)) of matrices, [..., 1, 1]."""
    sides = living(weight).to(weight.dtype).clamp_min(1)
    long = weight.square().sum((-2, -1)) / sides.prod(-1) * sides.amax(-1)
    return long.sqrt()[..., None, None]


def orthogonal(values: torch.Tensor) -> torch.Tensor:
    """U V^T of the matrices [..., rows, columns] with singular values lifted towards 1; 0 where all is 0. On a GPU in bfloat16."""
    tall = values.shape[-2] > values.shape[-1]
    found = values.mT if tall else values
    shape = found.shape
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    found = (found.bfloat16() if values.is_cuda else found).reshape(-1, *shape[-2:])
    a, b, c = SCHULZ
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(square, square, square, beta=b, alpha=c), found, beta=a)
    found = found.reshape(shape)
    turned: torch.Tensor = (found.mT if tall else found).to(values.dtype)
    return turned
