"""The parts of config.json that only expertsmith reads: skip thresholds (and how they come from a plan), and which layers are padded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.experts.inventory import Inventory
from expertsmith.planning.plan import CalibrationData, LayerPlan, Method, Plan, Skip, Source, Summary
from expertsmith.surgery.card import model_card

if TYPE_CHECKING:
    from expertsmith.calibration.data import TokenData
    from expertsmith.calibration.ratios import LayerThreshold
    from expertsmith.engine.skipping import Rule

SKIPS = "config.json has skip thresholds: expertsmith.load(…) applies them, other engines run all experts"
KEY = "expertsmith"  # of config.json: settings that only `expertsmith.load` applies


def rule_for(inventory: Inventory) -> Rule:
    """The paper's ratio rule for two experts a token, the tail rule of its appendix for more."""
    return "ratio" if {inventory.rules_of(layer).top_k for layer in inventory.layers} == {2} else "tail"


def skip_of(config: Mapping[str, Any]) -> tuple[Rule, dict[int, float]] | None:
    """(rule, decoder layer → threshold) in a config.json, or None."""
    held = config.get(KEY)
    entry = held.get("skip") if isinstance(held, Mapping) else None
    if not isinstance(entry, Mapping):
        return None
    return entry["rule"], {int(layer): float(value) for layer, value in entry["thresholds"].items()}


def write_skip(config: dict[str, Any], plan: Plan) -> None:
    """Put the plan's thresholds into a config.json; old ones are removed, because they were calibrated with other experts."""
    held = {key: value for key, value in (config.get(KEY) or {}).items() if key != "skip"}
    if plan.skip is not None:
        thresholds = {str(layer): value for layer, value in plan.thresholds.items()}
        held["skip"] = {"rule": plan.skip.rule, "thresholds": thresholds}
    config.pop(KEY, None)
    if held:
        config[KEY] = held


def write_padding(config: dict[str, Any], counts: Mapping[int, int] | None) -> None:
    """Record in a config.json how many experts of every layer are alive, if layers are filled up with dead ones."""
    held = {key: value for key, value in (config.get(KEY) or {}).items() if key != "alive"}
    if counts is not None:
        held["alive"] = {str(layer): count for layer, count in counts.items()}
    config.pop(KEY, None)
    if held:
        config[KEY] = held


def is_padded(config: Mapping[str, Any]) -> bool:
    """Whether layers of this checkpoint are filled up with dead experts."""
    held = config.get(KEY)
    return isinstance(held, Mapping) and "alive" in held


def keep_all(inventory: Inventory) -> Plan:
    """A plan that changes nothing."""
    experts, size = sum(inventory.counts.values()), inventory.size()
    return Plan(
        method=Method(name="skip"),
        model=Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint),
        layers=[LayerPlan(layer=n, num_experts=count, keep=list(range(count))) for n, count in inventory.counts.items()],
        summary=Summary(experts=(experts, experts), parameters=(size[0], size[0]), bytes=(size[1], size[1])),
    )


def with_thresholds(plan: Plan, found: Mapping[int, LayerThreshold], rule: Rule, statistic: str, tokens: TokenData) -> Plan:
    """The plan with a threshold in every layer, and its statistics in `why`."""
    layers = [  # multi-token-prediction layers have no threshold
        entry.model_copy(
            update={
                "skip_threshold": found[entry.layer].threshold,
                "why": {**(entry.why or {}), "skip": found[entry.layer].why},
            }
        )
        if entry.layer in found
        else entry
        for entry in plan.layers
    ]
    calibration = CalibrationData(fingerprint=tokens.fingerprint, tokens=tokens.tokens)
    return plan.model_copy(update={"layers": layers, "skip": Skip(rule=rule, statistic=statistic, calibration=calibration)})


def refresh(out: Path, plan: Plan, inventory: Inventory, notes: Sequence[str] = ()) -> None:
    """Write a plan's thresholds into a checkpoint that already has the plan's experts: config.json, plan and model card change."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write_skip(config, plan)
    for name, text in (
        ("README.md", model_card(plan, inventory, [*notes, SKIPS])),
        ("expertsmith/plan.json", plan.dumps()),
        ("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"),
    ):
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)
