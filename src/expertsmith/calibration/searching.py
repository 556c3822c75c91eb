"""Run data through the model once, and choose the experts of every layer from its probe (`calibration.probe`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch

from expertsmith.calibration.data import TokenData
from expertsmith.calibration.places import Places, sample_places
from expertsmith.calibration.probe import SAME, Probe, Result, Route, Tables, probe_bytes
from expertsmith.calibration.replay import RoutedBlock, Seen, router_extras
from expertsmith.engine import Batch, LoadedModel
from expertsmith.engine.devices import free_memory
from expertsmith.engine.walk import Call, HaltingWalk
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.ranks import current
from expertsmith.views.progress import Progress, Silent

Loss = Literal["global", "authors"]
AT_ONCE = 2**25  # elements of expert outputs in memory at once
ROOM = 0.5  # share of free memory that the tables of a layer may take


class _Search:
    """The search in one decoder layer: its tables are filled while the batches pass, then the choice is made.

    Progressive: the first half of the batches are the dense copies, which give the targets if `vectors`; the second half are the pruned
    copies, which give the inputs, and run again without the dropped experts.
    """

    def __init__(
        self, block: RoutedBlock, places: Places, progressive: bool, vectors: bool, decide: Callable[[Tables], list[int]]
    ) -> None:  # fmt: skip
        self.block, self.places, self.decide = block, places, decide
        self.progressive, self.vectors = progressive, vectors
        self.tables: Tables | None = None
        self.targets: dict[int, torch.Tensor] = {}  # dense copy → routed outputs of its sampled tokens
        self.decided = False
        self.number = 0  # of the batch that runs
        self.dropped: torch.Tensor | None = None

    def visit(self, seen: Seen, routed: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Process a batch at the experts; returns the experts to drop for it, or None."""
        number, batches = self.number, len(self.places.rows)
        if self.progressive and number < batches:
            if self.vectors and not self.decided:
                self.targets[number] = routed()[self.places.rows[number]]
            return None
        if self.decided:
            return self.dropped if self.progressive else None
        self._take(number % batches, seen)
        return None

    def outputs(self, calls: list[Call]) -> list[Any]:
        """Choose from all batches' calls of the layer; returns the outputs of the dense copies, and those of the pruned ones without the
        dropped experts."""
        dense = len(self.places.rows)
        made = []
        for self.number, call in enumerate(calls):
            output = call()
            made += [output] if self.number < dense else []
        self.finish()
        for self.number in range(dense, len(calls)):
            made.append(calls[self.number]())
        return made

    def finish(self) -> None:
        """Choose, after all batches were seen."""
        if not self.decided:
            assert self.tables is not None
            self.settle(self.decide(self.tables))
            self.tables = None

    def settle(self, dropped: Sequence[int]) -> None:
        """Set the choice."""
        self.decided = True
        if dropped:
            device = next(self.block.experts.parameters()).device
            self.dropped = torch.zeros(self.block.num_experts, dtype=torch.bool, device=device)
            self.dropped[list(dropped)] = True

    def _take(self, number: int, seen: Seen) -> None:
        rows, places = self.places.rows[number], self.places.places[number]
        columns = self.block.columns(seen)
        if self.tables is None:
            self.tables = Tables(self.places.count, columns, seen.selected.shape[1], seen.logits, self.vectors)
        tables = self.tables
        tables.logits[places], tables.selected[places] = seen.logits[rows], seen.selected[rows].long()
        tables.weights[places] = seen.weights[rows].double()
        if len(rows):
            self._check(places)
        target = self.targets.pop(number) if self.vectors else None
        at_once = max(1, AT_ONCE // (tables.columns * seen.x.shape[1]))
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            outputs = self.block.outputs(seen, rows[part], columns)
            if target is not None:
                outputs = torch.cat((outputs, target[part].to(outputs.dtype).unsqueeze(0)))
            tables.add_products(places[part], outputs)

    def _check(self, places: torch.Tensor) -> None:
        """Check that a re-run with nothing dropped gives the observed routing; otherwise the family's record is wrong."""
        tables = self.tables
        assert tables is not None
        nothing = torch.zeros(self.block.num_experts, dtype=torch.bool, device=places.device)
        selected, weights = self.block.route(tables.logits[places], nothing)
        same = bool((selected == tables.selected[places]).all())
        if not same or not torch.allclose(weights.double(), tables.weights[places], rtol=SAME, atol=0, equal_nan=True):
            raise RuntimeError(f"{type(self.block.router).__name__}: the replayed routing differs from the model's")


def _refuse_what_does_not_fit(model: LoadedModel, tokens: int, columns: int) -> None:
    free = min(map(free_memory, set(model.places)))
    tokens, free = max(current().gather((tokens, free)), key=lambda held: held[0] / max(1, held[1]))
    need = probe_bytes(tokens, columns)
    if need > ROOM * free:
        fitting = int(ROOM * free / probe_bytes(1, columns)) * current().world
        raise UserError(
            f"the inner products of {columns} experts' outputs on {tokens:,} tokens take {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free",
            f"look at a sample of the tokens: -O tokens={max(1, fitting // 1000) * 1000} or fewer in all domains together",
        )


def _batches(model: LoadedModel, data: TokenData, batch_tokens: int) -> list[Batch]:
    """The batches of this rank."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    batches = data.batches(batch_tokens, pad_id=pad if isinstance(pad, int) and pad >= 0 else 0)
    rank, world = current().rank, current().world
    if len(batches) < world:
        raise UserError(
            f"the text makes {len(batches)} batches, which cannot be split over {world} processes",
            "start fewer processes, or pass a smaller --batch-tokens",
        )
    return batches[rank::world]


def _sizes(data: TokenData, places: Places, loss: Loss, batch_size: int) -> list[int]:
    """How many tokens of this rank are in each group that has a norm of its own."""
    if loss == "global":
        return [places.count]
    groups = math.ceil(sum(map(len, data.sequences.values())) / batch_size)
    sizes: list[int] = torch.bincount(places.sequence // batch_size, minlength=groups).tolist()
    return sizes


def _agreed(layer: int, choice: Result) -> Result:
    """A choice that all ranks have made."""
    if any(keep != choice.keep for keep in current().gather(choice.keep)):
        raise RuntimeError(f"decoder layer {layer}: the ranks chose different experts")
    return choice


def search_layers(  # noqa: C901  (the hooks of one walk, which share what they have found)
    model: LoadedModel,
    data: TokenData,
    choose: Callable[[Probe], Result],
    *,
    rules: Mapping[int, Rules],
    done: Callable[[int], Result | None] | None = None,
    progressive: bool = False,
    loss: Loss = "global",
    batch_size: int = 8,
    batch_tokens: int = 8192,
    max_tokens: int = 0,
    seed: int = 42,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Result]]:
    """Run the data through the model once and let `choose` decide every MoE layer from its probe; yields (decoder layer, choice).

    Layer by layer (section A of the method): inputs and targets are those of the original model. Progressive (section B): targets are the
    original model's, inputs come from the layers chosen so far; every batch is carried twice. Until a layer has lost experts, both copies
    are the same.

    Under `torchrun` the batches are split over the ranks, and all ranks make the same choice: that of one process, but for sets whose losses
    differ by the rounding of a sum (about 1e-16 of them). Sets that change every token alike stay tied, since each rank adds them alike.

    Args:
        rules: by decoder layer.
        done: returns a layer's earlier choice, which is reused; None if there is none.
        batch_size: sequences of a group in the loss "authors".
        max_tokens: use a seeded sample of this many tokens a domain (0: all).

    Raises:
        UserError: no layer with routed experts, outputs that are not finite, more tokens than fit into memory, or fewer batches than ranks.
    """
    assert model.architecture is not None
    arch, progress = model.architecture, progress or Silent()
    todo = model.moe_layers
    if not todo:
        raise UserError(f"{model.checkpoint.source} has no layer with routed experts")
    batches = _batches(model, data, batch_tokens)
    places = sample_places(data, batches, max_tokens, seed, model.device)
    sampled = sum(current().gather(places.count))
    config = model.config.get_text_config().to_dict()
    extras = router_extras(arch, config)
    _refuse_what_does_not_fit(model, places.count, max(entry.num_experts for entry in rules.values()) + progressive)
    carried = [*batches, *batches] if progressive else batches
    sizes = _sizes(data, places, loss, batch_size)
    found = {layer: known for layer in todo if done and (known := done(layer)) is not None}
    watch = ExitStack()
    search: _Search | None = None
    vectors = False  # a layer has lost experts, so dense and pruned copies differ

    def gone(layer: int) -> list[int]:
        count = rules[layer].num_experts
        return sorted(set(range(count)) - set(found[layer].keep))

    def decide(layer: int, route: Route, tables: Tables) -> list[int]:
        found[layer] = _agreed(layer, choose(Probe(layer, rules[layer], tables, route, sizes, sampled)))
        return gone(layer)

    def before(layer: int, number: int, batch: Batch) -> None:
        nonlocal search
        if search is not None:
            search.number = number
        if number > 0 or layer not in todo or (layer in found and not progressive):
            return
        block = RoutedBlock(model.layers[layer], arch, rules[layer], extras)
        search = _Search(block, places.on(model.places[layer]), progressive, vectors, partial(decide, layer, block.route))
        if layer in found:
            search.settle(gone(layer))
        watch.enter_context(block.watching(search.visit))

    def after(layer: int, number: int, output: Any) -> None:
        nonlocal search, vectors
        advance(carried[number].tokens)
        if search is not None and number == len(carried) - 1:
            search.finish()
            vectors |= progressive and search.dropped is not None
            watch.close()
            search = None

    def halt(layer: int, calls: list[Call]) -> list[Any]:
        return search.outputs(calls) if search else []

    open_layers = [layer for layer in todo if layer not in found]
    walk = HaltingWalk(model, carried, open_layers if progressive else [], halt, before=before, after=after)
    last = open_layers[-1] if open_layers else -1
    tokens = sum(batch.tokens for batch in carried)
    with progress.task("search", tokens * (last + 1), "layer tokens") as advance, watch, walk:
        for layer in walk.layers(until=last):
            if layer in todo:
                yield layer, found[layer]
    for layer in todo:
        if layer > last:
            yield layer, found[layer]
