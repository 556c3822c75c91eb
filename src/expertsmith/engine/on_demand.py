"""A decoder layer whose routed experts do not fit into memory together: each expert is read when tokens are routed to it, then released.

The experts module keeps its parameters on the meta device. Its class is replaced by one whose forward reads the selected experts, a few at
a time, into a module of the stock class that holds only those. So every way of running experts works unchanged. Each expert is a separate
product, so the results are those of the whole module, except the last bit of activations whose vectorised kernels round the end of a tensor
differently.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expertsmith.arch import Architecture
from expertsmith.arch.base import split
from expertsmith.experts.weights import refuse_damaged

if TYPE_CHECKING:
    from expertsmith.experts.inventory import Inventory

AT_ONCE = 2**29  # bytes of experts in memory at a time


class Source:
    """The source from which the experts of one decoder layer are read."""

    def __init__(self, inventory: Inventory, layer: int, record: Architecture, device: torch.device) -> None:
        self.inventory, self.layer, self.record, self.device = inventory, layer, record, device

    def fill(self, part: nn.Module, experts: range) -> None:
        """Read `experts` of the layer into a module that holds only them.

        Raises:
            UserError: NaN or inf.
        """
        from expertsmith.engine.layout import in_memory

        claims = self.inventory.expert_claims(self.layer)
        for place, expert in enumerate(experts):
            views = in_memory(part, self.record, place, len(experts))
            for claim in claims[expert]:
                layout = self.inventory.layout(claim)
                assert layout is not None
                values = self.inventory.rows(claim, expert).to(self.device)
                refuse_damaged(values, claim.info.name)
                matrix = values.dim() > 1
                for role, view in split(layout, values).items():
                    views[role, matrix].copy_(view)


def remove(experts: Any) -> None:
    """Make `experts` the stock module again, which needs its parameters loaded."""
    if is_on_demand(experts):
        experts.__class__ = type(experts).stock
        del experts._source


def is_on_demand(experts: Any) -> bool:
    """Whether a module's experts are read on demand."""
    return getattr(experts, "_source", None) is not None


def parts(experts: Any, wanted: torch.Tensor | None = None) -> Iterator[tuple[range, Any]]:
    """Yield (experts, a stock module that holds only those), a few at a time. `wanted`: ids of the needed experts; others are read only if
    they lie between needed ones of a part."""
    count = experts.num_experts
    ids = list(range(count)) if wanted is None else [e for e in sorted(set(wanted.tolist())) if e < count]
    size = sum(p.numel() * p.element_size() for p in experts.parameters()) // count
    most = max(1, AT_ONCE // max(1, size))
    while ids:
        held = range(ids[0], min(ids[0] + most, count))
        inside = [e for e in ids if e in held]
        held = range(held.start, inside[-1] + 1)
        yield held, _part(experts, held)
        ids = ids[len(inside) :]


def _part(experts: Any, held: range) -> Any:
    made = copy.copy(experts)
    made.__class__ = type(experts).stock
    made.__dict__ = {key: value for key, value in experts.__dict__.items() if key not in ("_source", "forward")}
    made.num_experts = len(held)
    source: Source = experts._source
    made._parameters = {
        name: nn.Parameter(
            torch.empty((len(held), *value.shape[1:]), dtype=value.dtype, device=source.device), requires_grad=False
        )
        for name, value in experts._parameters.items()
        if value is not None
    }
    source.fill(made, held)
    return made
