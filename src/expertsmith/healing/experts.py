"""The experts of one decoder layer during healing: their inputs, hidden activations and down projections.

An expert's output is linear in its down projection: with phi_t = w_t * act(gate x_t) * (up x_t) and the routing weight w_t, the routed output
of token t is the sum of W_down phi_t (+ w_t b_down) over its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from expertsmith.arch import Architecture
from expertsmith.engine.experts import grouped_forward
from expertsmith.engine.layout import expert_count, experts_of, in_memory, is_grouped, routing_of, submodule
from expertsmith.engine.skipping import Rule, keep_slots, rescaled_weights

Skip = tuple[float, Rule]  # threshold and rule of a layer whose tokens skip experts


@dataclass
class Routed:
    """The inputs and routing of T tokens at a layer's experts. Slots without a routed expert (zero experts, constants, skipped, weight 0) have expert -1.

    `scale` [T, slots] multiplies an expert's input, `weight` [T, slots] its output; a family uses one of them.
    """

    x: torch.Tensor  # [T, width]
    expert: torch.Tensor  # [T, slots]
    weight: torch.Tensor  # [T, slots] float32
    scale: torch.Tensor | None = None

    def at(self, rows: torch.Tensor) -> Routed:
        """A part of the tokens."""
        return Routed(self.x[rows], self.expert[rows], self.weight[rows], None if self.scale is None else self.scale[rows])


@dataclass
class Tapped:
    """One call of a layer: the experts' inputs, and their summed output as a leaf of the graph."""

    routed: Routed
    leaf: torch.Tensor  # [T, width]


