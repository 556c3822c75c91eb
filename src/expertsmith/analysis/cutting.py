"""Before and after pruning: expected loss of each method and keep ratio, redundant layers, a suggested budget, and what a plan removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from expertsmith.analysis.usage import share
from expertsmith.calibration.stats import LayerStatistics, Statistics
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules, keep_count, most_salient
from expertsmith.methods import methods
from expertsmith.methods.base import Facts, Method
from expertsmith.planning.plan import Plan

Array = np.ndarray[Any, Any]
RATIOS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
PARTS = {"mass": "weight_sum", "energy": "weighted_norm_sq_sum"}
SUGGESTED_BY = "easy_ep"
TOLERANCE = 0.05
LITTLE = 0.5  # a layer is redundant if it turns the residual stream by less than this share of the median layer


def judged_methods() -> list[Method]:
    """Methods that score experts from plain statistics, and the random baseline."""
    return [
        entry
        for entry in methods().values()
        if entry.gives == "saliency"
        and entry.reads in ("statistics", "nothing")
        and not (entry.all_outputs or entry.output_moments or entry.neurons)
    ]


def scores(method: Method, entry: LayerStatistics, facts: Facts) -> list[float]:
    """Saliencies of a layer with the method's default options."""
    options = method.options
    found = method.function(entry, facts, **options) if method.reads == "statistics" else method.function(facts, **options)
    return [float(value) for value in found]


def lost_share(sums: Mapping[str, Array], kept: Sequence[int], what: str) -> float:
    """The dropped experts' share of routing mass (sum of routing weights) or output energy (sum of (g ||f||)^2).

    This is the loss before tokens are re-routed; energy ignores cross terms between experts.
    """
    parts = share(sums[PARTS[what]].astype(np.float64))
    return float(max(0.0, 1 - parts[list(kept)].sum())) if parts.sum() else 0.0


def before_cut(statistics: Statistics, rules: Mapping[int, Rules], model_type: str) -> dict[str, Any]:
    """Lost shares by method, keep ratio, domain and layer. Every layer keeps the same ratio; experts are chosen for all domains together,
    and for each domain separately ("own").

    Arrays are [methods, ratios, domains, layers]; `kept`: by EASY-EP, "all" or "for DOMAIN" → [ratios][layers] ids.
    """
    layers, domains = list(statistics.layers), statistics.domains
    ratios = []
    for ratio in RATIOS:
        with suppress(UserError):  # leave out ratios below the router's minimum
            counts = [keep_count(ratio, rules[layer]) for layer in layers]
            if any(count < rules[layer].num_experts for count, layer in zip(counts, layers, strict=True)):
                ratios.append((ratio, counts))
    chosen = judged_methods()
    shape = (len(chosen), len(ratios), len(domains), len(layers))
    kept_by: dict[str, list[list[list[int]]]] = {
        name: [[[] for _ in layers] for _ in ratios] for name in ("all", *(f"for {domain}" for domain in domains))
    }
    lost = {f"{part}{own}": np.zeros(shape) for part in PARTS for own in ("", "_own")}
    for m, method in enumerate(chosen):
        for column, layer in enumerate(layers):
            entry, rule = statistics.layers[layer], rules[layer]
            together = scores(method, entry, _facts(statistics, layer, rule, model_type))
            alone = [
                scores(method, part.layers[layer], _facts(part, layer, rule, model_type))
                for part in (statistics.select([name]) for name in domains)
            ]
            for r, (_, counts) in enumerate(ratios):
                kept = most_salient(together, counts[column], rule, method.ties)
                if method.name == SUGGESTED_BY:
                    kept_by["all"][r][column] = kept
                for d, name in enumerate(domains):
                    own = most_salient(alone[d], counts[column], rule, method.ties)
                    if method.name == SUGGESTED_BY:
                        kept_by[f"for {name}"][r][column] = own
                    for part in PARTS:
                        lost[part][m, r, d, column] = lost_share(entry.domains[name], kept, part)
                        lost[f"{part}_own"][m, r, d, column] = lost_share(entry.domains[name], own, part)
    return {
        "methods": [method.name for method in chosen],
        "ratios": [ratio for ratio, _ in ratios],
        "counts": [counts for _, counts in ratios],
        "domains": domains,
        "layers": layers,
        "kept": kept_by,
        **lost,
    }


def _facts(statistics: Statistics, layer: int, rule: Rules, model_type: str) -> Facts:
    return Facts(layer, rule.num_experts, statistics.sequence_lengths, model_type, rule)


def redundant_layers(statistics: Statistics) -> dict[str, Any]:
    """How far each layer's routed output turns the residual stream: 1 - cos(x, x + r), mean over tokens, by domain. Redundant are the
    layers whose largest domain mean is below half of the median layer's, smallest first."""
    turn = {
        layer: {
            name: float(sums["turn_sum"].item()) / max(1, int(sums["tokens"].item())) for name, sums in entry.domains.items()
        }
        for layer, entry in statistics.layers.items()
    }
    most = {layer: max(found.values()) for layer, found in turn.items()}
    median = float(np.median(list(most.values())))
    little = sorted((layer for layer in most if most[layer] < LITTLE * median), key=lambda layer: most[layer])
    return {"turn": [{"layer": layer, **found} for layer, found in turn.items()], "median": median, "redundant": little}


