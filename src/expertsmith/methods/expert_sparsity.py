"""Expert_Sparsity (NAEE): keep the subset whose layer output is closest to the original (Lu et al., arXiv 2402.14800, ACL 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, islice, product
from typing import Any, Literal, Protocol

import numpy as np

from expertsmith.experts.rules import Rules, keep_count, subsets
from expertsmith.methods.base import Array, Choice, Natural, Positive, method

REPORTED = 1000  # subsets listed in a layer's report
AT_ONCE = 2**18  # subsets evaluated in one call
SECONDS = 60.0  # allowed for the exact search of a layer if no limit is given
Drop = tuple[int, ...]


class Probe(Protocol):
    """The loss oracle of one layer: how much its routed output changes if experts are dropped and tokens are re-routed."""

    layer: int
    num_experts: int
    rules: Rules
    tokens: int
    selections: Array

    def loss(self, dropped: Sequence[int]) -> float:
        """The loss with these experts dropped."""

    def losses(self, dropped: Array) -> Array:
        """The loss of every row of `dropped` [sets, dropped experts]."""

    def removals_of(self, sets: Sequence[Drop]) -> list[dict[int, float]]:
        """For every set: each expert that may be dropped next → the loss with it dropped too."""

    def seconds(self, count: int) -> float:
        """The estimated time of `losses` for all sets of `count` experts, on two typical cores; the same on every machine."""


@method(
    "expert_sparsity",
    "The subset whose layer output is closest to the original",
    "arXiv 2402.14800 (ACL 2024)",
    reads="model",
    gives="choice",
    cost="one pass that runs every expert on every token, then a search a layer",
    limits="Exact if all subsets take about a minute a layer or less, or up to `limit` subsets; otherwise greedy with exchanges, without guarantee. Keeps the inner products of all expert outputs of every token.",
    budgets=("uniform",),
)
def expert_sparsity(
    probe: Probe,
    keep: int,
    *,
    loss: Literal["global", "authors"] = "global",
    batch_size: Positive = 8,
    progressive: bool = False,
    limit: Positive | Literal["auto"] = "auto",
    search: Literal["auto", "greedy", "beam"] = "auto",
    beam: Positive = 4,
    passes: Natural = 10,
    tokens: Natural = 0,
) -> Choice:
    """Find the set D of dropped experts, |D| = n - `keep`, with the smallest || Z - Z'(D) ||_F. Z is the layer's routed output over the
    calibration tokens; Z'(D) is the same output with D dropped and every token re-routed over the other experts.

    search "auto" tries all subsets if there are at most `limit`, as the paper does; the first in lexicographic order wins a tie. With
    expert_groups, every subset drops the same number from each group. limit "auto" allows about a minute a layer on two cores, counted in
    operations and not by the clock, so that every machine searches alike. For more subsets, which the paper leaves open, the search is
    backward greedy: drop the expert that costs least until `keep` are left (with groups, one of every group a round), or keep a beam of
    `beam` such sets. Then it exchanges one dropped for one kept expert, the best exchange first, while the loss falls, at most `passes`
    times. Greedy and beam have no guarantee.

    loss: "global" as in the paper, or "authors": the sum of norms over groups of `batch_size` sequences, as in their code.
    progressive: layer inputs come from the layers pruned so far; targets are still the original model's.
    tokens: use a seeded sample of this many tokens a domain; 0 uses all.

    Deviations from the authors' code: the loss does not depend on the calibration batch, outputs are not rounded to bfloat16, and experts
    run once instead of once a subset.

    Raises:
        UserError: fewer experts than the router needs, or a count that the expert_groups do not divide.
    """
    count = probe.num_experts - keep_count(keep, probe.rules, f"decoder layer {probe.layer}")
    seen: dict[Drop, float] = {}
    why: dict[str, Any] = {}
    if search == "auto" and (probe.seconds(count) <= SECONDS if limit == "auto" else subsets(probe.rules, count) <= limit):
        name, evaluated = "exact", subsets(probe.rules, count)
        seen = exact(probe, count)
        best = min(seen, key=lambda drop: (seen[drop], drop))
    else:
        name = "beam+swap" if search == "beam" else "greedy+swap"
        start = backward(probe, count, beam if search == "beam" else 1, seen)
        why["greedy_loss"] = probe.loss(start)
        best = exchange(probe, start, passes, seen)
        evaluated = len(seen.keys() | {best})
    value = probe.loss(best)
    seen[best] = value
    ranked = sorted((entry for entry in seen.items() if len(entry[0]) == count), key=lambda entry: (entry[1], entry[0]))
    why = {
        "loss": value,
        "search": name,
        "evaluated": evaluated,
        "subset_losses": [{"drop": list(drop), "loss": found} for drop, found in ranked[:REPORTED]],
        "tokens": probe.tokens,
        "selections": [int(number) for number in probe.selections],
        "unreached": [e for e in range(probe.num_experts) if not probe.selections[e]],
        **why,
    }
    return Choice(sorted(set(range(probe.num_experts)) - set(best)), why=why)


def every_subset(rules: Rules, count: int) -> Iterator[Drop]:
    """All sets of `count` dropped experts, in lexicographic order."""
    size = rules.num_experts // rules.groups
    by_group = [combinations(range(g * size, (g + 1) * size), count // rules.groups) for g in range(rules.groups)]
    return (sum(parts, ()) for parts in product(*by_group))


def exact(probe: Probe, count: int) -> dict[Drop, float]:
    """Evaluate all subsets and return those of smallest loss, as many as a report lists; lexicographic order breaks ties."""
    best: dict[Drop, float] = {}
    rest = every_subset(probe.rules, count)
    while part := list(islice(rest, AT_ONCE)):
        losses = probe.losses(np.fromiter(chain.from_iterable(part), np.int64, len(part) * count).reshape(len(part), count))
        least = np.argsort(losses, kind="stable")[:REPORTED]
        best.update({part[place]: float(losses[place]) for place in least})
        best = dict(sorted(best.items(), key=lambda entry: (entry[1], entry[0]))[:REPORTED])
    return best


def backward(probe: Probe, count: int, width: int, seen: dict[Drop, float]) -> Drop:
    """Backward search: add the expert of smallest loss to the dropped set, `count` times, keeping the `width` best sets of every size."""
    front: list[Drop] = [()]
    for _ in range(count):
        found: dict[Drop, float] = {}
        for drop, removals in zip(front, probe.removals_of(front), strict=True):
            for expert, loss in removals.items():
                found.setdefault(tuple(sorted((*drop, expert))), loss)
        seen.update(found)
        front = sorted(found, key=lambda drop: (found[drop], drop))[:width]
    return front[0]


def exchange(probe: Probe, start: Drop, passes: int, seen: dict[Drop, float]) -> Drop:
    """Exchange one dropped for one kept expert (of the same expert_group), the best exchange each time, while the loss falls."""
    best, value = start, probe.loss(start)
    for _ in range(passes):
        found: dict[Drop, float] = {}
        rests = [tuple(e for e in best if e != back) for back in best]
        for back, rest, removals in zip(best, rests, probe.removals_of(rests), strict=True):
            found.update({tuple(sorted((*rest, expert))): loss for expert, loss in removals.items() if expert != back})
        seen.update(found)
        if not found:
            break
        drop = min(found, key=lambda drop: (found[drop], drop))
        loss = probe.loss(drop)
        if loss >= value:
            break
        best, value = drop, loss
    return best
