"""Sentences that summarise the measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from expertsmith.analysis.usage import FLAT

HIGH, LOW = 0.9, 0.5


def summarise(measures: dict[str, Any]) -> list[str]:
    """The sentences at the top of the page: the model, its router and experts, and the cost of pruning."""
    parts: list[Callable[[dict[str, Any]], list[str]]] = [_model, _alike, _load, _domains, _cut, _after, _super]
    return [sentence for part in parts for sentence in part(measures)]


def _mean(measures: dict[str, Any], find: Callable[[dict[str, Any]], Any]) -> float | None:
    values = []
    for entry in measures["layers"]:
        try:
            value = find(entry)
        except KeyError:
            continue
        if value is not None:
            values.append(value)
    return float(np.mean(values)) if values else None


def _model(m: dict[str, Any]) -> list[str]:
    counts = sorted({entry["num_experts"] for entry in m["layers"]})
    experts = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    layers = len(m["layers"])
    data = m.get("data")
    text = f"{m['model']['family']}: {layers} layer{'s' * (layers > 1)} of {experts} routed experts, of which each token uses {m['model']['top_k']}"
    seen = (
        f", seen on {sum(data['tokens'].values()):,} tokens of {len(data['tokens'])} domain{'s' * (len(data['tokens']) > 1)}."
        if data
        else ", from the weights alone."
    )
    return [text + seen]


def _alike(m: dict[str, Any]) -> list[str]:
    outputs = _mean(m, lambda entry: entry["sample"]["output_similarity"])
    copies = sum(
        max(found["copies"] for found in entry["static"]["projections"].values()) for entry in m["layers"] if "static" in entry
    )
    said = []
    if outputs is not None:
        word = "nearly identical" if outputs > HIGH else "related" if outputs > 0.6 else "unrelated"
        said.append(
            f"On the same token, outputs of different experts are {word}: angular similarity {outputs:.2f}, where 0.5 is unrelated and 1 is identical."
        )
    else:
        neurons = _mean(m, lambda entry: entry["static"]["projections"]["up"]["matrix_similarity"])
        if neurons is not None:
            said.append(f"The mean cosine between the experts' up matrices is {neurons:.3f} (0: unrelated, 1: copies).")
    if copies:
        said.append(f"{copies} pair{'s' * (copies > 1)} of experts are copies of each other.")
    dense = _mean(m, lambda entry: float(np.mean(entry["static"]["projections"]["up"]["dense_match"])))
    if dense is not None:
        said.append(
            f"The mean cosine between an expert's neuron and the nearest neuron of the dense model is {dense:.3f} (1: copied)."
        )
    return said


def _load(m: dict[str, Any]) -> list[str]:
    even = _mean(m, lambda entry: entry["usage"]["all"]["load_entropy_share"])
    if even is None:
        return []
    sure = _mean(m, lambda entry: entry["usage"]["all"]["routing_entropy_share"])
    unused = sum(entry["usage"]["all"]["unused"] for entry in m["layers"])
    peak = max(((entry["usage"]["all"]["load_peak"], entry["layer"]) for entry in m["layers"]), default=(0, 0))
    word = "even" if even > 0.95 else "fairly even" if even > HIGH else "uneven"
    text = f"The load is {word} ({100 * even:.0f} % of the maximum entropy); the busiest expert, in layer {peak[1]}, gets {peak[0]:.1f} times the average."
    if unused:
        text += f" {unused} expert{'s' * (unused > 1)} got no tokens."
    sharp = (
        ""
        if sure is None or sure > FLAT
        else f" The router is {'certain' if sure < LOW else 'uncertain' if sure > HIGH else 'moderately certain'}: its scores keep {100 * sure:.0f} % of the maximum entropy."
    )
    return [text + sharp]


def _domains(m: dict[str, Any]) -> list[str]:
    found = _mean(m, lambda entry: entry["usage"]["specialisation"]["information_share"])
    if found is None:
        return []
    p = [
        entry["usage"]["specialisation"]["saliency_information_p"]
        for entry in m["layers"]
        if entry.get("usage", {}).get("specialisation")
    ]
    sure = sum(value < 0.05 for value in p)
    word = "strongly specialised" if found > 0.3 else "specialised" if found > 0.1 else "hardly specialised"
    return [
        f"Experts are {word} by domain: expert choice explains {100 * found:.0f} % of the domain information (beyond chance in {sure} of {len(p)} layers)."
    ]


def _cut(m: dict[str, Any]) -> list[str]:
    budget = m.get("suggested_budget")
    if not budget:
        return []
    of = max(row["of"] for row in budget["by_layer"])
    enough = f"at most {100 * budget['tolerance']:.0f} % of the experts' output energy in any layer"
    if budget["uniform"] < of:
        text = f"Before pruning: {budget['uniform']} of {of} experts in every layer, chosen by {budget['method']}, lose {enough} and domain"
    else:
        text = f"Before pruning: no smaller number of experts in every layer loses {enough} and domain"
    uneven = budget["share_by_layer"] < budget["uniform"] / of - 0.005
    said = [text + (f"; layer by layer, {100 * budget['share_by_layer']:.0f} % of the experts are enough." if uneven else ".")]
    own = {name: found["uniform"] for name, found in budget.get("for_domain", {}).items() if found["uniform"] < of}
    if own:
        said.append(
            f"For one domain alone, fewer are enough: {', '.join(f'{count} for {name}' for name, count in own.items())}."
        )
    little = m["redundant_layers"]["redundant"]
    if little:
        said.append(f"Layers whose experts change the residual stream's direction least: {', '.join(map(str, little[:6]))}.")
    return said


def _after(m: dict[str, Any]) -> list[str]:
    after = m.get("after_cut")
    if not after:
        return []
    gone = sum(len(row["dropped"]) for row in after["layers"])
    of = gone + sum(len(row["kept"]) for row in after["layers"])
    text = f"The plan ({after['method']}) removed {gone} of {of} experts"
    lost = {name: [row["lost"][name]["energy"] for row in after["layers"]] for name in after["layers"][0].get("lost", {})}
    if lost:
        shares = ", ".join(f"{100 * np.mean(values):.0f} % on {name}" for name, values in lost.items())
        text += f", which had this share of the output energy: {shares}"
    moved = [found["moved"] for row in after["layers"] for found in row.get("routing", {}).values()]
    if moved:
        text += f"; {100 * np.mean(moved):.0f} % of the routed slots of kept experts moved to other experts"
    return [text + "."]


def _super(m: dict[str, Any]) -> list[str]:
    found = (m.get("super_experts") or {}).get("experts")
    if not found:
        return []
    first = found[0]
    return [
        f"{len(found)} expert{'s' * (len(found) > 1)} with extreme outputs, the largest in layer {first['layer']}, expert {first['expert']} "
        f"({first['of_median']:.0f} times the median expert's largest output): dropping such experts can break a model."
    ]
