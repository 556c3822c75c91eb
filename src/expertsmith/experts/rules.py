"""From saliency to kept experts: how many each layer keeps (the budget), and which. Independent of the source of the saliency."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from expertsmith.errors import UserError

Ties = Literal["keep_lower", "keep_higher"]


@dataclass(frozen=True)
class Rules:
    """The router's requirements for every layer of a model.

    `groups`: expert_groups of equal size, of which a token uses `top_groups` (1 and 1 if the router has none); every group
    keeps the same number, at least `group_minimum`.
    """

    num_experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    group_minimum: int = 1

    @property
    def least(self) -> int:
        """The smallest count that the router can work with."""
        per_group = max(self.group_minimum if self.groups > 1 else 1, math.ceil(self.top_k / self.top_groups))
        return per_group * self.groups


def parse_keep(text: str | float | int) -> float | int:
    """`0.5` and `50%` are ratios, `4` is a count; `1` is one expert, `1.0` all of them.

    Raises:
        UserError: anything else, zero, a negative number or a ratio above 1.
    """
    remedy = "give a ratio such as 0.5 or 50%, or a count such as 4"
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([+-]?\d+)\s*|\s*([+-]?\d*\.\d*(?:e-?\d+)?)\s*|\s*([+-]?\d+(?:\.\d*)?)\s*%\s*", text)
        try:
            if match is None:
                raise ValueError
            value: float | int = int(match[1]) if match[1] else float(match[2]) if match[2] else float(match[3]) / 100
        except ValueError:
            raise UserError(f"keep is {text!r}, which is neither a ratio nor a count", remedy) from None
    else:
        value = text
    if value <= 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"keep is {text}, but at least one expert must be kept", remedy)
    if isinstance(value, float) and value > 1:
        raise UserError(f"keep is the ratio {text}, but a ratio is at most 1.0", remedy)
    return value


def keep_count(keep: float | int, rules: Rules, where: str = "the model") -> int:
    """The number of experts that a layer keeps. A count is unchanged; a ratio removes floor(n * (1 - ratio)) experts, as REAP does, and the
    rest is rounded up to a multiple of the expert_groups.

    Raises:
        UserError: fewer than the router needs, more than there are, or not divisible by the expert_groups.
    """
    n = rules.num_experts
    if isinstance(keep, float):
        count = n - math.floor(n * (1 - keep) + 1e-9)
        count = min(n, math.ceil(count / rules.groups) * rules.groups)
    else:
        count = keep
    if count > n:
        raise UserError(f"{where}: {count} experts cannot be kept, as it has only {n}")
    if count < rules.least:
        need = f"its router needs top_k={rules.top_k}"
        if rules.groups > 1:
            need += f" from {rules.top_groups} of {rules.groups} expert_groups with at least {rules.group_minimum} each, so {rules.least} in all"
        raise UserError(
            f"{where} would keep {count} of {n} experts, but {need}",
            f"use --keep {rules.least} (ratio {rules.least / n:.2g}) or more",
        )
    if count % rules.groups:
        down, up = count // rules.groups * rules.groups, math.ceil(count / rules.groups) * rules.groups
        raise UserError(
            f"{where}: {count} kept experts do not divide into {rules.groups} expert_groups of equal size",
            f"keep {max(down, rules.least)} or {up}, or pass --router-groups flatten",
        )
    return count


def subsets(rules: Rules, count: int) -> int:
    """The number of sets of `count` experts with equally many of every expert_group."""
    per_group: int = math.comb(rules.num_experts // rules.groups, count // rules.groups)
    return math.prod([per_group] * rules.groups)


def ranked(saliency: Sequence[float], ids: Sequence[int], ties: Ties) -> list[int]:
    """`ids` from the most to the least salient; equal saliencies by expert id."""
    sign = 1 if ties == "keep_lower" else -1
    return sorted(ids, key=lambda e: (-saliency[e], sign * e))


def groups_of(rules: Rules) -> list[range]:
    """The expert ids of every expert_group."""
    size = rules.num_experts // rules.groups
    return [range(group * size, (group + 1) * size) for group in range(rules.groups)]


def most_salient(values: Sequence[float], count: int, rules: Rules, ties: Ties) -> list[int]:
    """The `count` most salient experts of a layer, as many from every expert_group, ascending."""
    chosen = [ranked(values, group, ties)[: count // rules.groups] for group in groups_of(rules)]
    return sorted(expert for part in chosen for expert in part)


def uniform(
    saliency: Mapping[int, Sequence[float]], keep: float | int, rules: Rules | Mapping[int, Rules], ties: Ties
) -> dict[int, list[int]]:
    """The same ratio or number in every layer and in every expert_group: the most salient of each."""
    each = _each(rules, saliency)
    return {layer: most_salient(values, keep_count(keep, each[layer]), each[layer], ties) for layer, values in saliency.items()}


def _each(rules: Rules | Mapping[int, Rules], layers: Mapping[int, object]) -> Mapping[int, Rules]:
    return dict.fromkeys(layers, rules) if isinstance(rules, Rules) else rules


def over_layers(
    saliency: Mapping[int, Sequence[float]],
    keep: float | int,
    rules: Rules | Mapping[int, Rules],
    ties: Ties,
    normalize: bool = True,
) -> dict[int, list[int]]:
    """One ranking over all layers (budget "global"): first every layer's floor of top_k, then the most salient of the rest.

    `normalize` divides each layer's saliency by its sum first, because sums of different layers have different scales.

    Raises:
        UserError: the router has expert_groups (unequal counts would leave them unequal).
    """
    each = _each(rules, saliency)
    refuse_groups(each)
    total = sum(keep_count(keep, each[layer]) for layer in saliency)
    least = {layer: each[layer].least for layer in saliency}
    scaled = {}
    for layer, values in saliency.items():
        scale = sum(values) if normalize else 1.0
        scaled[layer] = [value / scale if scale else 0.0 for value in values]
    order = {layer: ranked(values, range(len(values)), ties) for layer, values in scaled.items()}
    kept = {layer: order[layer][: least[layer]] for layer in order}
    rest = [
        (-scaled[layer][e], place, layer, e) for layer in order for place, e in enumerate(order[layer]) if place >= least[layer]
    ]
    for _, _, layer, expert in sorted(rest)[: total - sum(least.values())]:
        kept[layer].append(expert)
    return {layer: sorted(chosen) for layer, chosen in kept.items()}


def refuse_groups(rules: Mapping[int, Rules]) -> None:
    """Refuse expert_groups for budgets that keep different numbers in different places: the groups would be unequal.

    Raises:
        UserError: the router has expert_groups.
    """
    if any(entry.groups > 1 for entry in rules.values()):
        raise UserError(
            "budget global keeps different numbers in the router's expert_groups",
            "use --budget uniform or --router-groups flatten",
        )
