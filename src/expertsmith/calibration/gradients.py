"""Statistics of neurons that need gradients: one forward and one backward, a decoder layer at a time.

With L the sum of the next-token cross-entropies (nats) of all predicted tokens, h_c(t) the hidden activation of neuron c of an expert at a
token t that is routed to it: the sums over tokens of h_c^2, (dL/dh_c)^2 and (h_c dL/dh_c)^2. The gradient at a token comes from the losses
of its own sequence only, so the sums do not depend on how sequences are split into batches. Padding never counts.

The graph is cut at the decoder layers. The forward keeps every layer's inputs; its outputs are leaves, whose gradients collect. Backwards, a
layer is loaded again, run again with gradients, and its outputs' gradients become those of its inputs. What a model computes between two
layers stays in the graph, as do tensors that a layer leaves for later ones (shared key-value states, router states). So a streamed model
needs the memory of one layer and of the inputs, and a group of batches whose inputs fit into `STATES` goes through the model at a time; a
resident model takes one batch at a time. The order of all sums is the same, and so are their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from expertsmith.engine import Batch, LoadedModel, Walk
from expertsmith.engine.layout import expert_count, experts_of
from expertsmith.engine.neurons import Hidden, watched
from expertsmith.errors import UserError
from expertsmith.ranks import Ranks

TOKENS = 4096  # of a batch at most: its logits over the vocabulary and their gradients are in memory
STATES = 2**31  # bytes of the layers' inputs that a streamed pass keeps
AT_ONCE = 256  # neurons whose float64 copies exist at a time
NAMES = ("neuron_sq_sum", "neuron_grad_sq_sum", "neuron_product_sq_sum")
FILE = ".gradients.safetensors"
Sums = dict[int, dict[str, dict[str, torch.Tensor]]]  # layer → domain → name → [experts, neurons]
Arrays = dict[int, dict[str, dict[str, np.ndarray[Any, Any]]]]


def collect_gradients(
    model: LoadedModel, batches: Sequence[Batch], ranks: Ranks, advance: Callable[[float], object] = lambda _: None
) -> Arrays:
    """The sums of every MoE layer, by domain: float64 [experts, neurons] each. `batches` are those of this rank; all get the sums of all ranks.

    Raises:
        UserError: a gradient is not finite.
    """
    sums: Sums = {}
    held = model._experts
    model.whole()  # a backward needs all experts of a layer
    try:
        for group in groups(model, batches):
            _Pass(model, group, sums, advance).run()
    finally:
        model._experts = held
    _reduce(sums, ranks, model)
    arrays = {n: {d: {k: v.cpu().numpy() for k, v in e.items()} for d, e in held.items()} for n, held in sums.items()}
    for layer, domains in arrays.items():
        for domain, entry in domains.items():
            if not all(np.isfinite(value).all() for value in entry.values()):
                raise UserError(
                    f"decoder layer {layer}: the gradients of domain {domain} are not finite",
                    "the activations overflow in this dtype: try --dtype float32",
                )
    return arrays


def groups(model: LoadedModel, batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Batches that go through the model together: one of a resident model; of a streamed one as many as fit into `STATES`."""
    config = model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or config.d_model) * max(1, int(getattr(config, "hc_mult", 0) or 1))
    each = width * model.depth * torch.empty((), dtype=model.dtype).element_size()
    group: list[Batch] = []
    size = 0
    for batch in batches:
        more = batch.input_ids.numel() * each
        if group and (model.memory != "stream" or size + more > STATES):
            yield group
            group, size = [], 0
        group.append(batch)
        size += more
    if group:
        yield group


