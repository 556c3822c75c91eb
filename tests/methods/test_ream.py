"""REAM: groups and weights by hand, and against the tiny model's own outputs in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import CALIBRATION
from expertsmith import api
from expertsmith.calibration.stats import LayerStatistics, Statistics
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.methods import find
from expertsmith.methods.base import Facts
from expertsmith.methods.ream import absorb, closeness

OUTPUTS = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]
LOGITS = np.array([[2.0, 0.0, 1.0, 0.0, 3.0], [0.0, 5.0, 0.0, 1.0, 0.0]])  # [tokens, experts]: unit columns e0, e1, e0, e1, e0


def statistics(saliency, outputs=OUTPUTS, logits=LOGITS) -> LayerStatistics:
    """Statistics of one token routed to every expert, unless its saliency is 0."""
    held = {
        "weighted_norm_sum": np.asarray(saliency, dtype=float),
        "selections": (np.asarray(saliency) > 0).astype(int),
        "all_scored_output_sum": np.asarray(outputs, dtype=float),
        "logit_gram": logits.T @ logits,
    }
    return LayerStatistics(3, {"a": held})


def ream(saliency, count, groups=1, outputs=OUTPUTS, logits=LOGITS, **options):
    facts = Facts(3, len(saliency), rules=Rules(len(saliency), 1, groups, 1))
    return find("ream").function(statistics(saliency, outputs, logits), facts, count, **options)


def merges(choice) -> list[tuple[int, list[int]]]:
    return [(entry["into"], entry["from"]) for entry in choice.merge]


def test_groups_and_weights_by_hand():
    """Similarity is half of (cos of outputs + 1)/2 plus half of 1 - D/max D, D in {0, sqrt 2} for equal and for orthogonal logits.

    Centroid 0: expert 2 (1/4 + 1/2), expert 3 (1/2 + 0), expert 4 (0 + 1/2). Centroid 1: 2 (1/2 + 0), 3 (1/4 + 1/2), 4 (1/4 + 0).
    """
    saliency = [4.0, 3.0, 2.0, 1.0, 0.0]
    choice = ream(saliency, 2, capacity=3)  # 0 takes 2, then 3 (a tie with 4: the lower id); 4 is left for 1
    assert choice.keep == [0, 1]
    assert merges(choice) == [(0, [0, 2, 3]), (1, [1, 4])]
    assert choice.merge[0]["weights"] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert choice.merge[1]["weights"] == pytest.approx([3 / 3.5, 0.5 / 3.5])  # saliency 0 weighs min(0.5, 1)
    assert (choice.merge[0]["align"], choice.merge[0]["router"]) == ("weights", "dominant")
    assert choice.why == {"labels": [0, 1, 0, 0, 1], "saliency": saliency}
    small = ream([4.0, 3.0, 2.0, 0.25, 0.0], 2, capacity=3, align=False)
    assert small.merge[1]["weights"] == pytest.approx([3 / 3.25, 0.25 / 3.25])  # the smallest positive saliency is below 0.5
    assert {entry["align"] for entry in small.merge} == {"none"}


def test_the_first_centroids_take_all():
    """Pseudo-pruning: with the default capacity of 16, the most salient centroid takes every other expert, and 1 stays as it is."""
    choice = ream([4.0, 3.0, 2.0, 1.0, 0.0], 2)
    assert (choice.keep, merges(choice)) == ([0, 1], [(0, [0, 2, 3, 4])])
    order = list(range(128))  # 96 of 128: 32 experts fall into 3 groups
    labels, centroids = absorb(order, np.eye(128), 96, 16)
    sizes = np.bincount(labels)
    assert centroids == order[:96]
    assert sizes[:4].tolist() == [16, 16, 3, 1]
    assert (sizes > 1).sum() == 3


def test_the_most_salient_centroid_is_served_first():
    """Expert 2 is like both centroids, more like 0; but 1 is more salient and has room."""
    similarity = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.4], [0.9, 0.4, 1.0]])
    assert absorb([1, 0, 2], similarity, 2, 2) == ([1, 0, 0], [1, 0])


def test_centroids_are_the_experts_that_reap_keeps():
    """Of equal saliencies the higher id is kept."""
    assert ream([1.0, 1.0, 1.0, 1.0, 1.0], 2, capacity=4).keep == [3, 4]


def test_experts_without_saliency():
    """No token reached any expert: all weigh the same."""
    choice = ream([0.0] * 5, 1)
    assert choice.merge[0]["weights"] == pytest.approx([0.2] * 5)


def test_groups_stay_inside_expert_groups():
    """0 and 2 are alike, but of different expert_groups of two."""
    outputs, logits = [[1.0], [-1.0], [1.0], [-1.0]], np.array([[1.0, -1.0, 1.0, -1.0]])
    choice = ream([4.0, 1.0, 3.0, 2.0], 2, groups=2, outputs=outputs, logits=logits)
    assert merges(choice) == [(0, [0, 1]), (2, [2, 3])]
    assert choice.why["labels"] == [0, 0, 1, 1]
    with pytest.raises(UserError, match="3 clusters cannot be distributed evenly over 2 expert_groups"):
        ream([4.0, 1.0, 3.0, 2.0], 3, groups=2, outputs=outputs, logits=logits)


def test_closeness_is_the_distance_of_unit_columns():
    logits = np.random.default_rng(0).normal(size=(50, 6)) + 1
    unit = logits / np.linalg.norm(logits, axis=0)
    distance = np.linalg.norm(unit[:, :, None] - unit[:, None], axis=0)
    assert closeness(logits.T @ logits) == pytest.approx(1 - distance / distance.max(), abs=1e-7)
    assert closeness(np.ones((3, 3))).tolist() == [[1.0] * 3] * 3


def test_choices_that_cannot_be_made():
    with pytest.raises(UserError, match="2 clusters of at most 2 cannot contain 5 experts; use -O capacity=3 or more"):
        ream([1.0] * 5, 2, capacity=2)
    with pytest.raises(UserError, match="6 clusters requested, but there are 5 experts"):
        ream([1.0] * 5, 6)
    with pytest.raises(UserError, match="outputs of expert 2 are not finite"):
        ream([1.0] * 5, 2, outputs=[*OUTPUTS[:2], [np.nan, 0.0], *OUTPUTS[3:]])
    with pytest.raises(UserError, match="outputs of expert 1 are not finite"):
        ream([1.0, np.inf, 1.0, 1.0, 1.0], 2)
    with pytest.raises(UserError, match="capacity of ream is 0"):
        find("ream").parse_options({"capacity": 0})
    assert ream([1.0] * 5, 5).merge == []


def test_statistics_of_earlier_versions_are_refused():
    held = dict(statistics([1.0] * 5).domains["a"])
    del held["all_scored_output_sum"]
    with pytest.raises(
        UserError, match=r"layer 3: the statistics are of an earlier version.*calibrate again with --all-outputs"
    ):
        find("ream").function(LayerStatistics(3, {"a": held}), Facts(3, 5, rules=Rules(5, 1)), 2)


def reference(source: Path, layer: int, data: Path, keep: int, capacity: int) -> dict[int, dict[int, float]]:
    """Centroid → {member: weight}, from every token's float64 outputs and logits of a Qwen2-MoE layer, loops over experts."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    block, caught = model.model.layers[layer].mlp, []
    block.gate.register_forward_hook(lambda m, a, o: caught.append((a[0].reshape(-1, 32), o[0].reshape(-1, 8))))
    with torch.no_grad():
        for line in data.read_text().splitlines():
            model(torch.tensor([json.loads(line)["input_ids"]]))
        x, logits = (torch.cat(parts) for parts in zip(*caught, strict=True))
        raw = []
        for e in range(8):
            gate, up = (x @ block.experts.gate_up_proj[e].T).chunk(2, -1)
            raw.append((torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[e].T)
    score = logits.softmax(-1)
    chosen = score >= score.topk(2, -1).values[:, 1:]
    applied = score / (score * chosen).sum(-1, keepdim=True) if model.config.norm_topk_prob else score
    saliency = [float((applied[:, e] * raw[e].norm(dim=-1))[chosen[:, e]].mean()) for e in range(8)]
    m = torch.stack([(score[:, e : e + 1] * raw[e]).mean(0) for e in range(8)])
    unit = logits / logits.norm(dim=0)
    distance = torch.tensor([[float((unit[:, i] - unit[:, j]).norm()) for j in range(8)] for i in range(8)])
    cosine = torch.nn.functional.cosine_similarity(m[:, None], m[None], dim=-1)
    similarity = 0.5 * (cosine + 1) / 2 + 0.5 * (1 - distance / distance.max())
    order = sorted(range(8), key=lambda e: -saliency[e])
    free, made = set(order[keep:]), {}
    for centroid in order[:keep]:
        near = sorted(free, key=lambda e, c=centroid: -float(similarity[c, e]))[: capacity - 1]
        free -= set(near)
        total = saliency[centroid] + sum(saliency[e] for e in near)
        made[centroid] = {e: saliency[e] / total for e in [centroid, *near]}
    return made


@pytest.fixture(scope="module")
def calibrated(checkpoints, data, tmp_path_factory) -> dict[str, Statistics]:
    """Statistics of the tiny Qwen2-MoE model, resident and streamed."""
    folder = tmp_path_factory.mktemp("ream")
    return {
        memory: api.calibrate(
            checkpoints("qwen2_moe"), data[:1], folder / memory, all_outputs=True, memory=memory, **CALIBRATION
        )
        for memory in ("resident", "stream")
    }


@pytest.mark.parametrize("capacity", [2, 3])
def test_the_plan_is_that_of_the_models_own_outputs(capacity, calibrated, checkpoints, data):
    plan = api.plan(checkpoints("qwen2_moe"), "ream", 4, stats=calibrated["resident"], options={"capacity": capacity})
    for entry in plan.layers:
        wanted = reference(checkpoints("qwen2_moe"), entry.layer, Path(data[0].partition("=")[2]), 4, capacity)
        assert entry.keep == sorted(wanted)
        found = {merge.into: dict(zip(merge.sources, merge.weights, strict=True)) for merge in entry.merge}
        assert {into: pytest.approx(members, rel=1e-5) for into, members in wanted.items() if len(members) > 1} == found


def test_resident_and_streamed_statistics_give_the_same_plan(calibrated, checkpoints):
    resident, stream = (
        api.plan(checkpoints("qwen2_moe"), "ream", 0.5, stats=calibrated[memory]) for memory in ("resident", "stream")
    )
    assert resident.dumps() == stream.dumps()
    assert resident.kept == api.plan(checkpoints("qwen2_moe"), "reap", 0.5, stats=calibrated["stream"]).kept
    assert resident.merges
