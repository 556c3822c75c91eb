"""Translate the error of a decoder layer's output into a change of its routed output.

The tail of a layer lies between the routed output r and the layer's output h(r): scales, norms, latent projections, residual streams, shared
experts. No family's tail is described here; autograd differentiates it. With the Jacobian J_t of token t's output with respect to its routed
output, and e_t = target - h(r_t), the change wanted of the routed output is

    d_t = argmin || e_t - J_t d ||^2      (the shortest one)

Conjugate gradients on the least-squares problem (CGLS) find it for every token separately. If the tail multiplies by c, one step gives
e_t / c, the exact target; with a norm in the tail it is a Gauss-Newton step.
"""

from __future__ import annotations

import torch

STEPS = 8
ENOUGH = 1e-3  # the gradient's length, relative to the first, at which a token is done


def wanted_change(output: torch.Tensor, routed: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(d [tokens, width], s [tokens]): the change wanted of the routed output, and how strongly the layer's output depends on it,
    s_t = ||J_t p_t|| / ||p_t|| with p_t = J_t^T e_t (0 for tokens without an error).

    Args:
        output: what the layer returned, with a graph back to `routed`.
        routed: [tokens, width], the leaf.
        error: target minus output, in the output's shape; 0 at tokens that do not count.
    """
    tokens = routed.shape[0]
    with torch.enable_grad():
        probe = torch.zeros_like(output, requires_grad=True)
        (pulled,) = torch.autograd.grad(output, routed, probe, create_graph=True)

    def back(vector: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(output, routed, vector, retain_graph=True)[0]

    def ahead(vector: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(pulled, probe, vector, retain_graph=True)[0]

    def length(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(tokens, -1).double().square().sum(1)

    def ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        return torch.where(below > 0, above / below.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

    def times(factor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (values.reshape(tokens, -1) * factor.to(values.dtype)[:, None]).reshape(values.shape)

    rest = error.to(output.dtype)
    gradient = back(rest)
    step, change = gradient, torch.zeros_like(gradient)
    first = size = length(gradient)
    follows = torch.zeros_like(size)
    for turn in range(STEPS):
        moved = ahead(step)
        if turn == 0:
            follows = ratio(length(moved), length(step)).sqrt()
        share = ratio(size, length(moved))
        change = change + times(share, step)
        rest = rest - times(share, moved)
        gradient = back(rest)
        size, before = length(gradient), size
        if bool((size <= ENOUGH**2 * first).all()):
            break
        step = gradient + times(ratio(size, before), step)
    return change.float(), follows.float()