@dataclass
class _Call:
    """One batch's call of a decoder layer: its forward, its arguments, and what it returned, as leaves of the graph."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[torch.Tensor] = field(default_factory=list)


class _Cut(Walk):
    """A walk with gradients between the layers, whose layers from `first` on run without and are recorded in `calls`."""

    def __init__(self, model: LoadedModel, batches: Sequence[Batch], first: int) -> None:
        super().__init__(model, batches, instead=self._cut)
        self.first = first
        self.calls: dict[tuple[int, int], _Call] = {}

    def __enter__(self) -> _Cut:
        super().__enter__()
        self._guard.enter_context(torch.enable_grad())
        return self

    def _cut(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.first <= index < self.model.depth:
            with torch.no_grad():
                return forward(*args, **kwargs)
        call = _Call(forward, *_replaced((args, kwargs), {}))
        before = _written(kwargs)
        versions = [(value, value._version) for value in _tensors((args, kwargs))]
        with torch.no_grad():
            out = forward(*args, **kwargs)
        if any(value._version != version for value, version in versions):
            raise RuntimeError(f"decoder layer {index} changes its inputs in place, so it cannot be run again for gradients")
        after = _written(kwargs)
        leaves = {id(value): value.detach().requires_grad_() for value in _tensors((out, _new(before, after)))}
        call.leaves = list(leaves.values())
        for held in _mappings(kwargs):
            for key, value in list(held.items()):
                held[key] = _replaced(value, leaves)
        self.calls[index, self._lanes.current] = call
        return _replaced(out, leaves)


class _Pass:
    """One group of batches through the model, forwards and backwards."""

    def __init__(self, model: LoadedModel, batches: list[Batch], sums: Sums, advance: Callable[[float], object]) -> None:
        self.model, self.batches, self.sums, self.advance = model, batches, sums, advance
        self.first = next(layer for layer in model.moe_layers if layer < model.depth)

    def run(self) -> None:
        """Add the group's sums."""
        model, tokens = self.model, sum(batch.tokens for batch in self.batches)
        walk = _Cut(model, self.batches, self.first)
        with walk:
            for _ in walk.layers():
                self.advance(tokens)
            for batch, output in zip(self.batches, walk.outputs(), strict=True):
                loss = _loss(output.logits, batch)
                if loss.requires_grad:
                    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]  # what lies between layers can lead to the loss too
        for index in reversed(range(self.first, model.depth)):
            model.bring(index)
            if index > self.first:
                model.read_ahead(index - 1)
            model.layers[index].requires_grad_(False)
            for number, batch in enumerate(self.batches):
                self._back(index, walk.calls.pop((index, number)), batch)
            model.release(index)
            self.advance(tokens)
        model.stop_reading()

    def _back(self, index: int, call: _Call, batch: Batch) -> None:
        """Run a layer again, and pass the gradients of its outputs on to its inputs."""
        arch = self.model.architecture
        assert arch is not None
        stream = call.args[0] if call.args else call.kwargs["hidden_states"]  # needs gradients in the first layer too
        given = {id(value): value for value in _tensors((call.args, call.kwargs)) if value.requires_grad or value is stream}
        fresh = {key: value.detach().requires_grad_() for key, value in given.items()}
        with torch.enable_grad():
            args, kwargs = _replaced((call.args, call.kwargs), {key: value.clone() for key, value in fresh.items()})
            before = _written(kwargs)
            if index in self.model.moe_layers:
                with watched(self.model.layers[index], arch, partial(self._see, index, batch)):
                    out = call.forward(*args, **kwargs)
            else:
                out = call.forward(*args, **kwargs)
        made = list(_tensors((out, _new(before, _written(kwargs)))))
        pairs = [(value, leaf.grad) for value, leaf in zip(made, call.leaves, strict=True)]
        pairs = [(value, gradient) for value, gradient in pairs if gradient is not None and value.requires_grad]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
        held = [(given[key], value.grad) for key, value in fresh.items()]
        there = [(value, gradient) for value, gradient in held if gradient is not None and value.requires_grad]
        if there:  # what lies between the layers is passed once for each of its users
            torch.autograd.backward([value for value, _ in there], [gradient for _, gradient in there], retain_graph=True)

    def _see(self, index: int, batch: Batch, hidden: Hidden) -> None:
        if not hidden.values.requires_grad:
            return
        count = expert_count(experts_of(self.model.layers[index], self.model.architecture))  # type: ignore[arg-type]
        valid = batch.mask.reshape(-1).to(hidden.token.device)
        counted = hidden.routed & valid[hidden.token]
        width = hidden.values.shape[-1]
        into = self.sums.setdefault(index, {}).setdefault(batch.domain, {})
        for name in NAMES:
            if name not in into:
                into[name] = torch.zeros(count, width, dtype=torch.float64, device=hidden.values.device)
        values = hidden.values.detach().reshape(-1, width)[: len(counted)]

        def add(gradient: torch.Tensor) -> None:
            _add(into, values, gradient.reshape(-1, width)[: len(counted)], hidden.expert, counted)

        hidden.values.register_hook(add)  # type: ignore[no-untyped-call]