def suggest_budget(statistics: Statistics, rules: Mapping[int, Rules], model_type: str) -> dict[str, Any]:
    """For each layer, the fewest experts (ranked by EASY-EP) that lose at most 5 % of output energy in every domain. `uniform`: the largest
    of these numbers; `for_domain`: the same for each domain separately. The shares are from before tokens are re-routed, so this is a
    starting point for `plan` and `evaluate`, not a guarantee."""
    found: dict[str, Any] = {"method": SUGGESTED_BY, "tolerance": TOLERANCE, **_fewest(statistics, rules, model_type)}
    if len(statistics.domains) > 1:
        found["for_domain"] = {name: _fewest(statistics.select([name]), rules, model_type) for name in statistics.domains}
    return found


def _fewest(statistics: Statistics, rules: Mapping[int, Rules], model_type: str) -> dict[str, Any]:
    method = methods()[SUGGESTED_BY]
    rows = []
    for layer, entry in statistics.layers.items():
        rule = rules[layer]
        values = scores(method, entry, _facts(statistics, layer, rule, model_type))
        for count in range(rule.least, rule.num_experts + 1, rule.groups):
            kept = most_salient(values, count, rule, method.ties)
            worst = max(lost_share(sums, kept, "energy") for sums in entry.domains.values())
            if worst <= TOLERANCE or count == rule.num_experts:
                rows.append({"layer": layer, "keep": count, "of": rule.num_experts, "worst_lost_energy": worst})
                break
    total, held = sum(row["of"] for row in rows), sum(row["keep"] for row in rows)
    return {"by_layer": rows, "uniform": max(row["keep"] for row in rows), "share_by_layer": held / total}


def check_plan(plan: Plan, reference: str, counts: Mapping[int, int], left: Mapping[int, int], output: str) -> None:
    """Check that the plan belongs to the reference (`counts` experts per layer) and to the output (`left` experts per layer).

    Raises:
        UserError: it does not.
    """
    for entry in plan.layers:
        if counts.get(entry.layer) != entry.num_experts:
            raise UserError(
                f"the plan has {entry.num_experts} experts in decoder layer {entry.layer}, {reference} has {counts.get(entry.layer, 0)}",
                "give a plan and the model of that plan",
            )
        if left.get(entry.layer) != len(entry.keep):
            raise UserError(
                f"the plan keeps {len(entry.keep)} experts in decoder layer {entry.layer}, but {output} has {left.get(entry.layer, 0)}",
                "give the plan of this checkpoint (its expertsmith/plan.json)",
            )


def after_cut(plan: Plan, before: Statistics | None, after: Statistics | None) -> dict[str, Any]:
    """What a plan removed, layer by layer, and how routing changed.

    With the reference's statistics (`before`): the dropped experts' shares of selections, routing mass and output energy, by domain. Merged
    experts count as dropped, except the one whose id they get. With both statistics: the total variation distance `moved`, in [0, 1],
    between the use of the kept experts before (scaled to sum 1) and after, 0 if they are used as before; and routing entropies.
    """
    rows: list[dict[str, Any]] = []
    for entry in plan.layers:
        gone = [expert for expert in range(entry.num_experts) if expert not in entry.keep]
        row: dict[str, Any] = {
            "layer": entry.layer,
            "kept": entry.keep,
            "dropped": gone,
            "merged": [{"into": merge.into, "from": merge.sources} for merge in entry.merge],
        }
        if before is not None:
            sums = before.layers[entry.layer].domains
            row["lost"] = {
                name: {
                    "selections": float(1 - share(values["selections"].astype(np.float64))[entry.keep].sum()),
                    "mass": lost_share(values, entry.keep, "mass"),
                    "energy": lost_share(values, entry.keep, "energy"),
                }
                for name, values in sums.items()
            }
            if after is not None:
                row["routing"] = {
                    name: _moved(sums[name], after.layers[entry.layer].domains[name], entry.keep)
                    for name in sums
                    if name in after.layers[entry.layer].domains
                }
        rows.append(row)
    return {"method": plan.method.name, "options": plan.method.options, "layers": rows}


def _moved(before: Mapping[str, Array], after: Mapping[str, Array], keep: Sequence[int]) -> dict[str, Any]:
    old = share(before["selections"].astype(np.float64)[list(keep)])
    new = share(after["selections"].astype(np.float64))
    entropies = [float(sums["entropy_sum"].item()) / max(1, int(sums["tokens"].item())) for sums in (before, after)]
    return {
        "before": old,
        "after": new,
        "moved": float(np.abs(old - new).sum() / 2),
        "routing_entropy": entropies,
        "turn": [float(sums["turn_sum"].item()) / max(1, int(sums["tokens"].item())) for sums in (before, after)],
    }
