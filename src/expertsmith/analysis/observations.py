"""The paper's three observations (arXiv 2406.18219) as tests on the given model: statistic, chance level, the paper's numbers, verdict.

Verdicts: "supported", "partly" (a part of the observation), "weak", "mixed" and "not supported" (`effects.Effect.word`), or "not testable" with the
reason. The rules are ours; the paper judges by eye.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from expertsmith.analysis.effects import Effect, of_experts, of_ranks, over_layers, said

Array = np.ndarray[Any, Any]
LEAST_EXPERTS = 5  # with fewer, no permutation of labels can reach p < 0.01
LEAST_LAYERS = 5  # a line through the four before the last one leaves two degrees of freedom
ALPHA = 0.01
RATIO, LIFT = 2.0, 1.5
DRAWS = 2000
PAPER_R2 = [
    {"model": "Mixtral 8x7B", "up": 0.06, "gate": 0.33, "down": 0.07},
    {"model": "DeepSeekMoE-16B", "up": 0.00, "gate": 0.40, "down": 0.00},
    {"model": "Grok-1", "up": 0.04, "gate": 0.15, "down": 0.04},
]


def observations(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All three observations, from the layers' measures."""
    return [neurons_like_experts(layers), router_likes_norms(layers), diversity_grows(layers)]


SCALE = (
    "Sizes of a correlation, after Cohen (1988): below 0.1 negligible, below 0.3 weak, below 0.5 moderate, else strong. A correlation is supported if its 95 % "
    "interval lies above 0, it is at least weak, and most layers have its sign; weak if only one of the first two holds; mixed if layers then disagree in sign; "
    "else not supported."
)
RULES = {
    1: f"{SCALE} Here r of router rows and gate neurons; interval: Fisher's z over layers (Student's t), for one layer over experts. Supported: so is r, the R² of gate has "
    "p < 0.01 in more than half of the layers (999 permutations of labels), and its mean is at least twice that of up and of down. Not supported: p ≥ 0.05 over all layers, "
    "r not supported, or gate not above both others. Weak or mixed: r is. Else partly.",
    2: f"{SCALE} Here the rank correlation of norm and score; interval: Fisher's z over layers (Student's t), for one layer over texts. Supported: so is it, and the "
    "largest-norm expert is top-scored more than 1.5 times as often as by chance. Not supported: the correlation is not, or not more often than by chance. Weak or mixed: the "
    "correlation is. Else partly.",
    3: f"{SCALE} Here the rank correlation of similarity and depth before the last layer, negative as claimed, and steps between layers in place of layers; interval: Fisher's z "
    "for ranks. Supported: so is it, with p < 0.05, and the last layer lies above the quarter of layers before it. Not supported: neither. Weak or mixed: the correlation is. "
    "Else partly.",
}
PAPER = {
    1: "Mean R² of gate in the paper: Mixtral 8x7B 0.33, DeepSeekMoE-16B 0.40, Grok-1 0.15; of up and down 0.00 to 0.07.",
    2: "In the paper, for Mixtral 8x7B: about 69 % (by chance 12.5 %), read off its figure.",
    3: "In the paper, for Mixtral 8x7B on one short text: output cosines of about 0.6 to 0.8 in layer 6, 0.3 to 0.5 in layer 27, 0.9 to 1.0 in the last, read off its figure.",
}


def _result(number: int, title: str, verdict: str, text: str, **more: Any) -> dict[str, Any]:
    found = {"observation": number, "title": title, "verdict": verdict, "text": text}
    return found | {"rule": RULES[number], "paper": PAPER[number], **more}


def _verdict(effect: Effect, whole: bool, none: bool) -> str:
    """The word of a correlation, where the rest of the observation holds (`whole`), fails (`none`), or stands between."""
    if none:
        return "not supported"
    return "partly" if effect.word == "supported" and not whole else effect.word


