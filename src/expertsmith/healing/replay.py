"""Run a halted layer repeatedly, whole or on chosen tokens, while its experts and router change.

Most of a layer stays fixed: attention, norms before the experts, shared experts. No gradient reaches the outputs of these modules, so autograd
finds them in any family. Their outputs are computed once for all tokens and reused; only the router, the experts and the modules after them
run again. If these work token by token, a step takes any tokens of any batches in one call; otherwise (for example with a
convolution after the experts) a step takes whole batches. A trial run decides which.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from expertsmith.engine import hidden_of
from expertsmith.healing.halted import SMALL, Halted
from expertsmith.ranks import current

SAME = 1e-4  # squared distance, relative, between a layer's output and that of its replay on tokens in another order
Span = tuple[int, int]  # rows and length of a batch


class _Kept:
    """A per-token tensor of all batches, [T, …], and whether the batch had separate axes for rows and length."""

    def __init__(self, parts: Sequence[torch.Tensor], spans: Sequence[Span]) -> None:
        self.batched = parts[0].shape[:2] == spans[0]
        self.values = torch.cat([part.flatten(0, 1) if self.batched else part for part in parts])

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """The values at the tokens `rows` [rows, length]."""
        found = self.values.index_select(0, rows.reshape(-1))
        return found.reshape(*rows.shape, *self.values.shape[1:]) if self.batched else found


def _kept(parts: Sequence[Any], spans: Sequence[Span]) -> _Kept | None:
    """Join the values of all batches; None if they are not per token."""
    shapes = set()
    for part, (rows, length) in zip(parts, spans, strict=False):
        if not isinstance(part, torch.Tensor):
            return None
        batched = part.shape[:2] == (rows, length)
        if not batched and part.shape[:1] != (rows * length,):
            return None
        shapes.add((batched, part.shape[2 if batched else 1 :]))
    return _Kept(parts, spans) if len(parts) == len(spans) and len(shapes) == 1 else None


class Replay:
    """A halted layer, ready to run on any tokens of its batches; tokens are numbered row by row, batch by batch. The layer's own calls then
    reuse what does not change, too.

    Args:
        weights: the weights that will change.
    """

    def __init__(self, halted: Halted, weights: Sequence[nn.Parameter]) -> None:
        self.calls = halted.calls
        self.spans: list[Span] = [(mask.shape[0], mask.shape[1]) for mask in halted.masks]
        sizes = [rows * length for rows, length in self.spans]
        every = torch.arange(sum(sizes), device=halted.masks[0].device)
        self.batches = [part.reshape(span) for part, span in zip(torch.split(every, sizes), self.spans, strict=True)]
        targets = torch.cat([target.flatten(0, 1) for target in halted.targets])
        parts = zip(torch.split(targets, sizes), halted.targets, strict=True)
        halted.targets = [part.reshape(target.shape) for part, target in parts]  # views, so that there is one copy
        self._targets = targets
        self._lengths = torch.cat([part.float().flatten(1).square().sum(1) for part in torch.split(targets, sizes)])
        self._outputs: dict[nn.Module, tuple[bool, list[_Kept | None]]] = {}
        self._partly: set[nn.Module] = set()  # those whose other outputs are not per token; a later layer may need them
        outputs = self._record(halted.experts.layer, halted.experts.module, weights)
        self._arguments = {
            name: _kept([_named(call)[name] for call in self.calls], self.spans) for name in _named(self.calls[0])
        }
        self.by_token = all(current().gather(self._works_by_token(outputs, halted.masks[0])))
        halted.calls = [partial(self._again, number) for number in range(len(self.calls))]

    def _record(self, layer: nn.Module, experts: nn.Module, weights: Sequence[nn.Parameter]) -> torch.Tensor:
        """Store the outputs that do not change, which need no expert to run; returns the layer's output on the first batch."""
        layer.requires_grad_(False)  # a streamed layer's parameters come as they are made
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), _watched(dict(layer.named_modules()), _steady) as seen:
            first = hidden_of(self.calls[0]()).detach()
        for weight in weights:
            weight.requires_grad_(False)
        modules = {name: layer.get_submodule(name) for name in _outermost(seen)}
        with torch.no_grad(), _instead(experts, _zeros), _watched(modules, _copied) as made:
            for call in self.calls:
                call()
        for name in list(made):
            outputs = made.pop(name)
            several = isinstance(outputs[0], tuple)
            columns = list(zip(*outputs, strict=True)) if several else [outputs]
            kept = [_kept(column, self.spans) for column in columns]
            if kept[0] is not None:
                self._outputs[modules[name]] = several, kept
                lost = any(
                    held is None and any(part is not None for part in column)
                    for held, column in zip(kept, columns, strict=True)
                )
                self._partly |= {modules[name]} if lost else set()
        return first

    def _works_by_token(self, output: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether the first batch's tokens give the same outputs in another order and as one row."""
        order = self.batches[0].reshape(1, -1).flip(1)
        try:
            with torch.no_grad():
                found = self.run(order)
        except (RuntimeError, IndexError, TypeError, ValueError):  # shapes that a layer of this family cannot do with
            return False
        counted = mask.reshape(-1, *(1 for _ in output.shape[2:]))
        wrong, whole = (
            value.flatten(0, 1).float() * counted for value in (found.flip(1).reshape(output.shape) - output, output)
        )
        return bool(wrong.square().sum() <= SAME * whole.square().sum())

    def run(self, rows: torch.Tensor, number: int = 0) -> torch.Tensor:
        """The layer's output at the tokens `rows` [rows, length]; arguments that are not per token come from batch `number`."""
        call = self.calls[number]
        given = {}
        for name, value in _named(call).items():
            kept = self._arguments[name]
            given[name] = value if kept is None else kept.at(rows)
        with self._reused(rows, self._outputs):
            places = [given.pop(name) for name in list(given) if isinstance(name, int)]
            return hidden_of(call.func(*places, **given))  # type: ignore[attr-defined]

    def _again(self, number: int) -> Any:
        """The layer's whole output on a batch."""
        with self._reused(self.batches[number], self._outputs.keys() - self._partly):
            return self.calls[number]()

    @contextmanager
    def _reused(self, rows: torch.Tensor, modules: Collection[nn.Module]) -> Iterator[None]:
        """Within the context, modules whose output does not change return what they gave for the tokens `rows` [rows, length]."""
        with ExitStack() as stack:
            for module in modules:
                several, columns = self._outputs[module]
                stack.enter_context(_instead(module, partial(_handed_out, several, columns, rows)))
            yield

    def errors(self, rows: torch.Tensor, number: int = 0) -> torch.Tensor:
        """||target - output||^2 / ||target||^2 at the tokens `rows`, in their order, along one axis."""
        target = self._targets.index_select(0, rows.reshape(-1)).float().flatten(1)
        output = self.run(rows, number).flatten(0, 1).float().flatten(1)
        return (target - output).square().sum(1) / self._lengths.index_select(0, rows.reshape(-1)).clamp_min(SMALL)


def _named(call: Any) -> dict[Any, Any]:
    """The arguments of a halted call, keyed by position or name."""
    return {**dict(enumerate(call.args)), **call.keywords}


def _zeros(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


def _handed_out(several: bool, columns: list[_Kept | None], rows: torch.Tensor, *_: Any, **__: Any) -> Any:
    made = [None if column is None else column.at(rows) for column in columns]
    return tuple(made) if several else made[0]


@contextmanager
def _instead(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    held = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if held is not None:
            module.forward = held


@contextmanager
def _watched(modules: dict[str, nn.Module], look: Callable[[Any], Any]) -> Iterator[dict[str, list[Any]]]:
    """Within the context, call `look` on the output of every call of the named modules."""
    seen: dict[str, list[Any]] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(name, []).append(look(output))

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _steady(output: Any) -> bool:
    """Whether no gradient reaches a module's output."""
    tensors = [value for value in (output if isinstance(output, tuple) else (output,)) if isinstance(value, torch.Tensor)]
    return bool(tensors) and not any(tensor.requires_grad for tensor in tensors)


def _copied(output: Any) -> Any:
    """Copy a module's output, because later modules may change it in place."""
    if isinstance(output, tuple):
        return tuple(_copied(value) for value in output)
    return output.clone() if isinstance(output, torch.Tensor) else None


def _outermost(steady: dict[str, list[bool]]) -> list[str]:
    """The outermost modules that ran once and whose output no gradient reaches."""
    found = {name for name, calls in steady.items() if name and calls == [True]}
    return sorted(name for name in found if not any(name[:at] in found for at in range(len(name)) if name[at] == "."))
