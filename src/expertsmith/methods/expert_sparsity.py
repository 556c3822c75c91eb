"""Expert_Sparsity (NAEE): keep the subset whose layer output is closest to the original (Lu et al., arXiv 2402.14800, ACL 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, islice, product
from typing import Any, Literal, Protocol

import numpy as np

from expertsmith.experts.rules import Rules, keep_count, subsets
from expertsmith.methods.base import Array, Choice, Natural, Positive, method

REPORTED = 1000  # subsets that a layer's report lists
AT_ONCE = 2**18  # subsets that are tried at once
SECONDS = 60.0  # that the exact search of a layer may take, where no limit is given
Drop = tuple[int, ...]


class Probe(Protocol):
    """The loss oracle of one layer: how far its routed output moves when experts are dropped and the tokens re-routed."""

    layer: int
    num_experts: int
    rules: Rules
    tokens: int
    selections: Array

    def loss(self, dropped: Sequence[int]) -> float:
        """The loss with these experts dropped."""

    def losses(self, dropped: Array) -> Array:
        """The losses with the experts of each row [sets, experts that go] dropped."""

    def removals_of(self, sets: Sequence[Drop]) -> list[dict[int, float]]:
        """Of every set, for every expert that may go next: the loss with it dropped as well."""

    def seconds(self, count: int) -> float:
        """What `losses` takes for all sets of `count` experts, on two usual cores; the same whatever machine asks."""


@method(
    "expert_sparsity",
    "The subset whose layer output is closest",
    "arXiv 2402.14800 (ACL 2024)",
    reads="model",
    gives="choice",
    cost="one pass that runs every expert on every token, then a search a layer",
    limits="Exact where all subsets take about a minute a layer, or up to `limit` subsets; beyond, greedy with exchanges, without guarantee. Inner products of all experts' outputs a token are kept.",
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
    """The experts D to drop, |D| = n - `keep`, of least || Z - Z'(D) ||_F: Z the layer's routed output over the calibration tokens, Z'(D)
    the same with D dropped and every token re-routed over the rest.

    search "auto" tries all subsets (with expert_groups: all that drop equally many of every group), the first in lexicographic order on a
    tie, as the paper does, where there are at most `limit`. limit "auto" is as many as take about a minute a layer on two cores, by the
    number of operations and not by the clock, so that every machine searches alike. Beyond, which the paper leaves open: backward greedy (drop the expert that
    costs least, until `keep` are left; with groups one of every group a round), or a beam of `beam` such sets, and then exchanges of one
    dropped for one kept expert, the best first, while one lowers the loss, at most `passes`. They have no guarantee.

    loss: "global" as in the paper, or "authors": the sum of norms over groups of `batch_size` sequences, as in their code.
    progressive: layer inputs come from the layers pruned so far, targets stay those of the original model.
    tokens: look at a seeded sample of so many tokens a domain; 0 is all.

    Deviations from the authors' code: the loss does not depend on the calibration batch, outputs are not rounded to bfloat16, and experts
    run once instead of once a subset.

    Raises:
        UserError: fewer experts than the router needs, or a count that does not divide into the expert_groups.
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
    """These sets in lexicographic order."""
    size = rules.num_experts // rules.groups
    by_group = [combinations(range(g * size, (g + 1) * size), count // rules.groups) for g in range(rules.groups)]
    return (sum(parts, ()) for parts in product(*by_group))


def exact(probe: Probe, count: int) -> dict[Drop, float]:
    """The subsets of least loss of all, no more than a report lists; of equal ones the first in lexicographic order."""
    best: dict[Drop, float] = {}
    rest = every_subset(probe.rules, count)
    while part := list(islice(rest, AT_ONCE)):
        losses = probe.losses(np.fromiter(chain.from_iterable(part), np.int64, len(part) * count).reshape(len(part), count))
        least = np.argsort(losses, kind="stable")[:REPORTED]
        best.update({part[place]: float(losses[place]) for place in least})
        best = dict(sorted(best.items(), key=lambda entry: (entry[1], entry[0]))[:REPORTED])
    return best


def backward(probe: Probe, count: int, width: int, seen: dict[Drop, float]) -> Drop:
    """From the full set, drop the expert of least loss, `count` times, keeping the `width` best sets of every size."""
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
    """Exchange one dropped for one kept expert (of the same expert_group), the best of all exchanges at a time, while the loss falls."""
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
