"""Collect the requested and available measures, layer by layer, then for the whole model, and write `measures.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expertsmith.analysis import cutting
from expertsmith.analysis.catalogue import definitions
from expertsmith.analysis.observations import observations
from expertsmith.analysis.sampled import measure_sample
from expertsmith.analysis.sources import DenseModel, LayerWeights
from expertsmith.analysis.static import Sampling, measure_layer
from expertsmith.analysis.summary import summarise
from expertsmith.analysis.usage import FLAT, measure_usage, super_experts
from expertsmith.calibration.stats import Statistics
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.planning.plan import Plan
from expertsmith.views.progress import Progress, Silent

if TYPE_CHECKING:
    from expertsmith.calibration.all_experts import LayerSample

FORMAT, VERSION = "expertsmith.measures", 1
DIGITS = 6


@dataclass
class Material:
    """The inputs of a study; measures whose inputs are None are left out."""

    inventory: Inventory
    sampling: Sampling = field(default_factory=Sampling)
    statistics: Statistics | None = None
    samples: Iterable[LayerSample] | None = None
    dense: DenseModel | None = None
    plan: Plan | None = None
    reference: Statistics | None = None
    reference_name: str = ""
    decode: Callable[[int], str] | None = None
    device: str = "cpu"
    progress: Progress = field(default_factory=Silent)


def refuse_single(inventory: Inventory) -> None:
    """Raise a UserError if no layer has two experts."""
    if max(inventory.counts.values()) < 2:
        raise UserError(
            f"{inventory.checkpoint.source} has one routed expert per layer: there is nothing to compare",
            "analyze a model with at least two experts per layer",
        )


def study(material: Material) -> dict[str, Any]:
    """All measures as one nested mapping with numpy arrays (`plain` converts it for JSON)."""
    from expertsmith import __version__

    inventory, statistics = material.inventory, material.statistics
    refuse_single(inventory)
    layers: dict[int, dict[str, Any]] = {
        layer: {"layer": layer, "num_experts": inventory.experts_in(layer)} for layer in inventory.layers
    }
    _static(material, layers)
    if statistics is not None:
        for layer, held in statistics.layers.items():
            layers[layer]["usage"] = measure_usage(held, material.sampling.seed)
    for sample in material.samples or ():
        layers[sample.layer]["sample"] = measure_sample(sample, material.decode, material.sampling.seed)
    rows = list(layers.values())
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"expertsmith {__version__}",
        "model": _model(inventory),
        "sampling": {"neurons": material.sampling.neurons, "pairs": material.sampling.pairs, "seed": material.sampling.seed},
        "definitions": definitions(),
        "layers": rows,
        "observations": observations(rows),
        "notes": _notes(material, rows),
    }
    if material.dense:
        found["dense"] = material.dense.checkpoint.source
    if statistics is not None:
        rules = {layer: inventory.rules_of(layer) for layer in inventory.layers}
        model_type = inventory.architecture.model_type
        found["data"] = {"tokens": statistics.tokens, "fingerprint": statistics.header["data"]["fingerprint"]}
        found["super_experts"] = super_experts(list(statistics.layers.values()))
        found["before_cut"] = cutting.before_cut(statistics, rules, model_type)
        found["redundant_layers"] = cutting.redundant_layers(statistics)
        found["suggested_budget"] = cutting.suggest_budget(statistics, rules, model_type)
    if material.plan is not None:
        found["reference"] = material.reference_name
        found["after_cut"] = cutting.after_cut(material.plan, material.reference, statistics)
    found["summary"] = summarise(found)
    return found


def _static(material: Material, layers: Mapping[int, dict[str, Any]]) -> None:
    inventory = material.inventory
    weights = {layer: LayerWeights(inventory, layer, material.dense) for layer in layers}
    total = sum(inventory.experts_in(layer) * len(weights[layer].roles) for layer in layers)
    with material.progress.task("weights", total, "expert matrices") as advance:
        for layer, entry in layers.items():
            entry["static"] = measure_layer(weights[layer], material.sampling, advance, material.device)


def _model(inventory: Inventory) -> dict[str, Any]:
    record, checkpoint = inventory.architecture, inventory.checkpoint
    return {
        "source": checkpoint.source,
        "fingerprint": checkpoint.fingerprint,
        "family": record.title,
        "model_type": record.model_type,
        "top_k": inventory.top_k,
        "num_experts": inventory.num_experts,
        "decoder_layers": inventory.num_layers,
        "router_score": record.score,
        "selection_bias": bool(record.selection_bias),
        "bytes": checkpoint.nbytes,
    }


def _notes(material: Material, rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    sampling, first = material.sampling, next(iter(rows[0]["static"]["projections"].values()))
    if first["neurons"] > sampling.neurons:
        notes.append(
            f"Neuron matching and ranks use {sampling.neurons} of {first['neurons']} neurons per expert; errors are shown with the values."
        )
    pairs = first["match"]
    if pairs and len(pairs["pairs"]) < pairs["of_pairs"]:
        notes.append(f"Neurons were matched for {len(pairs['pairs'])} of {pairs['of_pairs']} expert pairs per layer.")
    if material.statistics is None:
        notes.append("No text was given, so usage, domains, norms and the expected loss of pruning are left out.")
    elif not any("sample" in row for row in rows):
        notes.append(
            "Not all experts were run, so outputs are not compared and observation 2 is not tested (pass --all-experts 512)."
        )
    few = [name for name, count in (material.statistics.tokens if material.statistics else {}).items() if count < 1000]
    if few:
        notes.append(f"Fewer than 1000 tokens of {', '.join(few)}: shares and means are noisy.")
    if material.statistics is not None and all(
        (row["usage"]["all"]["routing_entropy_share"] or 0) > FLAT for row in rows if "usage" in row
    ):
        notes.append(
            "The router's scores are all but equal on every token, as in models that `convert` made for several experts a token: they tell whom it "
            "chooses, not how sure it is. Scores and their entropy say nothing here."
        )
    if len(rows) == 1:
        notes.append("The model has one layer with experts, so trends over depth cannot be tested.")
    if material.dense:
        absent = [
            row["layer"] for row in rows if not any("dense_match" in found for found in row["static"]["projections"].values())
        ]
        if absent:
            notes.append(f"The dense model has nothing of the same size to compare in layers {', '.join(map(str, absent))}.")
    return notes


def plain(value: Any) -> Any:
    """Convert a value for JSON: arrays to lists, floats to six significant digits, NaN and inf to null; without permutation nulls."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items() if key != "null_values"}
    if isinstance(value, np.ndarray):
        return _rounded(value) if value.dtype.kind == "f" else value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return _rounded(np.asarray(value))
    return value


def _rounded(values: np.ndarray[Any, Any]) -> Any:
    """Floats with six significant digits; None for NaN and inf."""
    real = values.astype(np.float64)
    finite = np.isfinite(real)
    size = np.abs(np.where(finite & (real != 0), real, 1.0))
    scale = 10.0 ** np.clip(DIGITS - 1 - np.floor(np.log10(size)), -300, 22)  # beyond 22, powers of ten are not exact
    made = np.asarray(np.round(np.where(finite, real, 0.0) * scale) / scale)
    kept: Any = made.astype(object)
    kept[~finite] = None
    return kept.tolist() if kept.ndim else kept.item()


def write_json(path: Path, measures: Mapping[str, Any]) -> None:
    """Write under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(measures, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
