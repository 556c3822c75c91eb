"""The exact loss of dropping any subset of a layer's experts, without running an expert twice.

Every expert runs once on every token, and of its outputs only inner products are kept: with F_t [experts, hidden] the outputs of token t,
G_t = F_t F_t^T. Dropping the experts D re-routes the token from routing weights a to a'(D), and the routed output moves by

    err_t(D) = || z_t - z'_t(D) ||^2 = (a'(D) - a)^T G_t (a'(D) - a).

a'(D) is what the family's own router makes of its own logits with those of D masked out (as `surgery.mask` defines it): the router's
forward is played again on kept logits, with everything that precedes them on the meta device, where it costs nothing. Shared experts
cancel. Padding never counts. (Lu et al., "Not All Experts are Equal", arXiv 2402.14800; the authors run the block anew for
every subset.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch

from expertsmith.calibration.data import TokenData
from expertsmith.calibration.observers import choose_sample
from expertsmith.calibration.replay import RoutedBlock, Seen, router_extras
from expertsmith.engine import Batch, LoadedModel, Walk
from expertsmith.engine.devices import free_memory
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.views.progress import Progress, Silent

Loss = Literal["global", "authors"]
FEW_COLUMNS = 16
EXACT_COLUMNS = 32  # inner products are kept in float64 up to this many experts, in float32 beyond
AT_ONCE = 2**25  # elements of expert outputs in memory at once
PAIRS_AT_ONCE = 2**22  # inner products gathered at once
SAME = 1e-6  # relative difference up to which two routings are the same
ROOM = 0.5  # share of free memory that the tables of a layer may take
STATES = 8  # routings of dropped sets that are remembered


class Chosen(Protocol):
    """What a search returns."""

    @property
    def keep(self) -> list[int]:
        """The kept ids, ascending."""


Result = TypeVar("Result", bound=Chosen)
_Route = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # logits, dropped → selected, weights


def probe_bytes(tokens: int, experts: int) -> int:
    """Memory that the probe of a layer takes: the upper triangle of each token's inner products, and its logits."""
    size = 8 if experts <= EXACT_COLUMNS else 4
    return tokens * (experts * (experts + 1) // 2 * size + experts * 4)


@dataclass
class _Routing:
    """How the tokens are routed with some experts dropped, and their errors."""

    selected: torch.Tensor  # [tokens, slots]
    weights: torch.Tensor  # [tokens, slots], float64
    errors: torch.Tensor  # [tokens], float64


class Probe:
    """The loss oracle of one layer.

    `selections` [E] are the tokens routed to each expert with nothing dropped. Losses are sqrt(sum_t err_t) (loss "global": the Frobenius
    norm of the paper), or the sum of sqrt(sum_t err_t) over groups of consecutive sequences (loss "authors": their code's sum over
    calibration batches).
    """

    def __init__(self, layer: int, rules: Rules, tables: _Tables, route: _Route, sequence_groups: torch.Tensor | None) -> None:
        self.layer, self.rules, self.num_experts, self.tokens = layer, rules, rules.num_experts, tables.tokens
        self._tables, self._route, self._groups = tables, route, sequence_groups
        self._group_count = int(sequence_groups.max()) + 1 if sequence_groups is not None else 0
        self._local: bool | None = False if rules.groups > 1 else None  # None: not known yet
        self._states: dict[tuple[int, ...], _Routing] = {}
        self._promised: dict[tuple[int, ...], float] = {}
        taken = tables.selected[(tables.weights != 0) & (tables.selected < self.num_experts)]
        self.selections: np.ndarray[Any, np.dtype[np.int64]] = torch.bincount(taken, minlength=self.num_experts).cpu().numpy()

    def loss(self, dropped: Sequence[int]) -> float:
        """The loss with the experts `dropped` gone, every token re-routed.

        Raises:
            UserError: fewer experts stay than the router needs, or the outputs are not finite.
        """
        key = self._key(dropped)
        value = self._total(self._state(key).errors)
        rounding = max(SAME, 4 * torch.finfo(self._tables.logits.dtype).eps)  # equal logits in half precision: see _found_local
        if abs(value - self._promised.get(key, value)) > rounding * value:
            self._local = False  # dropping an expert moved tokens that do not use it
        return value

    def removals(self, dropped: Sequence[int]) -> dict[int, float]:
        """For every expert that may go next: the loss with it dropped as well.

        With expert_groups these are the experts of the groups that have lost fewest, so that equal groups come out; none where the router
        needs all that stay. Where dropping an expert only concerns the tokens that use it (found out numerically), only these are routed
        anew.
        """
        key = self._key(dropped)
        state = self._state(key)
        if self._local is None:
            self._local = self._found_local(key)
        found = {}
        for expert in self._allowed(key):
            rows = torch.arange(self.tokens, device=state.errors.device)
            if self._local:
                rows = rows[(state.selected == expert).any(1)]
            errors = state.errors.clone()
            if len(rows):
                selected, weights = self._routes(self._tables.logits[rows], (*key, expert))
                errors[rows] = self._errors(rows, selected, weights)
            found[expert] = self._total(errors)
            if self._local:
                self._promised[self._key((*key, expert))] = found[expert]
        return found

    def _found_local(self, key: tuple[int, ...]) -> bool:
        """Whether no expert's going moves a token that does not use it. Judged on float32 logits without ties: where a router works in
        bfloat16, the last bit of the softmax's sum, or which of two equal logits comes first, moves tokens that have nothing to do with
        the expert."""
        logits = self._tables.logits.float()
        apart = torch.finfo(self._tables.logits.dtype).eps * torch.rand(
            logits.shape, generator=torch.Generator().manual_seed(0)
        )
        logits = logits + apart.to(logits.device) * logits.abs().amax(1, keepdim=True)
        before, weights = self._routes(logits, key)
        for expert in self._allowed(key):
            after = self._routes(logits, (*key, expert))
            if bool((self._moved(before, weights, *after) & ~(before == expert).any(1)).any()):
                return False
        return True

    def _key(self, dropped: Sequence[int]) -> tuple[int, ...]:
        key = tuple(sorted(set(dropped)))
        kept = self.num_experts - len(key)
        if kept < self.rules.top_k:
            raise UserError(
                f"decoder layer {self.layer} would keep {kept} of {self.num_experts} experts, but its router needs top_k={self.rules.top_k}",
                f"keep {self.rules.least} or more",
            )
        return key

    def _allowed(self, dropped: tuple[int, ...]) -> list[int]:
        size = self.num_experts // self.rules.groups
        lost = [sum(e // size == group for e in dropped) for group in range(self.rules.groups)]
        if size - min(lost) <= self.rules.least // self.rules.groups:
            return []
        return [e for e in range(self.num_experts) if e not in dropped and lost[e // size] == min(lost)]

    def _state(self, key: tuple[int, ...]) -> _Routing:
        if key not in self._states:
            if key:
                selected, weights = self._routes(self._tables.logits, key)
            else:
                selected, weights = self._tables.selected, self._tables.weights
            while len(self._states) >= STATES:
                del self._states[next(iter(self._states))]
            rows = torch.arange(self.tokens, device=selected.device)
            self._states[key] = _Routing(selected, weights, self._errors(rows, selected, weights))
        return self._states[key]

    def _routes(self, logits: torch.Tensor, dropped: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        gone = torch.zeros(self.num_experts, dtype=torch.bool, device=logits.device)
        gone[list(dropped)] = True
        selected, weights = self._route(logits, gone)
        return selected, weights.double()

    def _moved(self, selected: torch.Tensor, weights: torch.Tensor, *then: torch.Tensor) -> torch.Tensor:
        """[tokens] whether the routing weights are others `then`, whatever the order of the slots."""
        columns = self._tables.columns
        before = weights.new_zeros(self.tokens, columns).scatter_add_(1, selected, weights)
        after = weights.new_zeros(self.tokens, columns).scatter_add_(1, *then)
        return (after - before).abs().amax(1) > SAME * before.abs().amax(1)

    def _errors(self, rows: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        at_once = max(1, PAIRS_AT_ONCE // (selected.shape[1] + self._tables.goal.shape[1]) ** 2)
        parts = zip(*(torch.split(value, at_once) for value in (rows, selected, weights)), strict=True)
        return torch.cat([self._tables.errors(*part) for part in parts])

    def _total(self, errors: torch.Tensor) -> float:
        if self._groups is None:
            value = float(errors.sum().sqrt())
        else:
            value = float(errors.new_zeros(self._group_count).index_add_(0, self._groups, errors).sqrt().sum())
        if not np.isfinite(value):
            raise UserError(
                f"decoder layer {self.layer}: the experts' outputs are not finite",
                "the activations overflow in this dtype: try --dtype float32",
            )
        return value


class _Tables:
    """What is kept of every token: logits, routing, target, and the inner products of its experts' outputs.

    The target is a combination of columns: the token's own routing, or the last column, which then holds the target vector itself.
    """

    def __init__(self, tokens: int, columns: int, slots: int, logits: torch.Tensor, vectors: bool) -> None:
        device = logits.device
        self.tokens, self.columns = tokens, columns + vectors
        dtype = torch.float64 if columns <= EXACT_COLUMNS else torch.float32
        self.first, self.second = torch.triu_indices(self.columns, self.columns, device=device)
        self.twice = 2 - (self.first == self.second).double()
        self.place = torch.zeros(self.columns, self.columns, dtype=torch.int64, device=device)
        count = torch.arange(self.first.numel(), device=device)
        self.place[self.first, self.second] = count
        self.place[self.second, self.first] = count
        self.products = torch.zeros(tokens, count.numel(), dtype=dtype, device=device)
        self.logits = logits.new_zeros(tokens, logits.shape[-1])
        self.selected = torch.zeros(tokens, slots, dtype=torch.int64, device=device)
        self.weights = torch.zeros(tokens, slots, dtype=torch.float64, device=device)
        if vectors:
            self.goal = torch.full((tokens, 1), columns, dtype=torch.int64, device=device)
            self.share = torch.ones(tokens, 1, dtype=torch.float64, device=device)
        else:
            self.goal, self.share = self.selected, self.weights

    def add_products(self, places: torch.Tensor, outputs: torch.Tensor) -> None:
        """`outputs` [columns, tokens, hidden]: the experts' outputs (and the target vectors) of the tokens at `places`."""
        by_token = outputs.transpose(0, 1).to(self.products.dtype)
        self.products[places] = torch.bmm(by_token, by_token.transpose(1, 2))[:, self.first, self.second]

    def errors(self, rows: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[rows] (a' - a)^T G (a' - a), exactly 0 where the routing is the target's."""
        ids = torch.cat((selected, self.goal[rows]), 1)
        move = weights.new_zeros(len(rows), self.columns)
        move.scatter_add_(1, selected, weights).scatter_add_(1, self.goal[rows], -self.share[rows])
        if self.columns <= FEW_COLUMNS:  # all products are fewer than finding the right ones costs
            both = move.index_select(1, self.first).mul_(move.index_select(1, self.second)).mul_(self.twice)
            dense: torch.Tensor = torch.linalg.vecdot(both, self.products[rows].double()).clamp_min(0)
            return dense
        slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        last = torch.zeros_like(move, dtype=torch.int64).scatter_(1, ids, slots)
        once = last.gather(1, ids) == slots  # an expert in two slots counts in one of them
        width = int(once.sum(1).max())
        if width < ids.shape[1]:
            order = once.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
            ids, once = ids.gather(1, order), once.gather(1, order)
        move = move.gather(1, ids) * once
        first, second = torch.triu_indices(width, width, device=ids.device)
        at = ids.index_select(1, first).mul_(self.columns).add_(ids.index_select(1, second))
        at = self.place.view(-1)[at.view(-1)].view_as(at).add_(rows[:, None] * self.products.shape[1])
        products = self.products.view(-1).index_select(0, at.view(-1)).view_as(at).double()
        both = move.index_select(1, first).mul_(move.index_select(1, second)).mul_(2 - (first == second).double())
        errors: torch.Tensor = torch.linalg.vecdot(both, products).clamp_min(0)
        return errors


@dataclass
class Places:
    """Which tokens of the batches are looked at, and where each stands in the order of (domain, sequence, position)."""

    rows: list[torch.Tensor]  # of every batch: index into its flattened tokens
    places: list[torch.Tensor]  # of every batch: the same tokens' places
    sequence: torch.Tensor  # [tokens] of every place: the sequence, counted over all domains
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = self.sequence.numel()


def sample_places(data: TokenData, batches: Sequence[Batch], max_tokens: int, seed: int, device: torch.device) -> Places:
    """A seeded sample of `max_tokens` tokens a domain (0: all), as places in the batches."""
    wanted: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
    sequence: list[int] = []
    start = 0
    for domain in sorted(data.sequences):
        lengths = [len(row) for row in data.sequences[domain]]
        chosen = choose_sample(lengths, max_tokens, seed, domain) if max_tokens else None
        for number, length in enumerate(lengths):
            taken = np.array([chosen is None or (number, position) in chosen for position in range(length)], dtype=bool)
            wanted[domain, number] = np.where(taken, start + np.cumsum(taken) - 1, -1)
            start += int(taken.sum())
            sequence += [len(wanted) - 1] * int(taken.sum())
    rows, places = [], []
    for batch in batches:
        table = np.full(tuple(batch.input_ids.shape), -1)
        for row, number in enumerate(batch.sequences):
            held = wanted[batch.domain, number]
            table[row, : len(held)] = held
        flat = torch.from_numpy(table.reshape(-1))
        index = (flat >= 0).nonzero().squeeze(1)
        rows.append(index.to(device))
        places.append(flat[index].to(device))
    return Places(rows, places, torch.tensor(sequence, dtype=torch.int64, device=device))


class _Lockstep(Walk):
    """A walk whose batches may wait inside a layer until all others wait there too, or have left it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: list[int] = []

    @property
    def current(self) -> int:
        """The number of the batch that runs."""
        return self._lanes.current

    def wait(self) -> None:
        """Called from inside a layer, on behalf of the batch that runs."""
        self._waiting.append(self._lanes.current)
        self._lanes.pause()

    def _resume(self, number: int) -> None:
        super()._resume(number)
        if number == len(self._lanes) - 1:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                super()._resume(waiter)


class _Search:
    """One decoder layer: its tables are filled while the batches pass, then the choice is made.

    Progressive: the first half of the batches are the dense copies, which give the targets where `vectors`; the second half are the pruned
    copies, which give the inputs, wait for each other at the experts, and go on without those that were dropped.
    """

    def __init__(
        self, block: RoutedBlock, places: Places, walk: _Lockstep, progressive: bool, vectors: bool, decide: Callable[[_Tables], list[int]]
    ) -> None:  # fmt: skip
        self.block, self.places, self.walk, self.decide = block, places, walk, decide
        self.progressive, self.vectors = progressive, vectors
        self.tables: _Tables | None = None
        self.targets: dict[int, torch.Tensor] = {}  # of the dense copies: routed outputs of the tokens that are looked at
        self.decided = False
        self.dropped: torch.Tensor | None = None

    def visit(self, seen: Seen, routed: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """A batch has come to the experts."""
        number, batches = self.walk.current, len(self.places.rows)
        if self.progressive and number < batches:
            if self.vectors and not self.decided:
                self.targets[number] = routed()[self.places.rows[number]]
            return None
        if not self.decided:
            self._take(number % batches, seen)
            if self.progressive:
                self.walk.wait()
                self.finish()
        return self.dropped if self.progressive else None

    def finish(self) -> None:
        """Choose, once all batches have been seen."""
        if not self.decided:
            assert self.tables is not None
            self.settle(self.decide(self.tables))
            self.tables = None

    def settle(self, dropped: Sequence[int]) -> None:
        """The choice is made."""
        self.decided = True
        if dropped:
            device = next(self.block.experts.parameters()).device
            self.dropped = torch.zeros(self.block.num_experts, dtype=torch.bool, device=device)
            self.dropped[list(dropped)] = True

    def _take(self, number: int, seen: Seen) -> None:
        rows, places = self.places.rows[number], self.places.places[number]
        columns = self.block.columns(seen)
        if self.tables is None:
            self.tables = _Tables(self.places.count, columns, seen.selected.shape[1], seen.logits, self.vectors)
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
        """Played again with nothing dropped, the routing is the one that was seen, or the family's record is wrong."""
        tables = self.tables
        assert tables is not None
        nothing = torch.zeros(self.block.num_experts, dtype=torch.bool, device=places.device)
        selected, weights = self.block.route(tables.logits[places], nothing)
        same = bool((selected == tables.selected[places]).all())
        if not same or not torch.allclose(weights.double(), tables.weights[places], rtol=SAME, atol=0, equal_nan=True):
            raise RuntimeError(f"{type(self.block.router).__name__}: the replayed routing differs from the model's")


def _refuse_what_does_not_fit(model: LoadedModel, tokens: int, columns: int) -> None:
    need, free = probe_bytes(tokens, columns), free_memory(model.device)
    if need > ROOM * free:
        fitting = int(ROOM * free / probe_bytes(1, columns))
        raise UserError(
            f"the inner products of {columns} experts' outputs on {tokens:,} tokens take {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free",
            f"look at a sample of the tokens: -O tokens={max(1, fitting // 1000) * 1000} or fewer in all domains together",
        )


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
    """Walk the data through the model once and let `choose` decide every MoE layer from its probe; yields (decoder layer, choice).

    Layer by layer (section A of the method), inputs and targets are those of the original model. Progressive (section B): targets are the
    original model's, inputs come from the layers chosen so far; the batches are carried twice. Until a layer has lost experts, the two are
    the same.

    Args:
        rules: by decoder layer.
        done: a layer's choice where it has been made before, which is then taken over; None where not.
        batch_size: sequences of a group in the loss "authors".
        max_tokens: look at a seeded sample of so many tokens a domain (0: at all).

    Raises:
        UserError: no layer with routed experts, outputs that are not finite, or more tokens than memory has room for.
    """
    assert model.architecture is not None
    arch, progress = model.architecture, progress or Silent()
    todo = model.moe_layers
    if not todo:
        raise UserError(f"{model.checkpoint.source} has no layer with routed experts")
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    batches = data.batches(batch_tokens, pad_id=pad if isinstance(pad, int) and pad >= 0 else 0)
    places = sample_places(data, batches, max_tokens, seed, model.device)
    config = model.config.get_text_config().to_dict()
    extras = router_extras(arch, config)
    _refuse_what_does_not_fit(model, places.count, max(entry.num_experts for entry in rules.values()) + progressive)
    carried = [*batches, *batches] if progressive else batches
    groups = places.sequence // batch_size if loss == "authors" else None
    found: dict[int, Result] = {}
    watch = ExitStack()
    search: _Search | None = None
    vectors = False  # a layer has lost experts, so dense and pruned copies differ

    def gone(layer: int) -> list[int]:
        count = rules[layer].num_experts
        return sorted(set(range(count)) - set(found[layer].keep))

    def decide(layer: int, route: _Route, tables: _Tables) -> list[int]:
        found[layer] = choose(Probe(layer, rules[layer], tables, route, groups))
        return gone(layer)

    def before(layer: int, number: int, batch: Batch) -> None:
        nonlocal search
        if number > 0 or layer not in todo or (layer in found and not progressive):
            return
        block = RoutedBlock(model.layers[layer], arch, rules[layer], extras)
        search = _Search(block, places, walk, progressive, vectors, partial(decide, layer, block.route))
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

    for layer in todo:
        known = done(layer) if done else None
        if known is not None:
            found[layer] = known
    open_layers = [layer for layer in todo if layer not in found]
    walk = _Lockstep(model, carried, before, after)
    last = open_layers[-1] if open_layers else -1
    tokens = sum(batch.tokens for batch in carried)
    with progress.task("search", tokens * (last + 1), "layer tokens") as advance, watch, walk:
        for layer in walk.layers(until=last):
            if layer in todo:
                yield layer, found[layer]
    for layer in todo:
        if layer > last:
            yield layer, found[layer]
