"""Merging: clusters, budgets, and the choices of the methods, worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.cluster.hierarchy as scipy_hierarchy
from hypothesis import given, settings
from hypothesis import strategies as st

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.methods import find
from expertsmith.methods.base import Facts
from expertsmith.methods.merging import agglomerate, cut, join_dominants, k_means, m_smoe_budget, shares, similarity_of
from expertsmith.planning.plan import LayerPlan

LINKAGES = ("average", "single", "complete", "ward")
POINTS = np.array([[0.0], [1.0], [3.0], [7.0], [8.0]])


# clustering


@pytest.mark.parametrize(
    ("linkage", "heights"), [("average", [1, 1, 2.5, 37 / 6]), ("single", [1, 1, 2, 4]), ("complete", [1, 1, 3, 8])]
)
def test_agglomeration_of_five_points(linkage, heights):
    """Average: {0,1}-3 at (3 + 2)/2; {0,1,3}-{7,8} at (7 + 8 + 6 + 7 + 4 + 5)/6."""
    steps = agglomerate(POINTS, linkage)
    assert [height for _, _, height in steps] == pytest.approx(heights)
    assert cut(steps, 5, 2) == [0, 0, 0, 1, 1]
    assert cut(steps, 5, 3) == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(3))
def test_agglomeration_is_that_of_scipy(linkage, seed):
    points = np.random.default_rng(seed).normal(size=(24, 5))
    steps = agglomerate(points, linkage)
    tree = scipy_hierarchy.linkage(points, linkage)
    assert [height for _, _, height in steps] == pytest.approx(tree[:, 2].tolist())
    for count in range(1, 25):
        theirs = scipy_hierarchy.cut_tree(tree, count).ravel()
        assert cut(steps, 24, count) == theirs.tolist()  # both number clusters by first appearance


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.sampled_from(LINKAGES), st.integers(0, 2**32 - 1))
def test_cuts_are_nested_and_follow_the_experts(count, linkage, seed):
    random = np.random.default_rng(seed)
    points, order = random.normal(size=(count, 3)), random.permutation(count)
    steps, shuffled = agglomerate(points, linkage), agglomerate(points[order], linkage)
    previous = None
    for clusters in range(1, count + 1):
        labels = cut(steps, count, clusters)
        assert len(set(labels)) == clusters
        groups = {frozenset(np.flatnonzero(np.array(labels) == label).tolist()) for label in set(labels)}
        moved = np.array(cut(shuffled, count, clusters))
        assert groups == {frozenset(order[moved == label].tolist()) for label in set(moved.tolist())}
        if previous is not None:
            assert all(any(group <= wider for wider in previous) for group in groups)
        previous = groups


def test_ties_go_to_the_first_pair():
    """Distances 0-1, 1-2 and 2-3 are equal: 0-1 joins first, then 2-3 (1) before {0,1}-2 (average 1.5)."""
    assert [step[:2] for step in agglomerate(np.array([[0.0], [1.0], [2.0], [3.0]]), "average")] == [(0, 1), (2, 3), (0, 2)]
    duplicates = np.array([[5.0, 1.0], [0.1, 0.2], [5.0, 1.0], [0.1, 0.2]])
    assert [step[2] for step in agglomerate(duplicates, "average")][:2] == [0.0, 0.0]
    assert agglomerate(np.zeros((1, 4)), "average") == []


def test_k_means():
    random = np.random.default_rng(0)
    blobs = np.concatenate([random.normal(size=(5, 3)) * 0.01 + 10 * centre for centre in np.eye(3)])
    assert k_means(blobs, 3, 0) == [0] * 5 + [1] * 5 + [2] * 5
    points = random.normal(size=(30, 4))
    assert k_means(points, 7, 1) == k_means(points, 7, 1)
    for count in (1, 2, 5, 6):  # as many clusters as asked for, even where points are equal
        assert len(set(k_means(np.repeat(np.eye(2), 3, 0), count, 0))) == count


def layer_statistics(**arrays: object) -> LayerStatistics:
    return LayerStatistics(3, {"a": {name: np.asarray(value) for name, value in arrays.items()}})


def hc(outputs, selections, count, groups=1, **options):
    statistics = layer_statistics(all_output_sum=np.asarray(outputs, dtype=float), selections=selections, tokens=1)
    rules = Rules(len(selections), 1, groups, 1)
    return find("hc_smoe").function(statistics, Facts(3, len(selections), rules=rules), count, **options)


def test_hc_smoe_by_hand():
    """Clusters {0,1,3} and {7,8}: the mean of the first is 4/3, next to expert 1 (at 1); in a pair the lower id is the centre."""
    choice = hc(POINTS, [1, 3, 4, 0, 0], 2)
    assert choice.keep == [1, 3]
    assert choice.why["labels"] == [0, 0, 0, 1, 1]
    assert choice.why["heights"] == [pytest.approx([1, 1, 2.5, 37 / 6])]
    assert choice.why["usage"] == pytest.approx([1 / 8, 3 / 8, 4 / 8, 0, 0])
    first, second = choice.merge
    assert (first["into"], first["from"], first["weights"]) == (1, [0, 1, 2], pytest.approx([1 / 8, 3 / 8, 4 / 8]))
    assert (second["into"], second["from"], second["weights"]) == (3, [3, 4], [0.5, 0.5])  # never used: the plain mean
    assert (first["align"], first["router"], first["log_count"]) == ("none", "dominant", False)
    LayerPlan.model_validate({"layer": 3, "num_experts": 5, "keep": choice.keep, "merge": choice.merge, "why": choice.why})


def test_hc_smoe_options():
    single = hc(POINTS, [1] * 5, 3, linkage="single", weights="average", router="mean", log_count=True)
    assert single.keep == [0, 2, 3]  # expert 2 is alone: not a merge
    assert [entry["from"] for entry in single.merge] == [[0, 1], [3, 4]]
    assert all(entry["router"] == "mean" and entry["log_count"] for entry in single.merge)
    assert hc(POINTS, [1] * 5, 2, clustering="kmeans").why["labels"] == [0, 0, 0, 1, 1]
    whole = hc(POINTS, [1] * 5, 5)
    assert (whole.keep, whole.merge) == ([0, 1, 2, 3, 4], [])
    tokens = layer_statistics(all_output_sum=POINTS * 10, selections=[1] * 5, tokens=10)
    assert find("hc_smoe").function(tokens, Facts(3, 5, rules=Rules(5, 1)), 2).why["heights"][0] == pytest.approx(
        [1, 1, 2.5, 37 / 6]
    )


def test_clusters_stay_inside_expert_groups():
    """0 and 2 are equal, but of different groups of two: {0,1} and {2,3} are what can be merged."""
    outputs = [[0.0], [5.0], [0.0], [1.0]]
    assert [entry["from"] for entry in hc(outputs, [1] * 4, 2, groups=2).merge] == [[0, 1], [2, 3]]
    gram = np.outer([1.0, 2.0, 1.0, 2.0], [1.0, 2.0, 1.0, 2.0])
    statistics = layer_statistics(logit_gram=gram, selections=[9, 1, 8, 7])
    choice = find("m_smoe").function(statistics, Facts(3, 4, rules=Rules(4, 1, 2, 1)), 2)
    assert [(entry["into"], entry["from"]) for entry in choice.merge] == [(0, [0, 1]), (2, [2, 3])]
    assert choice.why["labels"] == [0, 0, 1, 1]
    with pytest.raises(UserError, match="3 clusters cannot be distributed evenly over 2 expert_groups"):
        hc(outputs, [1] * 4, 3, groups=2)


def test_choices_that_cannot_be_made():
    with pytest.raises(UserError, match="layer 3: 6 clusters requested, but there are 5 experts"):
        hc(POINTS, [1] * 5, 6)
    with pytest.raises(UserError, match="0 clusters"):
        hc(POINTS, [1] * 5, 0)
    with pytest.raises(UserError, match="outputs of expert 2 are not finite"):
        hc([[0.0], [1.0], [math.nan]], [1, 1, 1], 2)
    with pytest.raises(UserError, match="2 clusters of at most 1 cannot contain 3 experts; use -O capacity=2 or more"):
        find("m_smoe").function(
            layer_statistics(logit_gram=np.eye(3), selections=[1, 1, 1]), Facts(3, 3, rules=Rules(3, 1)), 2, capacity=1
        )
    with pytest.raises(UserError, match="hirarchical"):
        find("hc_smoe").parse_options({"clustering": "hirarchical"})  # the misspelling of the authors' scripts


def test_m_smoe_by_hand():
    """Usage order 2, 0, 3, 1. Dominants 2 and 0 (labels 0 and 1); 3 is like 0, and 1 is like both alike: the most used takes it."""
    logits = np.array([[1.0, 1.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0]])  # [tokens, experts]
    statistics = layer_statistics(logit_gram=logits.T @ logits, selections=[6, 1, 9, 4])
    similarity = similarity_of(logits.T @ logits)
    assert similarity[3, 0] == pytest.approx(1.0)
    assert similarity[3, 2] == pytest.approx(0.5)
    assert similarity[1, 0] == similarity[1, 2] == pytest.approx((1 / math.sqrt(2) + 1) / 2)
    choice = find("m_smoe").function(statistics, Facts(3, 4, rules=Rules(4, 1)), 2)
    assert choice.keep == [0, 2]
    assert choice.why["labels"] == [1, 0, 0, 1]
    first, second = choice.merge
    assert (first["into"], first["from"], first["weights"]) == (0, [0, 3], pytest.approx([0.6, 0.4]))
    assert (second["into"], second["from"], second["weights"]) == (2, [1, 2], pytest.approx([0.1, 0.9]))
    assert first["align"] == "weights"
    free = find("m_smoe").function(statistics, Facts(3, 4, rules=Rules(4, 1)), 2, align=False)
    assert {entry["align"] for entry in free.merge} == {"none"}


def test_similarity_is_the_cosine_over_tokens():
    logits = np.random.default_rng(0).normal(size=(50, 6)) + 1
    found = similarity_of(logits.T @ logits)
    for i, j in itertools.product(range(6), repeat=2):
        cosine = logits[:, i] @ logits[:, j] / np.linalg.norm(logits[:, i]) / np.linalg.norm(logits[:, j])
        assert found[i, j] == pytest.approx((cosine + 1) / 2 if i != j else 1.0)
    assert np.isfinite(similarity_of(np.zeros((3, 3)))).all()


def test_capacity_turns_experts_away():
    """All are most like dominant 0, which has room for one: the most used of the others gets it."""
    similarity = np.full((4, 4), 0.2)
    similarity[:, 0] = 0.9
    use = np.array([0.4, 0.3, 0.1, 0.2])
    assert join_dominants(use, similarity, 2) == ([0, 1, 0, 0], [0, 1])
    assert join_dominants(use, similarity, 2, capacity=2) == ([0, 1, 1, 0], [0, 1])


def test_weights():
    assert shares(np.array([0.25, 0.75]), "frequency") == [0.25, 0.75]
    assert shares(np.array([0.1, 0.3]), "average") == [0.5, 0.5]
    assert shares(np.array([0.1, 0.3]), "authors") == pytest.approx([0.1 / 0.4000001, 0.3 / 0.4000001], rel=1e-12)
    assert shares(np.array([0.0, 0.0]), "authors") == shares(np.array([0.0, 0.0]), "frequency") == [0.5, 0.5]


def test_global_budget():
    """Values 1, .3, .1 and 1, .4, .1 (every layer's largest is raised to 1); N = 4: threshold .1, N = 2: threshold .4."""
    usages = {1: np.array([0.6, 0.3, 0.1]), 4: np.array([0.5, 0.4, 0.1])}
    assert m_smoe_budget(usages, 2) == {1: 2, 4: 2}
    assert m_smoe_budget(usages, 1) == {1: 1, 4: 1}
    assert m_smoe_budget(usages, 1.5) == {1: 1, 4: 2}
    assert m_smoe_budget(usages, 3) == {1: 3, 4: 3}
    assert m_smoe_budget({0: np.array([0.5, 0.5, 0.0, 0.0]), 1: np.array([0.25] * 4)}, 3) == {0: 2, 1: 4}  # ties at 0 go
    assert list(usages[1]) == [0.6, 0.3, 0.1]
    with pytest.raises(UserError, match="without any"):
        m_smoe_budget(usages, 0.5)
    with pytest.raises(UserError, match="more than the number of experts"):
        m_smoe_budget(usages, 3.5)
    statistics = {layer: layer_statistics(selections=(10 * values).astype(int)) for layer, values in usages.items()}
    assert find("m_smoe").allot(statistics, 1.5) == {1: 1, 4: 2}
