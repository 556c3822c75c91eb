"""The exact loss of dropping any subset of a layer's experts, without running an expert twice.

Every expert runs once on every token. Only inner products of the outputs are kept: G_t = F_t F_t^T, with the outputs F_t [experts, hidden]
of token t. Dropping the experts D re-routes the token from routing weights a to a'(D), and the routed output changes by

    err_t(D) = || z_t - z'_t(D) ||^2 = (a'(D) - a)^T G_t (a'(D) - a).

a'(D) is the routing of the family's own router from its logits with those of D masked (as `surgery.mask` defines it). The router's forward
is re-run on the stored logits, with everything before them on the meta device, where it costs nothing. Shared experts cancel. Padding never
counts. (Lu et al., "Not All Experts are Equal", arXiv 2402.14800; the authors re-run the block for every subset.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch

from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules, subsets
from expertsmith.ranks import current

FEW_COLUMNS = 16
EXACT_COLUMNS = 32  # inner products are kept in float64 up to this many experts, in float32 above
PAIRS_ON_CPU, PAIRS_ON_DEVICE = 2**20, 2**25  # inner products gathered, or logits routed, at once
TOKENS = 16  # at least so many in a block of many sets
SAME = 1e-6  # relative difference up to which two routings count as the same
RANKS = 20  # the most ranks of a token for which sets are evaluated by state (`Probe._by_state`)
CHECKED = 8  # losses that are computed in both ways, as a check
ROUTED, ROUTED_EXPERT, MULTIPLIED, LOOKED_UP = 1e-7, 1e-8, 1e-9, 5e-9  # seconds on two cores: see Probe.seconds


Array = np.ndarray[Any, Any]


class Chosen(Protocol):
    """What a search returns."""

    @property
    def keep(self) -> list[int]:
        """The kept ids, ascending."""


Result = TypeVar("Result", bound=Chosen)
# what dropping an expert changes: the tokens that use it; the weights of all others too, by one factor; more
Reach = Literal["users", "scaled", "all"]
Route = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # logits, dropped → selected, weights


def probe_bytes(tokens: int, experts: int) -> int:
    """Bytes of memory for the probe of a layer: the upper triangle of each token's inner products, and its logits."""
    size = 8 if experts <= EXACT_COLUMNS else 4
    return tokens * (experts * (experts + 1) // 2 * size + experts * 4)


def at_once(device: torch.device) -> int:
    """How many inner products to gather, or logits to route, at once: as many as fit into a CPU's caches, or keep a device busy."""
    return PAIRS_ON_CPU if device.type == "cpu" else PAIRS_ON_DEVICE


class Probe:
    """The loss oracle of one layer.

    `selections` [E] are the tokens routed to each expert with nothing dropped. Losses are sqrt(sum_t err_t) (loss "global": the Frobenius
    norm of the paper), or the sum of sqrt(sum_t err_t) over groups of consecutive sequences (loss "authors": their code's sum over
    calibration batches).

    Sets are evaluated in blocks of tokens x sets, limited by memory, and their losses are fetched together: a call waits for the device
    once, not once a set. Two shortcuts depend on what dropping an expert does to the tokens that do not use it, which is tested numerically
    (`_found_reach`). If it does nothing: `removals` re-routes a token only without each of its own experts. If that, or if all weights of a token
    grow by one factor: sets with the same effect on a token are evaluated once (`_by_state`).

    Under `torchrun` every rank has the tables of its own tokens. Sums over tokens are added over the ranks, for all sets of a call
    together, before roots are taken; so every rank gets the same losses and must ask for the same sets in the same order.
    """

    def __init__(self, layer: int, rules: Rules, tables: Tables, route: Route, sizes: Sequence[int], tokens: int) -> None:
        """`sizes`: the tables' tokens in each group; `tokens`: of all ranks."""
        self.layer, self.rules, self.num_experts, self.tokens = layer, rules, rules.num_experts, tokens
        self._tables, self._route = tables, route
        self._ends: list[int] = np.cumsum(sizes).tolist()  # of the groups of tokens
        self._at_once = max(1, at_once(tables.logits.device) // max(tables.logits.shape[1], tables.pairs))  # routings
        self._reach: Reach | None = "all" if rules.groups > 1 else None  # None: not known yet
        self._promised: dict[tuple[int, ...], float] = {}
        taken = tables.selected[(tables.weights != 0) & (tables.selected < self.num_experts)]
        self.selections: Array = current().summed(torch.bincount(taken, minlength=self.num_experts)).cpu().numpy()

    def loss(self, dropped: Sequence[int]) -> float:
        """The loss with the experts `dropped` removed and every token re-routed.

        Raises:
            UserError: fewer experts remain than the router needs, or the outputs are not finite.
        """
        key = self._key(dropped)
        value = float(self._fetch(self._one_by_one(self._gone([key]), nothing=not key))[0])
        rounding = max(SAME, 4 * torch.finfo(self._tables.logits.dtype).eps)  # equal logits in half precision: see _found_local
        if abs(value - self._promised.get(key, value)) > rounding * value:
            self._reach = "all"  # dropping an expert changed tokens that do not use it
        return value

    def losses(self, dropped: Array) -> Array:
        """The loss of every row of `dropped` [sets, dropped experts]."""
        self._key(dropped[0].tolist())
        gone = self._gone(dropped)
        if self._few_states(dropped.shape[1], len(dropped)):
            found = self._fetch(self._by_state(gone, dropped.shape[1]))
            checked = np.unique([*np.linspace(0, len(found) - 1, CHECKED).astype(int), found.argmin()])
            if np.allclose(self._fetch(self._one_by_one(self._gone(dropped[checked]))), found[checked], rtol=SAME, atol=0):
                return found
        return self._fetch(self._one_by_one(gone))

    def seconds(self, count: int) -> float:
        """Estimated time of `losses` for all sets of `count` experts: its operations at the rates of two usual cores, on any machine."""
        sets = subsets(self.rules, count)
        each = ROUTED + ROUTED_EXPERT * self._tables.logits.shape[1] + MULTIPLIED * self._tables.pairs
        if self._few_states(count, sets):
            more = 3 if self._found_once() == "scaled" else 1  # errors of a state, and values looked up for a set
            return self.tokens * more * (self._states(count) * each + sets * LOOKED_UP)
        return self.tokens * sets * each

    def removals(self, dropped: Sequence[int]) -> dict[int, float]:
        """Expert → the loss with it dropped as well, for every expert that may be dropped next.

        With expert_groups, these are the experts of the groups that have lost the fewest, so that the groups end up equal. Empty if the
        router needs all remaining experts.
        """
        return self.removals_of([dropped])[0]

    def removals_of(self, sets: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """`removals` of each of several sets of the same size."""
        keys = [self._key(dropped) for dropped in sets]
        allowed = [self._allowed(key) for key in keys]
        if not any(allowed):
            return [{} for _ in keys]
        then = [{e: tuple(sorted((*key, e))) for e in experts} for key, experts in zip(keys, allowed, strict=True)]
        if self._found_once() == "users":
            table = self._fetch(self._without_each(self._gone(keys), nothing=not keys[0]))
            values = {drop: float(row[e]) for row, drops in zip(table, then, strict=True) for e, drop in drops.items()}
            self._promised = values
        else:
            every = list(dict.fromkeys(drop for drops in then for drop in drops.values()))
            values = dict(zip(every, self._fetch(self._one_by_one(self._gone(every))).tolist(), strict=True))
        return [{e: values[drop] for e, drop in drops.items()} for drops in then]

    def _found_once(self) -> Reach:
        if self._reach is None:
            found = current().gather(self._found_reach())
            self._reach = found[0] if len(set(found)) == 1 else "all"
        return self._reach

    def _found_reach(self) -> Reach:
        """Which tokens dropping an expert changes. Tested on float32 logits without ties: in a bfloat16 router, the last bit of the
        softmax's sum, or the order of two equal logits, also changes tokens that do not use the expert."""
        logits = self._tables.logits.float()
        apart = torch.finfo(self._tables.logits.dtype).eps * torch.rand(
            logits.shape, generator=torch.Generator().manual_seed(0)
        )
        logits = logits + apart.to(logits.device) * logits.abs().amax(1, keepdim=True)
        experts, shared = self._allowed(()), logits.shape[1] == self.num_experts
        users = scaled = True
        gone, tried = self._gone([(), *((e,) for e in experts)]), torch.tensor(experts, device=logits.device)
        for rows in self._blocks(len(gone)):
            selected, weights = self._routes(logits[rows], gone[None])
            dense = weights.new_zeros(*weights.shape[:2], self._tables.columns).scatter_add_(2, selected, weights)
            before = dense[:, :1]
            others = ~(selected[:, 0, :, None] == tried).any(1)
            factor = 1 / (1 - logits[rows].double().softmax(1)[:, tried, None]) if shared else torch.ones_like(dense[:, 1:, :1])
            found = []
            for wanted in (before, before * factor):
                moved = (dense[:, 1:] - wanted).abs().amax(2) > SAME * wanted.abs().amax(2)
                found.append(not bool((moved & others).any()))
            users, scaled = users and found[0], scaled and shared and found[1]
            if not (users or scaled):
                return "all"
        return "users" if users else "scaled"

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

    def _gone(self, drops: Sequence[tuple[int, ...]] | Array) -> torch.Tensor:
        """Whether an expert is dropped, [sets, E]. The sets have one size, except that the first may be empty."""
        table = np.zeros((len(drops), self.num_experts), dtype=bool)
        first = 0 if len(drops[0]) else 1
        if len(drops) > first and len(drops[first]):
            np.put_along_axis(table[first:], np.asarray(drops[first:], dtype=np.int64), True, axis=1)
        return torch.from_numpy(table).to(self._tables.logits.device)

    def _blocks(self, routings: int, least: int = 1) -> Iterator[slice]:
        """The tokens in blocks, sized for `routings` routings of each token."""
        size = max(least, self._at_once // routings)
        here = self._tables.tokens
        return (slice(start, min(start + size, here)) for start in range(0, here, size))

    def _routes(self, logits: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Selected experts and weights [tokens, sets, slots] with `gone` [tokens or 1, sets, E] dropped; all in one replay."""
        shape = (len(logits), gone.shape[1])
        repeated = logits.unsqueeze(1).expand(*shape, -1).reshape(-1, logits.shape[1])
        selected, weights = self._route(repeated, gone.expand(*shape, -1).reshape(-1, self.num_experts))
        return selected.view(*shape, -1), weights.double().view(*shape, -1)

    def _kept(self, rows: slice, gone: torch.Tensor, nothing: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The routing of a block with `gone` [sets, E] dropped; if that is `nothing`, the observed routing, bit for bit."""
        if nothing:
            return self._tables.selected[rows].unsqueeze(1), self._tables.weights[rows].unsqueeze(1)
        return self._routes(self._tables.logits[rows], gone[None])

    def _errors(self, rows: slice | torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
        """The errors [tokens, sets] of a block."""
        return self._tables.errors(rows, *self._routes(self._tables.logits[rows], gone))

    def _one_by_one(self, gone: torch.Tensor, nothing: bool = False) -> torch.Tensor:
        """The losses [sets] with `gone` [sets, E] dropped: every token is re-routed for every set."""
        sums, width = self._sums(len(gone)), max(1, min(len(gone), self._at_once // TOKENS))
        for rows in self._blocks(width):
            for first in range(0, len(gone), width):
                sets = slice(first, first + width)
                self._add(sums[:, sets], rows, self._tables.errors(rows, *self._kept(rows, gone[sets], nothing)))
        return _norms(sums)

    def _without_each(self, gone: torch.Tensor, nothing: bool) -> torch.Tensor:
        """The losses [sets, columns] with `gone` [sets, E] and one more expert dropped: only tokens that use it are re-routed."""
        tables, slots = self._tables, self._tables.selected.shape[1]
        sums = self._sums(len(gone), tables.columns)
        width = max(1, min(len(gone), self._at_once // (TOKENS * slots)))
        for rows in self._blocks(width * slots):
            for first in range(0, len(gone), width):
                sets = slice(first, first + width)
                selected, weights = self._kept(rows, gone[sets], nothing)
                errors = tables.errors(rows, selected, weights).unsqueeze(2)
                less = torch.zeros(*selected.shape, tables.columns, dtype=torch.bool, device=gone.device)
                less = less.scatter_(3, selected.unsqueeze(3), True)[..., : self.num_experts] | gone[None, sets, None]
                moved = self._errors(rows, less.flatten(1, 2)).view(selected.shape)
                self._add(sums[:, sets], rows, errors.repeat(1, 1, tables.columns).scatter_(2, selected, moved))
        return _norms(sums)

    def _states(self, count: int) -> int:
        """The number of states of a token with `count` dropped experts: the choices of its top_k kept experts among its first ranks."""
        return math.comb(count + self.rules.top_k, count)

    def _few_states(self, count: int, sets: int) -> bool:
        """Whether `_by_state` is correct (as far as tested) and less work."""
        ranked = self._tables.logits.shape[1] == self.num_experts and self._tables.selected.shape[1] == self.rules.top_k
        few = count + self.rules.top_k <= RANKS and self._states(count) * 2 <= sets
        if not (count > 0 and ranked and few):
            return False
        # weights in half precision are rounded after the factor, so it would not be exact
        return self._found_once() == "users" or (self._found_once() == "scaled" and self._tables.logits.dtype == torch.float32)

    def _by_state(self, gone: torch.Tensor, count: int) -> torch.Tensor:
        """The losses [sets] with `gone` [sets, E] dropped, `count` each, if dropping an expert changes only the tokens that use it, or all
        weights of the others by one factor.

        A set acts on a token only by its state: which of its first count + top_k ranks are dropped, up to its last selected expert. There
        are `_states` of them, and each is routed once; the factor then follows from the share of the softmax that the set leaves. Tokens
        without clear ranks, because logits are equal or experts do not move up one by one, are re-routed for every set.
        """
        scaled = self._found_once() == "scaled"
        patterns = _Patterns(count, self.rules.top_k, gone.device)
        sums, chosen = self._sums(len(gone)), gone.T.float()
        width = max(1, min(len(gone), at_once(gone.device) // TOKENS))
        for rows in self._blocks(len(patterns.dropped), TOKENS):
            order, unclear = self._ranks(rows, count)
            states = [
                self._at_ranks(order, part) for part in torch.split(patterns.dropped, max(1, self._at_once // len(order)))
            ]
            share = self._tables.logits[rows].double().softmax(1) if scaled else None
            found = [
                self._scaled_errors(rows, part, share) if share is not None else (self._errors(rows, part),) for part in states
            ]
            by_state = [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
            value = torch.zeros(len(order), self.num_experts, device=gone.device)
            value.scatter_(1, order, patterns.value.expand_as(order))
            for first in range(0, len(gone), width):
                sets = slice(first, first + width)
                pattern = torch.mm(value, chosen[:, sets]).long()  # sums of different powers of two: exact
                state = patterns.state[pattern]
                errors = by_state[0].gather(1, state)
                if share is not None:
                    left = torch.mm(share, 1 - chosen[:, sets].double())
                    errors = ((errors / left - 2 * by_state[1].gather(1, state)) / left + by_state[2][:, :1]).clamp_min_(0)
                for token in unclear:
                    parts = torch.split(gone[sets], self._at_once)
                    errors[token] = torch.cat(
                        [self._errors(slice(rows.start + token, rows.start + token + 1), part[None])[0] for part in parts]
                    )
                self._add(sums[:, sets], rows, errors)
        return _norms(sums)

    def _scaled_errors(self, rows: slice, gone: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(A, B, C) [tokens, sets]: with `gone` and further experts dropped that no token of its sets uses, the weights are those with `gone` alone
        times kept / left, sums of `share`, the softmax over all experts; and the error, a square in that factor, is A / left^2 - 2 B / left + C."""
        selected, weights = self._routes(self._tables.logits[rows], gone)
        kept = torch.where(gone, 0.0, share[:, None]).sum(2)
        plus, minus, none = (self._tables.errors(rows, selected, weights * factor) for factor in (1, -1, 0))
        return ((plus + minus) / 2 - none) * kept.square(), (minus - plus) / 4 * kept, none

    def _ranks(self, rows: slice, count: int) -> tuple[torch.Tensor, list[int]]:
        """The experts [tokens, top_k + count] in the order in which they move up as those before them are dropped (the first top_k in any
        order), and the tokens of the block that have no such order."""
        logits = self._tables.logits[rows]
        gone = torch.zeros(len(logits), 1, self.num_experts, dtype=torch.bool, device=logits.device)
        selected = self._routes(logits, gone)[0][:, 0]
        unclear = (logits.sort(1).values.diff(dim=1) == 0).any(1)
        held, order = torch.zeros_like(gone[:, 0]).scatter_(1, selected, True), [*selected.T]
        for place in range(count):
            gone[:, 0].scatter_(1, order[place][:, None], True)
            now = torch.zeros_like(held).scatter_(1, self._routes(logits, gone)[0][:, 0], True)
            new = now & ~held
            unclear |= (new.sum(1) != 1) | ((now ^ held).sum(1) != 2) | (now & gone[:, 0]).any(1)
            order.append(new.byte().argmax(1))
            held = now
        return torch.stack(order, 1), unclear.nonzero()[:, 0].tolist()

    def _at_ranks(self, order: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """Mask [tokens, states, E] of the experts at the ranks `dropped` [states, ranks]."""
        shape = (len(order), *dropped.shape)
        gone = torch.zeros(*shape[:2], self.num_experts, dtype=torch.bool, device=order.device)
        return gone.scatter_(2, order[:, None].expand(shape), dropped.expand(shape))

    def _sums(self, *sets: int) -> torch.Tensor:
        return torch.zeros(len(self._ends), *sets, dtype=torch.float64, device=self._tables.logits.device)

    def _add(self, sums: torch.Tensor, rows: slice, errors: torch.Tensor) -> None:
        """Add a block's `errors` [tokens, sets…] to the sums of their groups of tokens."""
        start = 0
        for group, end in enumerate(self._ends):
            first, last = max(start, rows.start), min(end, rows.stop)
            if first < last:
                sums[group] += errors[first - rows.start : last - rows.start].sum(0)
            start = end

    def _fetch(self, losses: torch.Tensor) -> Array:
        values: Array = losses.cpu().numpy()
        if not np.isfinite(values).all():
            raise UserError(
                f"decoder layer {self.layer}: the experts' outputs are not finite",
                "the activations overflow in this dtype: try --dtype float32",
            )
        return values


def _norms(sums: torch.Tensor) -> torch.Tensor:
    """The losses [sets…] from the sums of squares [groups, sets…] of this rank's tokens."""
    total: torch.Tensor = current().summed(sums)
    return total.sqrt().sum(0)


class _Patterns:
    """The ways to drop some of a token's first ranks. The `value` of a rank is 2^rank, and a pattern is the sum over the dropped ranks.
    `state` [patterns] is the row of `dropped` [states, ranks] for a pattern; ranks after the last selected expert do not count."""

    def __init__(self, count: int, top_k: int, device: torch.device) -> None:
        ranks = count + top_k
        dropped, state = [], np.zeros(2**ranks, dtype=np.int64)
        for number, chosen in enumerate(combinations(range(ranks), top_k)):
            before = [rank not in chosen and rank < chosen[-1] for rank in range(ranks)]
            dropped.append(before)
            state[sum(2**rank for rank in range(ranks) if before[rank]) :: 2 ** (chosen[-1] + 1)] = number
        self.dropped = torch.tensor(dropped, device=device)
        self.state = torch.from_numpy(state).to(device)
        self.value = (2.0 ** torch.arange(ranks)).to(device)


class Tables:
    """The stored values of every token: logits, routing, target, and the inner products of its experts' outputs.

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
        """Store the inner products of `outputs` [columns, tokens, hidden]: outputs (and target vectors) of the tokens at `places`."""
        by_token = outputs.transpose(0, 1).to(self.products.dtype)
        self.products[places] = torch.bmm(by_token, by_token.transpose(1, 2))[:, self.first, self.second]

    @property
    def pairs(self) -> int:
        """The largest number of inner products that the error of a routing needs."""
        width = min(self.columns, self.selected.shape[1] + self.goal.shape[1])
        return self.first.numel() if self.columns <= FEW_COLUMNS else width * (width + 1) // 2

    def errors(self, rows: torch.Tensor | slice, selected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The errors (a' - a)^T G (a' - a) [tokens at `rows`, …] of routings [tokens, …, slots]; exactly 0 for the target's routing."""
        shape = selected.shape[:-1]
        selected, weights = (value.reshape(shape[0], -1, value.shape[-1]) for value in (selected, weights))
        goal, share = (value[rows].unsqueeze(1).expand(-1, selected.shape[1], -1) for value in (self.goal, self.share))
        move = weights.new_zeros(*selected.shape[:2], self.columns)
        move.scatter_add_(2, selected, weights).scatter_add_(2, goal, -share)
        if self.columns <= FEW_COLUMNS:  # using all products costs less than finding the right ones
            products = (self.products[rows] * self.twice).unsqueeze(1)
            both = move.index_select(2, self.first).mul_(move.index_select(2, self.second)).mul_(products)
            return both.sum(2).clamp_min_(0).view(shape)
        ids = torch.cat((selected, goal), 2).flatten(0, 1)
        start = torch.arange(self.tokens, device=ids.device)[rows].mul_(self.products.shape[1])
        start = start.repeat_interleave(selected.shape[1], output_size=len(ids))
        return self._errors_at(start, ids, move.flatten(0, 1)).view(shape)

    def _errors_at(self, start: torch.Tensor, ids: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        """The errors [routings] of the changes at the columns `ids` [routings, slots]; the token's products begin at `start`."""
        slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        last = torch.zeros_like(move, dtype=torch.int64).scatter_(1, ids, slots)
        once = last.gather(1, ids) == slots  # an expert in two slots counts in one of them
        width = int(once.sum(1).max()) if ids.device.type == "cpu" else ids.shape[1]  # elsewhere this would wait for the device
        if width < ids.shape[1]:
            order = once.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
            ids, once = ids.gather(1, order), once.gather(1, order)
        move = move.gather(1, ids) * once
        first, second = torch.triu_indices(width, width, device=ids.device)
        at = ids.index_select(1, first).mul_(self.columns).add_(ids.index_select(1, second))
        at = self.place.view(-1)[at.view(-1)].view_as(at).add_(start[:, None])
        products = self.products.view(-1).index_select(0, at.view(-1)).view_as(at).double()
        both = move.index_select(1, first).mul_(move.index_select(1, second)).mul_(2 - (first == second).double())
        return both.mul_(products).sum(1).clamp_min_(0)
