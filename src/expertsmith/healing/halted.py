"""A decoder layer before which all batches have stopped, with its target outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expertsmith.engine import hidden_of
from expertsmith.engine.walk import Call
from expertsmith.errors import UserError
from expertsmith.healing.experts import LayerExperts

SMALL = 1e-12


@dataclass
class Halted:
    """A layer before which all batches have stopped: its experts, and for every batch the call, the target output, and two masks
    ([rows, length] bool): tokens that count, and tokens held out."""

    index: int
    experts: LayerExperts
    calls: list[Call]
    targets: list[torch.Tensor]
    masks: list[torch.Tensor]
    held: list[torch.Tensor]

    def error(self, output: Any, number: int) -> torch.Tensor:
        """Target minus output; 0 at tokens that do not count."""
        hidden = hidden_of(output)
        target, mask = self.targets[number], self.masks[number]
        if hidden.shape != target.shape:
            raise UserError(
                f"decoder layer {self.index} of the student puts out {list(hidden.shape)}, that of the teacher {list(target.shape)}",
                "give the model that the student was made from",
            )
        return (target.to(hidden.dtype) - hidden) * mask.reshape(*mask.shape, *(1 for _ in hidden.shape[2:])).to(hidden.dtype)

    def share(self, output: Any, number: int, chosen: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens `chosen` ([rows, length] bool) of ||target - output||^2 / ||target||^2."""
        wrong, target = (value[chosen].float() for value in (self.error(output, number), self.targets[number]))
        return (wrong.flatten(1).square().sum(1) / target.flatten(1).square().sum(1).clamp_min(SMALL)).sum()

    def held_error(self, output: Any, number: int) -> float:
        """`share` over the held-out tokens."""
        return float(self.share(output, number, self.held[number]))
