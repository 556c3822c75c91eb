"""Run selected (token, expert) pairs of an experts module and expose the raw outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from expertsmith.arch import Architecture
from expertsmith.engine.layout import is_grouped, routing_of
from expertsmith.engine.on_demand import Source, is_on_demand, parts
from expertsmith.engine.stock import grouped_linear


@dataclass(frozen=True)
class Slots:
    """The (token, expert) pairs of a batch, sorted by expert, then by token.

    `raw` [S, hidden] are the experts' outputs before the routing weight; if `inside`, they already contain it.
    """

    raw: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor
    token: torch.Tensor
    inside: bool = False


class _Rows(torch.autograd.Function):
    """values[rows] where every row of `values` is taken equally often. `back` [rows of values, times] says where each has gone.

    So the gradient is read from there and summed. That of an index is added up row by row: on a CPU 20 times slower, on a GPU after a sort.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rows: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return values.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        found = grads[0].index_select(0, back.reshape(-1))
        if back.shape[1] > 1:
            found = found.reshape(*back.shape, *found.shape[1:]).sum(1)
        return found, None, None


def _rows(values: torch.Tensor, rows: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _Rows.apply(values, rows, back)  # type: ignore[no-untyped-call]
    return found


def grouped_outputs(
    experts: Any,
    x: torch.Tensor,
    token: torch.Tensor,
    expert: torch.Tensor,
    seen: Callable[[torch.Tensor], None] | None = None,
    back: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs [S, hidden] of the pairs (token[s], expert[s]), sorted by expert, with one grouped matrix product a projection.

    Same operations in the same order as transformers' "grouped_mm" (`transformers.integrations.moe`), so the result is the same bit for
    bit (tested). Experts that are read on demand run a few at a time. `seen` is called with the inputs [S, neurons] of the down
    projections, not for experts that are read on demand. `back` [tokens, slots]: where each pair of a token lies, if every token has
    equally many; only a gradient needs it.
    """
    if is_on_demand(experts):
        raw = x.new_zeros(len(expert), x.shape[-1])
        for held, part in parts(experts, expert):
            rows = slice(*torch.searchsorted(expert, torch.tensor([held.start, held.stop], device=expert.device)).tolist())
            raw[rows] = grouped_outputs(part, x, token[rows], expert[rows] - held.start)
        return raw
    count = experts.num_experts
    ids = torch.arange(count, device=expert.device)
    offsets = torch.searchsorted(expert, ids, right=True, out_int32=True)  # counting them would wait for the device

    def linear(inputs: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
        product: torch.Tensor = grouped_linear(
            inputs, getattr(experts, name), offsets, bias=bias, is_transposed=experts.is_transposed
        )
        return product

    inputs = x.index_select(0, token) if back is None else _rows(x, token, back)
    if experts.has_gate:
        hidden = experts._apply_gate(linear(inputs, "gate_up_proj"))
    else:
        hidden = experts.act_fn(linear(inputs, "up_proj"))
    if seen is not None:
        seen(hidden)
    raw = linear(hidden, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        raw = experts.post_expert_norm(raw)
    return raw


def flattened_outputs(
    experts: nn.Module,
    x: torch.Tensor,
    token: torch.Tensor,
    expert: torch.Tensor,
    dtype: torch.dtype,
    pairs: bool,
    batched: bool,
) -> torch.Tensor:
    """Outputs [S, hidden] of the pairs (token[s], expert[s]) for modules of any kind: the module's own forward, with every pair as a
    separate token of weight 1.

    `dtype` is that of the routing weights. `pairs` adds a second slot of weight 0, for forwards that need more than one slot. `batched`
    adds a leading axis, for forwards that take [batch, tokens, hidden].
    """
    ids = expert.unsqueeze(-1)
    ones = torch.ones_like(ids, dtype=dtype)
    if pairs:
        ids, ones = ids.repeat(1, 2), torch.cat((ones, torch.zeros_like(ones)), -1)
    inputs = x[token]
    if batched:
        inputs = inputs.unsqueeze(0)
    raw: torch.Tensor = type(experts).forward(experts, inputs, ids, ones).reshape(token.numel(), -1)
    return raw


def grouped_forward(
    experts: Any,
    x: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    seen: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, Slots]:
    """The experts' forward as in transformers' "grouped_mm"; also returns the raw outputs.

    Tokens are sorted by expert, multiplied by one grouped matrix product a projection, weighted, put back into order and summed. Same
    operations in the same order as `transformers.integrations.moe`, so the result is the same bit for bit (tested).
    """
    expert, order, back = _sorted(selected)
    token = order // selected.shape[-1]
    return _combine(grouped_outputs(experts, x, token, expert, seen, back), x, expert, order, back, weights)


def flattened_forward(
    experts: nn.Module, x: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor, pairs: bool, shape: Sequence[int]
) -> tuple[torch.Tensor, Slots]:
    """For experts modules of any kind: the module's own forward, with every (token, expert) pair as a separate token of weight 1.

    `pairs` adds a second slot of weight 0, for forwards that need more than one slot.
    """
    expert, order, back = _sorted(selected)
    raw = flattened_outputs(experts, x, order // selected.shape[-1], expert, weights.dtype, pairs, len(shape) == 3)
    return _combine(raw, x, expert, order, back, weights)


def _sorted(selected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The (token, slot) pairs of `selected`, sorted by expert: the expert of each, its number, and where each pair of a token lies [tokens,
    slots]."""
    expert, order = torch.sort(selected.reshape(-1), stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return expert, order, back.view(-1, selected.shape[-1])


def _combine(
    raw: torch.Tensor, x: torch.Tensor, expert: torch.Tensor, order: torch.Tensor, back: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, Slots]:
    """Weight the outputs, put them back into the order of tokens and slots, and sum those of each token."""
    weight = _rows(weights.reshape(-1), order, back.reshape(-1, 1))
    weighted = _rows(raw * weight.unsqueeze(-1), back.reshape(-1), order.reshape(-1, 1))
    out = weighted.view(*back.shape, -1).sum(dim=1).to(x.dtype)
    return out, Slots(raw, expert, weight.float(), order // back.shape[1])


AT_ONCE = 2**24  # elements of hidden activations


def outputs_of_all(
    experts: Any, x: torch.Tensor, scores: torch.Tensor, architecture: Architecture, dims: int = 2
) -> torch.Tensor:
    """[2, count, hidden], float64: the sum over the tokens x [T, hidden] of every expert's raw output, and of that output times the expert's
    score, from `scores` [T, count], float32. `dims`: axes of the experts' input.

    The down projection is linear. So if the experts' layout is known, it is applied once, to the sums of hidden activations, in float32:
    one third fewer products, equal up to rounding.
    """
    count = scores.shape[1]
    if is_on_demand(experts):
        sums = [outputs_of_all(part, x, scores[:, held.start : held.stop], architecture, dims) for held, part in parts(experts)]
        return torch.cat([*sums, sums[0].new_zeros(2, count - experts.num_experts, sums[0].shape[-1])], 1)
    linear = is_grouped(experts) and not getattr(experts, "has_post_expert_norm", False)
    total: Any = 0.0
    width = experts.down_proj.numel() // experts.down_proj.shape[0] // x.shape[-1] * 2 if linear else x.shape[-1]
    rows = max(1, AT_ONCE // (count * max(width, x.shape[-1])))
    for chunk, score in zip(torch.split(x, rows), torch.split(scores, rows), strict=True):
        every = hidden_of_all(experts, chunk, count) if linear else run_all(experts, chunk, count, architecture, dims)
        scored = every * score.T.unsqueeze(-1)
        total = total + torch.stack([part.sum(1, dtype=torch.float64) for part in (every, scored)])
    if linear:
        down = experts.down_proj if experts.is_transposed else experts.down_proj.transpose(1, 2)  # [E, neurons, hidden]
        total = torch.stack([(total[:, e].float() @ down[e].float()).double() for e in range(count)], 1)
        if experts.has_bias:
            times = torch.stack((torch.full_like(scores[0], len(x), dtype=torch.float64), scores.sum(0, dtype=torch.float64)))
            total = total + times.unsqueeze(-1) * experts.down_proj_bias.double()
    result: torch.Tensor = total
    return result


def hidden_of_all(experts: Any, x: torch.Tensor, count: int) -> torch.Tensor:
    """The inputs [count, T, neurons] of every expert's down projection for every token. The experts' layout must be known
    (`is_grouped`)."""
    if is_on_demand(experts):
        return torch.cat([hidden_of_all(part, x, len(held)) for held, part in parts(experts)])
    size = x.shape[0]
    inputs = x.repeat(count, 1)
    expert = torch.arange(count, device=x.device).repeat_interleave(size)
    offsets = torch.arange(size, size * count + 1, size, device=x.device, dtype=torch.int32)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    product = grouped_linear(inputs, getattr(experts, name), offsets, bias=bias, is_transposed=experts.is_transposed)
    hidden: torch.Tensor = experts._apply_gate(product) if experts.has_gate else experts.act_fn(product)
    return hidden.reshape(count, size, -1)


def run_all(experts: Any, x: torch.Tensor, count: int, architecture: Architecture, dims: int = 2) -> torch.Tensor:
    """The raw outputs [count, T, hidden] of every expert for every token, by the module's own forward.

    A router may have more classes than there are routed experts (shared experts that it weights). Their outputs are zeros, because a
    grouped matrix product leaves the rows of missing experts uninitialised.
    """
    if architecture.call == "dense_inputs":
        return type(experts).forward(experts, x.repeat(count, 1)).reshape(count, x.shape[0], -1)  # type: ignore[no-any-return]
    there = min(count, experts.num_experts) if is_grouped(experts) else count
    every = torch.arange(there, device=x.device).expand(x.shape[0], there)
    ones = torch.ones_like(every, dtype=x.dtype)
    if is_grouped(experts):
        slots = grouped_forward(experts, x, every, ones)[1]
    else:
        slots = flattened_forward(experts, x, every, ones, architecture.call == "pairs", (1, *x.shape)[3 - dims :])[1]
    raw = torch.zeros(count, *x.shape, dtype=slots.raw.dtype, device=x.device)
    raw[slots.expert, slots.token] = slots.raw
    return raw


def install(experts: Any, source: Source) -> None:
    """Make an experts module on the meta device read its experts from `source`."""
    if not is_on_demand(experts):
        experts.__class__ = _reading(type(experts))  # type: ignore[arg-type]
    experts._source = source


@cache
def _reading(stock: type[Any]) -> Any:
    """A subclass of `stock` whose forward reads experts on demand."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        selected, weights = routing_of(args, kwargs)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        out: torch.Tensor = grouped_forward(self, x, selected.reshape(len(x), -1), weights)[0]
        return out.reshape(hidden_states.shape)

    return type(f"{stock.__name__}OnDemand", (stock,), {"forward": forward, "stock": stock, "__module__": stock.__module__})
