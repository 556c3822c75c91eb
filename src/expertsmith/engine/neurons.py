"""The hidden activations of a layer's routed experts, as tensors of the running graph.

h_j(t) in R^I, I neurons, is the input of expert j's down projection at a token t that is routed to it: act(gate x) * up x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from expertsmith.arch import Architecture
from expertsmith.engine.experts import Slots, flattened_forward, grouped_forward
from expertsmith.engine.layout import expert_count, experts_of, is_grouped, matrix_role, routing_of, submodule


class Hidden(NamedTuple):
    """Hidden activations of S (token, expert) pairs: the first S rows of `values` [..., neurons], with `expert` [S] in ascending order,
    `token` [S], and `routed` [S]: whether the router selected the pair."""

    values: torch.Tensor
    expert: torch.Tensor
    token: torch.Tensor
    routed: torch.Tensor


Seen = Callable[[Hidden], None]


@contextmanager
def watched(layer: nn.Module, record: Architecture, seen: Seen) -> Iterator[None]:
    """Within the context, call `seen` with the hidden activations of every forward of the layer's experts, before its output is used. The
    forward computes what `engine.experts` computes."""
    block = submodule(layer, record.block)
    experts, router = experts_of(layer, record), submodule(block, record.router)
    routing: list[Any] = []

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if record.call == "dense_inputs":
            return _dense(experts, record, hidden_states, routing[-1][0], seen)
        selected, weights = routing_of(args, kwargs)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if is_grouped(experts):
            kept: list[torch.Tensor] = []
            out, slots = grouped_forward(experts, x, selected.reshape(len(x), -1), weights, kept.append)
            seen(Hidden(kept[0], slots.expert, slots.token, _routed(slots, experts, record)))
        else:
            with _Down(experts, record) as found:
                out, slots = flattened_forward(experts, x, selected, weights, record.call == "pairs", hidden_states.shape)
            _tell(found, slots, _routed(slots, experts, record), seen)
        return out.reshape(hidden_states.shape)

    hook = router.register_forward_hook(lambda _, args, out: routing.append(out))
    experts.forward = forward
    try:
        yield
    finally:
        hook.remove()
        experts.__dict__.pop("forward", None)


def _routed(slots: Slots, experts: nn.Module, record: Architecture) -> torch.Tensor:
    routed = slots.expert < expert_count(experts)
    return routed & (slots.weight != 0) if record.unrouted_zero else routed


def _dense(experts: Any, record: Architecture, inputs: torch.Tensor, scores: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Llama-4: every expert runs on every token, scaled by its score; a score of 0 is not routed."""
    count = expert_count(experts)
    with _Down(experts, record) as found:
        out: torch.Tensor = type(experts).forward(experts, inputs)
    (values, _), tokens = found.calls[0], inputs.shape[0] // count
    expert = torch.arange(count, device=inputs.device).repeat_interleave(tokens)
    token = torch.arange(tokens, device=inputs.device).repeat(count)
    seen(Hidden(values, expert, token, scores.reshape(tokens, count)[token, expert] > 0))
    return out


def _tell(found: _Down, slots: Slots, routed: torch.Tensor, seen: Seen) -> None:
    for values, expert in found.calls:
        ends = torch.searchsorted(slots.expert, torch.tensor([expert, expert + 1], device=slots.expert.device)).tolist()
        rows = slice(*ends)
        if rows.stop > rows.start:
            seen(Hidden(values, slots.expert[rows], slots.token[rows], routed[rows]))


class _Down(TorchFunctionMode):
    """While experts run: the products whose second factor lies in the down projections, as (first factor, expert)."""

    def __init__(self, experts: nn.Module, record: Architecture) -> None:
        super().__init__()
        down = [p for name, p in experts.named_parameters() if matrix_role(experts, name, record) == "down"]
        if len(down) != 1:
            raise RuntimeError(f"{type(experts).__name__} has {len(down)} down projections, expected 1")
        self.place = down[0].untyped_storage().data_ptr()
        self.size = down[0].numel() // expert_count(experts)
        self.calls: list[tuple[torch.Tensor, int]] = []

    def _is_down(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == self.place

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if len(args) > 1 and self._is_down(args[1]) and not self._is_down(args[0]):
            self.calls.append((args[0], args[1].storage_offset() // self.size))
        return out
