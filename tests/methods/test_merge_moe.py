"""MergeMoE: clusters by hand and from the tiny models' weights; the note that healing is missing, and what healing does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import CALIBRATION
from expertsmith import api
from expertsmith.calibration.stats import LayerStatistics
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.rules import Rules
from expertsmith.experts.weights import Projections
from expertsmith.methods import find, merge_moe
from expertsmith.methods.base import Facts
from expertsmith.methods.merge_moe import UNSOLVED, products


def choose(selections, vectors, count, groups=1):
    """The choice for experts whose [W_U; W_G] are `vectors`."""
    vectors = np.asarray(vectors, dtype=float)
    statistics = LayerStatistics(3, {"a": {"selections": np.asarray(selections)}})
    facts = Facts(3, len(selections), rules=Rules(len(selections), 1, groups, 1))
    return find("merge_moe").function(statistics, {"gram": vectors @ vectors.T}, facts, count)


def test_clusters_and_weights_by_hand():
    """Usage order 1, 3, 0, 2, 4: centres 1 and 3. Expert 0 points as 3 does, 2 as 1 does (longer, which has no effect), 4 is opposite to 1."""
    choice = choose([2, 9, 1, 6, 0], [[0, 1], [1, 0], [50, 1], [0, 3], [-1, 0]], 2)
    assert choice.keep == [1, 3]
    assert [(entry["into"], entry["from"]) for entry in choice.merge] == [(1, [1, 2]), (3, [0, 3, 4])]
    assert choice.merge[0]["weights"] == pytest.approx([9 / 10, 1 / 10])
    assert choice.merge[1]["weights"] == pytest.approx([2 / 8, 6 / 8, 0])
    assert (choice.merge[0]["align"], choice.merge[0]["router"]) == ("none", "dominant")
    assert choice.why["labels"] == [1, 0, 0, 1, 1]
    assert choice.why["warnings"] == [UNSOLVED]


def test_all_experts_are_no_merge_and_need_no_healing():
    choice = choose([2, 9], [[0, 1], [1, 0]], 2)
    assert (choice.keep, choice.merge) == ([0, 1], [])
    assert "warnings" not in choice.why


def test_clusters_stay_inside_expert_groups():
    choice = choose([9, 1, 8, 7], [[1, 0], [0, 1], [0, 1], [1, 0]], 2, groups=2)
    assert [(entry["into"], entry["from"]) for entry in choice.merge] == [(0, [0, 1]), (2, [2, 3])]
    with pytest.raises(UserError, match="3 clusters cannot be distributed evenly over 2 expert_groups"):
        choose([9, 1, 8, 7], np.eye(4), 3, groups=2)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="layer 3: the weights of expert 1 are not finite"):
        choose([1, 1, 1], [[0, 1], [np.nan, 0], [1, 0]], 2)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "nemotron_h"])  # per-expert, stacked, without a gate
@pytest.mark.parametrize("at_once", [1, 2**14, 2**31])
def test_products_of_weights_by_brute_force(model_type, at_once, checkpoints, monkeypatch):
    """In one read of the layer, and in several: with room for one expert, and for some."""
    monkeypatch.setattr(merge_moe, "AT_ONCE", at_once)
    inventory = take_inventory(open_checkpoint(checkpoints(model_type)))
    layer = inventory.layers[-1]
    weights = Projections(inventory, layer)
    rows = [list(weights.of(role)) for role in weights.roles if role != "down"]
    assert len(rows) == (1 if model_type == "nemotron_h" else 2)
    whole = np.stack([np.concatenate([part.ravel() for part in parts]).astype(float) for parts in zip(*rows, strict=True)])
    assert products(weights, Facts(layer, 8))["gram"] == pytest.approx(whole @ whole.T, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_the_plan_is_that_of_the_checkpoint(memory, checkpoints, data, tmp_path):
    """Against loops over the stored tensors in float64."""
    source = checkpoints("qwen2_moe")
    stats = api.calibrate(source, data, tmp_path / "s", memory=memory, **CALIBRATION)
    plan = api.plan(source, "merge_moe", 4, stats=stats)
    assert plan.dumps() == api.plan(source, "merge_moe", 4, stats=stats, out=tmp_path / "plan.json").dumps()
    assert plan.notes == [f"all layers: {UNSOLVED}"]
    tensors = load_file(source / "model.safetensors")
    for entry in plan.layers:
        stem = f"model.layers.{entry.layer}.mlp.experts"
        flat = [
            torch.cat([tensors[f"{stem}.{e}.{role}_proj.weight"].double().ravel() for role in ("up", "gate")]) for e in range(8)
        ]
        selections = stats.layers[entry.layer].total("selections")
        order = sorted(range(8), key=lambda e, n=selections: (-n[e], e))
        members: dict[int, list[int]] = {centre: [centre] for centre in order[:4]}
        for e in order[4:]:
            members[max(order[:4], key=lambda c, e=e: float(torch.cosine_similarity(flat[e], flat[c], dim=0)))].append(e)
        assert entry.keep == sorted(order[:4])
        found = {merge.into: dict(zip(merge.sources, merge.weights, strict=True)) for merge in entry.merge}
        assert found == {
            centre: pytest.approx({e: selections[e] / sum(selections[i] for i in own) for e in own})
            for centre, own in members.items()
            if len(own) > 1
        }


def test_healing_solves_the_down_projections_and_nothing_else(checkpoints, data, tmp_path):
    """The second half of the method: gate, up and router rows keep the bytes of the plan; the layers' errors do not grow."""
    source = checkpoints("qwen2_moe")
    plan = api.plan(source, "merge_moe", 4, data=data, **CALIBRATION)
    api.apply(source, plan, tmp_path / "merged")
    report = api.heal(tmp_path / "merged", source, data, tmp_path / "healed", method="least_squares", **CALIBRATION)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "healed"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".experts." in name and name.endswith("down_proj.weight") for name in changed)
    assert all(row["error_least_squares"] < row["error_before"] for row in report["layers"])