class LayerExperts:
    """The loaded router and experts of a decoder layer."""

    def __init__(self, layer: nn.Module, record: Architecture, skip: Skip | None = None) -> None:
        self.layer, self.record, self.skip = layer, record, skip
        self.block: Any = submodule(layer, record.block)
        self.router: Any = submodule(self.block, record.router)
        self.module: Any = experts_of(layer, record)
        self.count = expert_count(self.module)
        # not: experts that are altered while they run, and those whose ids are not those of the router
        self.plain = is_grouped(self.module) and "forward" not in self.module.__dict__ and not hasattr(self.module, "place")
        self._acting: Any = None

    @contextmanager
    def tapped(self, found: list[Tapped]) -> Iterator[None]:
        """Within the context, the layer's experts run as usual, but gradients stop at their output; each call is appended to `found`."""
        held = self.module.__dict__.get("forward")
        inner = self.module.forward
        routing: list[torch.Tensor] = []
        hook = self.router.register_forward_hook(lambda _, args, out: routing.extend((args[0], out[0])))

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                out = inner(hidden_states, *args, **kwargs)
                if self.record.call == "dense_inputs":
                    leaf, routed = out.reshape(self.count, -1, out.shape[-1]).sum(0), self._scaled(*routing)
                else:
                    leaf = out.reshape(-1, out.shape[-1])
                    routed = self._weighted(hidden_states.reshape(-1, hidden_states.shape[-1]), *routing_of(args, kwargs))
            routing.clear()
            leaf = leaf.detach().requires_grad_()
            found.append(Tapped(routed, leaf))
            if self.record.call == "dense_inputs":
                others = leaf.new_zeros((self.count - 1) * len(leaf), leaf.shape[-1])
                return torch.cat((leaf, others)).reshape(out.shape)
            whole: torch.Tensor = leaf.reshape(out.shape)
            return whole

        self.module.forward = forward
        try:
            yield
        finally:
            hook.remove()
            self.module.__dict__.pop("forward", None)
            if held is not None:
                self.module.forward = held

    @contextmanager
    def grouped(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Within the context, plain experts run by `engine.experts.grouped_forward`: the same values, in less time, with gradients in much less. With
        a `dtype` they multiply in it; weights, gradients and all other operations keep theirs."""
        if not self.plain:
            yield
            return
        held = self.module.__dict__.get("forward")
        self.module.forward = partial(_forward, self.module, dtype)
        try:
            yield
        finally:
            self.module.__dict__.pop("forward")
            if held is not None:
                self.module.forward = held

    @property
    def fast(self) -> AbstractContextManager[None]:
        """The context for training steps: bfloat16 products on a GPU. It multiplies all groups of bfloat16 rows in one launch; float32 groups
        need a launch and a synchronization each. Rows must be a multiple of 16 bytes."""
        matrices = [weight for weight in self.module.parameters() if weight.dim() == 3]
        suits = matrices and all(weight.is_cuda and weight.shape[1] % 8 == weight.shape[2] % 8 == 0 for weight in matrices)
        return self.grouped(torch.bfloat16) if suits else nullcontext()

    def _scaled(self, x: torch.Tensor, scores: torch.Tensor) -> Routed:
        """Scores [T, E] that scale an expert's input; 0 where the expert is not selected."""
        scores = scores.reshape(-1, self.count)
        slots = int((scores != 0).sum(1).max())
        scale, expert = scores.sort(dim=1, descending=True)
        scale, expert = scale[:, :slots], expert[:, :slots]
        ones = torch.ones_like(scale, dtype=torch.float32)
        return Routed(x.reshape(-1, x.shape[-1]), expert.masked_fill(scale == 0, -1), ones, scale)

    def _weighted(self, x: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor) -> Routed:
        expert, weights = selected.reshape(len(x), -1).long(), weights.reshape(len(x), -1)
        if (place := getattr(self.module, "place", None)) is not None:  # ids of the router → rows; below 0: constants
            expert = torch.tensor(place, device=expert.device)[expert].clamp_min(-1)
        if self.skip is not None:
            skippable = None if is_grouped(self.module) else expert < self.count
            keep = keep_slots(weights, self.skip[1], self.skip[0], skippable)
            weights = rescaled_weights(weights, keep, skippable) * keep
        return Routed(x, expert.masked_fill((expert >= self.count) | (weights == 0), -1), weights.float())

    def views(self, expert: int) -> dict[tuple[str, bool], torch.Tensor]:
        """Views of an expert's weights by (role, whether it is a matrix): gate and up [neurons, inputs], down [outputs, neurons]."""
        found: dict[tuple[str, bool], torch.Tensor] = in_memory(self.module, self.record, expert, self.count)
        return found

    def hidden(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """[T, neurons]: act(gate x) * up x of one expert."""
        views = self.views(expert)
        if not is_grouped(self.module):
            gate: torch.Tensor = self._act(nn.functional.linear(x, views["gate", True]))
            return gate * nn.functional.linear(x, views["up", True])
        name = "gate_up_proj" if self.module.has_gate else "up_proj"
        weight = getattr(self.module, name)[expert]
        bias = getattr(self.module, f"{name}_bias")[expert] if self.module.has_bias else None
        product = nn.functional.linear(x, weight.T if self.module.is_transposed else weight, bias)
        made: torch.Tensor = self.module._apply_gate(product) if self.module.has_gate else self.module.act_fn(product)
        return made

    @property
    def _act(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The activation of an experts module without transformers' experts decorator."""
        if self._acting is None:
            owners = (self.module, *self.module.children())
            names = ("act_fn", "activation_fn")
            held = [getattr(owner, name) for owner in owners for name in names if callable(getattr(owner, name, None))]
            if not held:
                raise RuntimeError(f"{type(self.module).__name__}: no activation function found")
            self._acting = held[0]
        return self._acting  # type: ignore[no-any-return]

    def features(self, routed: Routed, expert: int, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """phi of one expert at (row, slot) pairs of `routed`: [len(rows), neurons (+ 1 if the down projection has a bias)], float32."""
        x = routed.x[rows]
        if routed.scale is not None:
            x = routed.scale[rows, slots, None] * x
        hidden = self.hidden(expert, x).float()
        if ("down", False) in self.views(expert):
            hidden = torch.cat((hidden, hidden.new_ones(len(hidden), 1)), 1)
        return hidden * routed.weight[rows, slots, None]

    def down(self, expert: int) -> torch.Tensor:
        """The down projection as [outputs, neurons (+ 1)], float64, with the bias as last column."""
        views = self.views(expert)
        bias = views.get(("down", False))
        matrix = views["down", True].double()
        return matrix if bias is None else torch.cat((matrix, bias.double()[:, None]), 1)

    @torch.no_grad()
    def set_down(self, expert: int, values: torch.Tensor) -> None:
        """Write values in the form that `down` returns."""
        views = self.views(expert)
        neurons = views["down", True].shape[1]
        views["down", True].copy_(values[:, :neurons])
        if ("down", False) in views:
            views["down", False].copy_(values[:, neurons])


class _Cast:
    """An experts module with its weights cast to another dtype."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self.experts = experts
        self.weights = {name: weight.to(dtype) for name, weight in experts.named_parameters(recurse=False)}

    def __getattr__(self, name: str) -> Any:
        return self.weights[name] if name in self.weights else getattr(self.experts, name)


def _forward(experts: Any, dtype: torch.dtype | None, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    selected, weights = routing_of(args, kwargs)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    held = experts if dtype is None else _Cast(experts, dtype)
    return grouped_forward(held, x, selected.reshape(len(x), -1), weights)[0].reshape(hidden_states.shape)