def _add(
    into: dict[str, torch.Tensor], values: torch.Tensor, gradient: torch.Tensor, expert: torch.Tensor, counted: torch.Tensor
) -> None:
    """Add the squares of h, dL/dh and their product, by expert; rows are sorted by it."""
    count = into[NAMES[0]].shape[0]
    ends = torch.searchsorted(expert, torch.arange(count, device=expert.device), right=True)
    lengths = torch.diff(ends, prepend=ends.new_zeros(1), append=ends.new_full((1,), expert.numel()))
    for start in range(0, values.shape[1], AT_ONCE):
        part = slice(start, start + AT_ONCE)
        h = torch.where(counted[:, None], values[:, part].double(), 0.0)
        g = torch.where(counted[:, None], gradient[:, part].double(), 0.0)
        for name, square in zip(NAMES, (h * h, g * g, (h * g) ** 2), strict=True):
            total = torch.segment_reduce(square, "sum", lengths=lengths, axis=0, unsafe=True)
            into[name][:, part] += total[:count]


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sum of the next-token cross-entropies of a batch."""
    mask = (batch.mask[:, 1:] & batch.mask[:, :-1]).to(logits.device)
    targets = batch.input_ids.to(logits.device)[:, 1:][mask]
    return torch.nn.functional.cross_entropy(logits[:, :-1][mask].float(), targets, reduction="sum")


def _reduce(sums: Sums, ranks: Ranks, model: LoadedModel) -> None:
    """Fill in what no token reached, and add up the sums of all ranks."""
    if ranks.world == 1:
        return
    import torch.distributed as dist

    shapes: dict[tuple[int, str], Any] = {}
    for found in ranks.gather({(n, d): e[NAMES[0]].shape for n, held in sums.items() for d, e in held.items()}):
        shapes |= found
    for (layer, domain), shape in sorted(shapes.items()):
        into = sums.setdefault(layer, {}).setdefault(domain, {})
        for name in NAMES:
            if name not in into:
                into[name] = torch.zeros(shape, dtype=torch.float64, device=model.device)
            dist.all_reduce(into[name])


def save(folder: Path, arrays: Arrays) -> None:
    """Keep the sums until they are in the layers' files."""
    flat = {
        f"{layer}/{name}/{domain}": value
        for layer, domains in arrays.items()
        for domain, entry in domains.items()
        for name, value in entry.items()
    }
    partial_file = folder / f"{FILE}.partial"
    save_file(flat, partial_file)
    partial_file.replace(folder / FILE)


def load(folder: Path) -> Arrays | None:
    """The sums that an interrupted calibration has left, or None."""
    if not (folder / FILE).is_file():
        return None
    arrays: Arrays = {}
    for key, value in load_file(folder / FILE).items():
        layer, name, domain = key.split("/", 2)
        arrays.setdefault(int(layer), {}).setdefault(domain, {})[name] = value
    return arrays


# --- tensors in arguments and outputs ---


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The float tensors in a value, each once."""
    seen: set[int] = set()
    for found in _every(value):
        if found.is_floating_point() and id(found) not in seen:
            seen.add(id(found))
            yield found


def _every(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, MutableMapping):
        for held in list(value.values()):
            yield from _every(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _every(held)


def _replaced(value: Any, new: dict[int, torch.Tensor]) -> Any:
    """A copy of a value's containers, with tensors exchanged by id."""
    if isinstance(value, torch.Tensor):
        return new.get(id(value), value)
    if isinstance(value, MutableMapping):
        return type(value)((key, _replaced(held, new)) for key, held in value.items())  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        made = [_replaced(held, new) for held in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def _mappings(kwargs: dict[str, Any]) -> list[MutableMapping[Any, Any]]:
    return [value for value in kwargs.values() if isinstance(value, MutableMapping)]


def _written(kwargs: dict[str, Any]) -> list[dict[Any, Any]]:
    """What the mappings among the arguments hold: a layer may leave something there for later ones."""
    return [dict(held) for held in _mappings(kwargs)]


def _new(before: list[dict[Any, Any]], after: list[dict[Any, Any]]) -> list[Any]:
    return [
        value
        for old, new in zip(before, after, strict=True)
        for key, value in new.items()
        if key not in old or old[key] is not value
    ]
