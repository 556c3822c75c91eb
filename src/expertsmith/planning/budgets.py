"""Budgets that are found by running the masked model: how many experts each layer gives up, with the total of the uniform budget.

The ranking of the experts within a layer is the method's. A distribution is a tuple of removals, one a layer, in units of the router's
expert_groups (1 without groups); score(distribution) is ESAP on text, higher is better. The two functions at the end are the budgets; their keyword
arguments are options (`-O name=value`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.methods.base import Positive, parse

Removals = tuple[int, ...]
Kept = dict[int, list[int]]  # layer → expert ids

ATTEMPTS = 32  # draws for a feasible move, or for a distribution that is new


@dataclass(frozen=True)
class Space:
    """The permitted distributions: `total` units removed over `layers`, at most `caps` of each. `uniform`: those of the uniform budget."""

    layers: list[int]
    caps: Removals
    uniform: Removals
    unit: int = 1

    @property
    def total(self) -> int:
        """Units removed in all."""
        return sum(self.uniform)

    @property
    def free(self) -> bool:
        """Whether there is another distribution than the uniform one."""
        movable = [(taken, cap) for taken, cap in zip(self.uniform, self.caps, strict=True)]
        return any(
            give[0] > 0 and take[0] < take[1] for i, give in enumerate(movable) for j, take in enumerate(movable) if i != j
        )


def space_of(counts: Mapping[int, int], rules: Mapping[int, Rules], removable: Mapping[int, int]) -> Space:
    """The space around uniform `counts` by layer. `removable`: experts that the method can remove at most, by layer.

    Raises:
        UserError: layers with different numbers of expert_groups.
    """
    groups = {rules[layer].groups for layer in counts}
    if len(groups) > 1:
        raise UserError(
            "layers have different numbers of expert_groups, so experts cannot move between them", "use --budget uniform"
        )
    unit = groups.pop()
    caps = [min(rules[n].num_experts - rules[n].least, removable[n]) // unit for n in counts]
    uniform = [(rules[n].num_experts - count) // unit for n, count in counts.items()]
    return Space(list(counts), tuple(map(max, caps, uniform)), tuple(uniform), unit)


def allot(weights: Sequence[int], total: int, caps: Sequence[int]) -> Removals:
    """Whole shares of `total` in proportion to `weights`, none above its cap: largest remainders, of equal ones the first.

    A share that reaches its cap is fixed there, and the rest is divided again. `total` is at most sum(caps).
    """
    given, left = [0] * len(caps), total
    open_ = [i for i, cap in enumerate(caps) if cap > 0]
    while left:
        some = {i: weights[i] for i in open_}
        if not any(some.values()):
            some = dict.fromkeys(open_, 1)
        whole = sum(some.values())
        full = [i for i in open_ if left * some[i] >= caps[i] * whole]
        if full:
            for i in full:
                given[i] = caps[i]
            open_ = [i for i in open_ if i not in full]
            left = total - sum(given)
            continue
        for i in open_:
            given[i] = left * some[i] // whole
        rest = total - sum(given)
        for i in sorted(open_, key=lambda i: (-(left * some[i] % whole), i))[:rest]:
            given[i] += 1
        break
    return tuple(given)


def switched(parent: Removals, space: Space, random: Random, moves: int, step: int) -> Removals:
    """A copy of `parent` after "level switches" (EvoESAP): min(u1, u2) moves with u ~ U{1..moves}; each takes U{1..step} units from a random layer
    and gives them to another one, if both permit it, with up to 32 draws for each move."""
    taken = list(parent)
    for _ in range(min(random.randint(1, moves), random.randint(1, moves))):
        for _ in range(ATTEMPTS):
            give = [i for i, removed in enumerate(taken) if removed > 0]
            take = [i for i, removed in enumerate(taken) if removed < space.caps[i]]
            if not give or not take:
                break
            source, target, delta = random.choice(give), random.choice(take), random.randint(1, step)
            if source != target and taken[source] >= delta and taken[target] + delta <= space.caps[target]:
                taken[source] -= delta
                taken[target] += delta
                break
    return tuple(taken)


def patterns(layers: int) -> dict[str, list[int]]:
    """Name → weights of removal by layer, of the first distributions: more removed late, early, in the middle, at both ends, in the first half, in
    the second half."""
    up = [i + 1 for i in range(layers)]
    middle = [min(i + 1, layers - i) for i in range(layers)]
    return {
        "up": up,
        "down": up[::-1],
        "middle": middle,
        "ends": [max(middle) + 1 - weight for weight in middle],
        "front": [3 if 2 * i < layers - 1 else 1 for i in range(layers)],
        "back": [3 if 2 * i > layers - 1 else 1 for i in range(layers)],
    }


def first_generation(space: Space, random: Random, size: int) -> list[Removals]:
    """`size` different distributions, or fewer if there are no more: the uniform one, the patterns, then random weights."""
    found = [space.uniform]

    def candidates() -> Iterator[Removals]:
        for weights in patterns(len(space.layers)).values():
            yield allot(weights, space.total, space.caps)
        for _ in range(ATTEMPTS * size):
            yield allot([random.randint(1, 1000) for _ in space.layers], space.total, space.caps)

    for made in candidates():
        if len(found) == size:
            break
        if made not in found:
            found.append(made)
    return found


# --- scoring ---


@dataclass(frozen=True)
class Judge:
    """What runs the masked model. `score`: kept experts → ESAP; `fingerprint`: of the text that it reads; `source`: of the text that this was
    taken from; `tokens`: those predicted."""

    score: Callable[[Kept], float]
    fingerprint: str
    source: str
    tokens: int
    exact: bool


@dataclass
class Search:
    """What a searched budget is made with. `judge`: opens the model with that many sequences of the text; `folder`: where scores are kept."""

    values: dict[str, Any]
    seed: int
    judge: Callable[[int], Judge]
    dtype: str = "auto"
    folder: Path | None = None


@dataclass
class Scores:
    """Scores of distributions; the same kept experts are never run twice. `known`: digest of kept experts → score, also from an earlier run; `save`
    is called with new ones."""

    space: Space
    kept: Callable[[Removals], Kept]
    score: Callable[[Kept], float]
    random: Random
    note: Callable[[str], None] = lambda text: None
    advance: Callable[[float], object] = lambda amount: None
    known: dict[str, float] = field(default_factory=dict)
    save: Callable[[str, float], None] = lambda key, score: None
    seen: dict[Removals, float] = field(default_factory=dict)  # of this search, in order

    def __call__(self, removals: Removals) -> float:
        """The score of a distribution."""
        if removals not in self.seen:
            kept = self.kept(removals)
            key = hashlib.sha256(json.dumps(sorted(kept.items())).encode()).hexdigest()
            if key not in self.known:
                self.known[key] = self.score(kept)
                self.save(key, self.known[key])
            self.seen[removals] = self.known[key]
        return self.seen[removals]


# --- the budgets ---


def rounds(budget: str, values: Mapping[str, Any], layers: int) -> int:
    """Scores that a budget asks for at most, besides the uniform one's."""
    if budget == "sensitivity":
        return int(values["levels"]) * layers + 1
    size = int(values["population"])
    return size + (int(values["generations"]) - 1) * (size - int(values["elites"]))