def neurons_like_experts(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Observation 1: similarity between router rows follows the similarity of mean gate neurons, and only those. Decided by `RULES`."""
    title = "Neurons act like fine-grained experts"
    rows = [(entry["layer"], entry["static"]["router_expert"]) for entry in layers if "static" in entry]
    if not rows:
        return _result(1, title, "not testable", "The weights were not measured.")
    if "gate" not in rows[0][1]:
        return _result(1, title, "not testable", "The experts of this family have no gate projection.")
    if max(entry["num_experts"] for entry in layers) < LEAST_EXPERTS:
        return _result(1, title, "not testable", f"Fewer than {LEAST_EXPERTS} experts per layer: too few pairs for a test.")
    used = [(layer, found) for layer, found in rows if all(found[role] for role in found)]
    if not used:
        return _result(1, title, "not testable", "Router rows or mean neurons do not differ between experts.")
    r2 = {role: float(np.mean([found[role]["r2"] for _, found in used])) for role in used[0][1]}
    correlations = [found["gate"]["r"] for _, found in used]
    effect = over_layers(correlations, of_experts(correlations[0], max(entry["num_experts"] for entry in layers)))
    null = np.mean([found["gate"]["null_values"] for _, found in used], axis=0)
    p = float((1 + (null >= r2["gate"] - 1e-12).sum()) / (1 + len(null)))
    significant = sum(found["gate"]["p"] < ALPHA for _, found in used)
    rest = max((value for role, value in r2.items() if role != "gate"), default=0.0)
    whole = significant > len(used) / 2 and r2["gate"] >= RATIO * rest
    verdict = _verdict(effect, whole, none=p >= 0.05 or r2["gate"] <= rest)
    others = ", ".join(f"{role} {value:.2f}" for role, value in r2.items() if role != "gate")
    text = (
        f"R² between the similarity of router rows and of mean gate neurons is {r2['gate']:.2f} ({others}; by chance {null.mean():.2f}), "
        f"r {said(effect.value, effect)}, p {p:.2g}; positive in {effect.agree} and significant in {significant} of {len(used)} layers."
    )
    return _result(
        1, title, verdict, text, effect=effect.to_json(), r2=r2, r_gate=effect.value, chance_r2=float(null.mean()), p=p, significant_layers=significant,
        layers_used=len(used), paper_r2=PAPER_R2,
        by_layer=[{"layer": layer, **{role: value["r2"] for role, value in found.items()}, "r_gate": found["gate"]["r"], "p_gate": found["gate"]["p"]} for layer, found in used],
    )  # fmt: skip


def router_likes_norms(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Observation 2: the router usually selects experts with larger outputs. Decided by `RULES`.

    rho: Spearman correlation of output norms and router scores over a token's experts (0 by chance); lift: how often the largest-norm expert is the
    top-scored one, over 1/E. Intervals of single layers resample whole sequences.
    """
    title = "The router prefers experts with larger outputs"
    rows = [(entry["layer"], entry["num_experts"], entry["sample"]) for entry in layers if "sample" in entry]
    if not rows:
        return _result(2, title, "not testable", "Needs the outputs of all experts: run with data and --all-experts 512.")
    used = [(layer, n, found) for layer, n, found in rows if n > 1 and found["norm_score_rho"]["mean"] is not None]
    if not used:
        return _result(2, title, "not testable", "Norms or scores do not differ between experts.")
    first = used[0][2]["norm_score_rho"]
    alone = None if first["low"] is None else (first["low"], first["high"])
    effect = over_layers([found["norm_score_rho"]["mean"] for _, _, found in used], alone)
    top = float(np.mean([found["largest_norm_top_scored"]["mean"] for _, _, found in used]))
    chance = float(np.mean([1 / n for _, n, _ in used]))
    lifts = [found["largest_norm_top_scored"]["mean"] * n for _, n, found in used]
    lift = float(np.mean(lifts))
    above = sum((found["norm_score_rho"]["low"] or -1.0) > 0 for _, _, found in used)
    percentile = float(np.mean([found["chosen_norm_percentile"]["mean"] for _, _, found in used]))
    verdict = _verdict(effect, lift > LIFT, none=lift <= 1)
    text = (
        f"Rank correlation of output norm and router score is {said(effect.value, effect)}; by chance 0. It is positive in {effect.agree} of {len(used)} layers, in {above} "
        f"of them with an interval above 0. The expert with the "
        f"largest output is the top-scored one for {100 * top:.0f} % of tokens ({100 * chance:.0f} % by chance, {lift:.1f} times); selected experts "
        f"stand at percentile {100 * percentile:.0f} of the norms (50 by chance)."
    )
    return _result(
        2, title, verdict, text, effect=effect.to_json(), rho=effect.value, lift=lift, top_scored=top, chance_top_scored=chance, chosen_percentile=percentile,
        layers_above=above, layers_used=len(used),
        by_layer=[{"layer": layer, "rho": found["norm_score_rho"]["mean"], "rho_low": found["norm_score_rho"]["low"], "rho_high": found["norm_score_rho"]["high"], "lift": found["largest_norm_top_scored"]["mean"] * n} for layer, n, found in used],
    )  # fmt: skip


def depth_trend(values: Array, seed: int = 0) -> dict[str, Any]:
    """The trend of a similarity over layers, and the position of the last layer.

    rho: Spearman correlation of depth and value over all layers but the last; p: share of orders of these layers with a rho as low (2000
    draws); falls: steps between them that fall; z: the last value's distance to the line through the others in units of that prediction's standard error;
    `last_above`: above the mean of the quarter of layers before it.
    """
    before, last = values[:-1], float(values[-1])
    depth = np.arange(len(before))
    rho = float(spearmanr(depth, before).statistic) if np.ptp(before) > 0 else 0.0
    random = np.random.default_rng(seed)
    straight = depth - depth.mean()
    null = random.permuted(np.tile(straight, (DRAWS, 1)), axis=1) @ straight / (straight @ straight)
    p = (1 + int((null <= rho + 1e-12).sum())) / (1 + DRAWS)
    slope, intercept = np.polyfit(depth, before, 1)
    residual = before - (slope * depth + intercept)
    n = len(before)
    sigma = float(np.sqrt((residual**2).sum() / (n - 2)))
    spread = sigma * float(np.sqrt(1 + 1 / n + (n - depth.mean()) ** 2 / ((depth - depth.mean()) ** 2).sum()))
    z = (last - (slope * n + intercept)) / spread if spread > 0 else None
    near = before[-max(1, n // 4) :]
    return {
        "rho": rho, "p": p, "falls": int((np.diff(before) < 0).sum()), "slope": float(slope), "last": last, "last_z": None if z is None else float(z),
        "last_above": bool(last > near.mean()), "values": values,
    }  # fmt: skip


def diversity_grows(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Observation 3: experts differ more with depth, and the last layer is an outlier (alike again).

    Judged on the similarity of outputs where these were measured, else of mean gate neurons (up where there is no gate); the trends of the
    others stand beside. Decided by `RULES`.
    """
    title = "Diversity grows with depth, and the last layer is an outlier"
    if len(layers) < LEAST_LAYERS:
        return _result(
            3,
            title,
            "not testable",
            f"A trend needs at least {LEAST_LAYERS} layers with experts; this model has {len(layers)}.",
        )
    series: dict[str, list[Any]] = {}
    for entry in layers:
        if "sample" in entry:
            series.setdefault("expert outputs (angular)", []).append(entry["sample"]["output_similarity"])
        for role, found in entry.get("static", {}).get("projections", {}).items():
            series.setdefault(f"mean {role} neurons", []).append(found["neuron_similarity"])
            series.setdefault(f"{role} matrices", []).append(found["matrix_similarity"])
    whole = {
        name: depth_trend(np.array(values, dtype=float))
        for name, values in series.items()
        if len(values) == len(layers) and all(value is not None for value in values)
    }
    order = ("expert outputs (angular)", "mean gate neurons", "mean up neurons")
    name = next((candidate for candidate in order if candidate in whole), None)
    if name is None:
        return _result(3, title, "not testable", "No similarity measure has a value in every layer.")
    main = whole[name]
    (low, high), steps = of_ranks(-main["rho"], len(layers) - 1) or (None, None), len(layers) - 2
    effect = Effect(-main["rho"], low, high, agree=main["falls"], of=steps)
    if effect.word == "not supported":
        verdict = "partly" if main["last_above"] else "not supported"
    else:
        verdict = _verdict(effect, main["last_above"] and main["p"] < 0.05, none=False)
    z = "" if main["last_z"] is None else f" (z {main['last_z']:+.1f} against the trend)"
    text = (
        f"Similarity of {name}: rank correlation with depth before the last layer {said(main['rho'], effect, sign=-1)}, p {main['p']:.2g}; negative is "
        f"growing diversity. It falls in {main['falls']} of {steps} steps between these {steps + 1} layers. The last layer is {'more similar than' if main['last_above'] else 'not more similar than'} those before it{z}."
    )
    return _result(
        3, title, verdict, text, judged_on=name, effect=effect.to_json(), **{key: main[key] for key in ("rho", "p", "last_z", "last_above")},
        trends=whole, layers=[entry["layer"] for entry in layers],
    )  # fmt: skip
