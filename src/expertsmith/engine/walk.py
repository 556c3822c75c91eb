"""Carry batches through a model in lock-step: all batches through decoder layer 0, then all through layer 1, and so on.

Each batch runs the model's own forward, which pauses before every decoder layer (`engine.pauses`). So masks, position embeddings and any
state that a model passes from layer to layer are the model's own, and a layer's weights are needed once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from expertsmith.engine.loading import LoadedModel
from expertsmith.engine.pages import kept_pages
from expertsmith.engine.pauses import Lanes

Call = Callable[[], Any]  # a decoder layer's forward on one batch, with its arguments


@dataclass
class Batch:
    """Sequences of one domain, padded on the right. `mask` is True where a token counts.

    `sequences` are the positions of the rows among the domain's sequences. `context` is True where a token is read, if these are more than
    those that count.
    """

    input_ids: torch.Tensor  # [rows, length]
    mask: torch.Tensor  # [rows, length], bool
    domain: str
    sequences: list[int]
    context: torch.Tensor | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens that count."""
        return int(self.mask.sum())

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arguments of the model's forward."""
        read = self.mask if self.context is None else self.context
        return {"input_ids": self.input_ids.to(device), "attention_mask": read.to(device=device, dtype=torch.long)}


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in a decoder layer's output: the tensor itself, or the first of a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class Walk:
    """One pass of `batches` through `model`; if it was loaded with a multi-token-prediction layer, that is the last.

    Iterate `layers()` to advance; each step yields the index of the decoder layer that all batches have just left. Afterwards
    `outputs()` finishes the forwards one by one. Use as a context manager: leaving it drops unfinished forwards and restores
    the layers.

    Args:
        before: called as before(layer, batch_number, batch) right before a batch enters a decoder layer.
        after: called as after(layer, batch_number, output) with the layer's output.
        skip: number of decoder layers at the start that are not run; each returns `restore(batch_number)`, the output of the last of them.
        doors: pause at these modules, one in every decoder layer, instead of at the layers themselves.
        arrive: called as arrive(index, batch_number, *args) with the arguments of a door, before the forward pauses there. So all batches
            arrive at a door before one of them passes it.
        instead: called as instead(index, forward, *args, **kwargs) in place of a door's own forward.
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: Sequence[Batch],
        before: Callable[[int, int, Batch], None] | None = None,
        after: Callable[[int, int, Any], None] | None = None,
        skip: int = 0,
        restore: Callable[[int], Any] | None = None,
        doors: Sequence[Any] | None = None,
        arrive: Callable[..., None] | None = None,
        instead: Callable[..., Any] | None = None,
    ) -> None:
        self.model = model
        self.doors: Sequence[Any] = model.layers if doors is None else doors
        self._ahead = doors is not None  # the modules between two doors need the weights of both layers
        self.arrive = arrive
        self.instead = instead
        self.batches = batches
        self.before = before
        self.after = after
        self.skip = skip
        self.restore = restore
        self._results: dict[int, Any] = {}
        self._lanes = Lanes(self._forward, 0)  # one for each batch, made on entering
        self._trunk: dict[int, Any] = {}  # batch → output of the model's own last layer
        self.side_state = False  # a layer left something for later layers besides its output (shared key-value states)
        self._guard = ExitStack()

    def __enter__(self) -> Walk:
        self._guard.enter_context(torch.no_grad())
        if self.model.device.type == "cpu":
            self._guard.enter_context(kept_pages())
        for index, layer in enumerate(self.doors):
            layer.forward = partial(self._enter_layer, index, type(layer).forward.__get__(layer))
        self._lanes = Lanes(self._forward, len(self.batches))
        return self

    def __exit__(self, *_: object) -> None:
        self.model.stop_reading()
        self._lanes.close()
        for index, layer in enumerate(self.doors):
            layer.__dict__.pop("forward", None)
            self.model.release(index)
        self._results.clear()
        self._trunk.clear()
        self._guard.close()

    def layers(self, until: int | None = None) -> Iterator[int]:
        """Advance all batches layer by layer, up to and including decoder layer `until` (default: the last)."""
        if self._ahead:
            self.model.bring(0)
        for number in range(len(self._lanes)):
            self._resume(number)  # up to the door of the first layer that runs
        last = len(self.model.layers) - 1 if until is None else until
        for index in range(self.skip, last + 1):
            wanted = index + self._ahead
            if wanted < len(self.doors):
                self.model.bring(wanted)
            if wanted < min(last + self._ahead, len(self.doors) - 1):
                self.model.read_ahead(wanted + 1)
            self._pass(index)
            self.model.release(index)
            yield index

    def outputs(self) -> Iterator[Any]:
        """The model's outputs, batch by batch, in order; none is kept."""
        for number in range(len(self._lanes)):
            if not self._lanes.ended(number):
                self._resume(number)
            yield self._results.pop(number)

    def _pass(self, index: int) -> None:
        """Run all batches through decoder layer `index`, up to the door of the next."""
        for number in range(len(self._lanes)):
            self._resume(number)

    def _run(self, index: int, number: int, call: Call) -> Any:
        """Run one batch through one decoder layer; `call` is the layer's forward with its arguments."""
        return call()

    def _forward(self, number: int) -> None:
        batch = self.batches[number]
        self._results[number] = self.model.module(**batch.inputs(self.model.device), use_cache=False)

    def _resume(self, number: int) -> None:
        self._lanes.resume(number)

    def _enter_layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index < self.skip:
            assert self.restore is not None
            return self.restore(self._lanes.current)
        if self.arrive:
            self.arrive(index, self._lanes.current, *args)
        self._lanes.pause()
        number = self._lanes.current
        if index == self.model.depth:
            kwargs, args = self._ahead_of(number, args, kwargs)
        if self.before:
            self.before(index, number, self.batches[number])
        shared = [value for value in kwargs.values() if isinstance(value, MutableMapping)]
        sizes = [len(value) for value in shared]
        run = partial(self.instead, index, forward) if self.instead else forward
        out = self._run(index, number, partial(run, *args, **kwargs))
        self.side_state |= sizes != [len(value) for value in shared]
        if self.after:
            self.after(index, number, out)
        if index == len(self.model.layers) - 1:
            self._lanes.pause()  # final norm and head run only when the outputs are asked for
        if index < self.model.depth:
            return out
        trunk = self._trunk.pop(number)
        return (trunk, *out[1:]) if isinstance(out, tuple) else trunk

    def _ahead_of(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """The arguments of the multi-token-prediction layer, from those that the model passes to it as one more decoder layer."""
        assert self.model.ahead is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        self._trunk[number] = hidden
        home = self.model.device
        given = self.model.ahead(self.batches[number].input_ids.to(home), hidden.to(home)).to(hidden.device)
        return (kwargs, (given, *args[1:])) if args else ({**kwargs, "hidden_states": given}, args)


class HaltingWalk(Walk):
    """A walk that halts at the decoder layers `at`, where every batch's call of the layer is available, with the arguments that the layers
    before it produced. The layer can run on them repeatedly, changed or watched, before all batches go on to the next layer.

    Args:
        halt: called as halt(layer, calls) when every batch has reached the layer. It may return the outputs of all batches, which then
            replace the layer's; otherwise the layer runs.
        more: further arguments of `Walk`.
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: Sequence[Batch],
        at: Collection[int],
        halt: Callable[[int, list[Call]], list[Any] | None],
        **more: Any,
    ) -> None:
        super().__init__(model, batches, **more)
        self.at, self.halt = frozenset(at), halt
        self._calls: list[Call] = []
        self._ready: dict[int, Any] = {}

    def _pass(self, index: int) -> None:
        super()._pass(index)
        if index in self.at:
            calls, self._calls = self._calls, []
            self._ready = dict(enumerate(self.halt(index, calls) or []))
            super()._pass(index)

    def _run(self, index: int, number: int, call: Call) -> Any:
        if index in self.at:
            self._calls.append(call)
            self._lanes.pause()
            if number in self._ready:
                return self._ready.pop(number)
        return call()