def sensitivity(scores: Scores, *, levels: Positive = 4, samples: Positive = 64) -> Removals:
    """Remove where it costs least, by measurements of one layer at a time: 1 - ESAP with only this layer pruned, at `levels` counts.

    Between measured counts the loss is the lower convex hull of the measurements. Starting from all experts, the unit with the smallest further loss is
    removed until the total is met; on a tie from the layer that has lost least, then the lower layer. `samples`: sequences of the text.
    """
    space = scores.space
    steps = []  # by layer: further loss of each removal; it never falls along the removals
    for place, cap in enumerate(space.caps):
        points = [(0, 0.0)]
        for removed in sorted({max(1, round(cap * level / levels)) for level in range(1, levels + 1)} if cap else ()):
            alone = tuple(removed if i == place else 0 for i in range(len(space.caps)))
            points.append((removed, 1 - scores(alone)))
            scores.advance(1)
        steps.append(slopes(points))
    taken = [0] * len(space.caps)
    for _ in range(space.total):
        open_ = [i for i, cap in enumerate(space.caps) if taken[i] < cap]
        taken[min(open_, key=lambda i: (steps[i][taken[i]], taken[i], i))] += 1
    return tuple(taken)


def slopes(points: Sequence[tuple[int, float]]) -> list[float]:
    """The rise of the lower convex hull of (place, value) points at each whole step from the first place to the last."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (y - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    found = []
    for (left, low), (right, high) in pairwise(hull):
        found += [(high - low) / (right - left)] * (right - left)
    return found


def esap(
    scores: Scores,
    *,
    generations: Positive = 10,
    population: Positive = 32,
    elites: Positive = 4,
    moves: Positive = 3,
    step: Positive = 4,
    samples: Positive = 64,
) -> Removals:
    """Evolve distributions towards the largest ESAP (EvoESAP, arXiv 2603.06003): `population` in each of `generations`; the best `elites` go on, and
    the rest are `switched` from them. `samples`: sequences of the text.

    Deviation from the authors' code: a distribution that was scored before is drawn again, up to 32 times, so no generation is spent on copies.
    """
    members = first_generation(scores.space, scores.random, population)
    for generation in range(1, generations + 1):
        for member in members:
            scores(member)
            scores.advance(1)
        ranked = sorted(members, key=lambda member: -scores(member))  # stable: of equal ones the earlier
        scores.note(
            f"generation {generation} of {generations}: ESAP {scores(ranked[0]):.4f} (uniform {scores(scores.space.uniform):.4f})"
        )
        best = ranked[:elites]
        children: list[Removals] = []
        if generation == generations:
            break
        while len(best) + len(children) < population:
            child = _new(scores, best, children, moves, step)
            if child is None:
                break
            children.append(child)
        if not children:
            scores.note("no other distribution was found near the best ones, so the search ends")
            break
        members = best + children
    return max(scores.seen, key=scores.seen.__getitem__)  # the first of equal ones


def _new(scores: Scores, best: Sequence[Removals], others: Sequence[Removals], moves: int, step: int) -> Removals | None:
    for _ in range(ATTEMPTS):
        child = switched(scores.random.choice(best), scores.space, scores.random, moves, step)
        if child not in scores.seen and child not in others:
            return child
    return None


SEARCHED: dict[str, Callable[..., Removals]] = {"sensitivity": sensitivity, "esap": esap}


def option_names(budget: str | None) -> list[str]:
    """The options of a budget; only searched ones have any."""
    return list(SEARCHED[budget].__kwdefaults__ or ()) if budget in SEARCHED else []


def parse_options(budget: str | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(options of the method, options of a searched budget with their defaults; None for another budget), from those of both together.

    Raises:
        UserError: a value of the wrong type or below its bound; no fewer elites than the population has.
    """
    if budget not in SEARCHED:
        return dict(given), None
    values = parse(f"budget {budget}", SEARCHED[budget], given)
    if values.get("elites", 0) >= values.get("population", 1):
        raise UserError(
            f"elites is {values['elites']} and population {values['population']}, so no generation would have a new distribution",
            "give fewer elites than the population has",
        )
    return {name: value for name, value in given.items() if name not in values}, values
