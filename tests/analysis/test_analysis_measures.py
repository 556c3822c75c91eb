"""Each measure against a plain reference that shares no code with it, and the golden checks of the paper's definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, pearsonr, spearmanr

from expertsmith.analysis import cutting, effects, observations, sampled, usage
from expertsmith.analysis import similarity as sim
from expertsmith.analysis.static import Sampling, measure_layer
from expertsmith.calibration.all_experts import LayerSample
from expertsmith.calibration.stats import LayerStatistics, Statistics
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.planning.plan import CalibrationData, LayerPlan, Merge, Method, Plan, Source

E, F, D = 6, 10, 12


def cos(a, b) -> float:
    a, b = np.ravel(a).astype(float), np.ravel(b).astype(float)
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


class Weights:
    """Experts made up for a test, with the interface of `LayerWeights`."""

    def __init__(self, gate, up, down, router, shared=None, dense=None):
        self.held = {"gate": gate, "up": up, "down": down}
        self._router, self._shared, self._dense = router, shared or {}, dense or {}
        self.roles = tuple(role for role, held in self.held.items() if held is not None)

    dtype = torch.float32

    @property
    def count(self):
        return len(self.held[self.roles[0]])

    def experts(self, role):
        for matrix in self.held[role]:
            value = torch.from_numpy(matrix.astype(np.float32))
            yield value.T if role == "down" else value

    def router(self):
        return torch.from_numpy(self._router.astype(np.float32))

    def shared(self):
        return self._shared

    def dense_ffn(self):
        return self._dense


def made(seed=0, experts=E, **more) -> Weights:
    random = np.random.default_rng(seed)
    parts = [random.normal(0.2, 1.0, (experts, *shape)) for shape in ((F, D), (F, D), (D, F))]
    return Weights(*parts, random.normal(size=(experts, D)), **more)


EVERYTHING = Sampling(neurons=1000, pairs=1000)


# --- weights ---


@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_matrix_and_mean_neuron_cosines_are_those_of_a_loop(role):
    weights = made()
    found = measure_layer(weights, EVERYTHING)["projections"][role]
    held = weights.held[role]
    axis = 1 if role == "down" else 0
    for i, j in itertools.product(range(E), repeat=2):
        assert found["matrix_cosine"][i, j] == pytest.approx(cos(held[i], held[j]), abs=1e-6)
        assert found["neuron_cosine"][i, j] == pytest.approx(cos(held[i].mean(axis), held[j].mean(axis)), abs=1e-6)
    pairs = [cos(held[i], held[j]) for i in range(E) for j in range(i)]
    assert found["matrix_similarity"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert found["norm"] == pytest.approx([np.linalg.norm(m) for m in held], rel=1e-6)
    assert (np.diagonal(found["matrix_cosine"]) == 1).all()


def test_shared_experts_and_a_dense_ffn_stand_beside_the_routed_ones():
    random = np.random.default_rng(5)
    shared, dense = random.normal(size=(7, D)), random.normal(size=(F, D))
    pieces = {"shared": {"gate": torch.from_numpy(shared).float()}, "dense": {"gate": torch.from_numpy(dense).float()}}
    weights = made(**pieces)
    found = measure_layer(weights, EVERYTHING)["projections"]["gate"]
    assert found["neuron_members"][E:] == ["shared", "dense"]
    assert found["matrix_members"][E:] == ["dense"]
    first = weights.held["gate"][0]
    assert found["neuron_cosine"][0, E] == pytest.approx(cos(first.mean(0), shared.mean(0)), abs=1e-6)
    assert found["neuron_cosine"][0, E + 1] == pytest.approx(cos(first.mean(0), dense.mean(0)), abs=1e-6)
    assert found["matrix_cosine"][0, E] == pytest.approx(cos(first, dense), abs=1e-6)
    nearest = np.mean([max(cos(neuron, other) for other in dense) for neuron in first])
    assert found["dense_match"][0] == pytest.approx(nearest, abs=1e-6)


def test_experts_cut_out_of_a_dense_ffn_are_found_in_it():
    dense = np.random.default_rng(1).normal(size=(E * F, D))
    gate = dense[np.random.default_rng(2).permutation(E * F)].reshape(E, F, D)
    other = made()
    weights = Weights(
        gate, other.held["up"], other.held["down"], other._router, dense={"gate": torch.from_numpy(dense).float()}
    )
    assert measure_layer(weights, EVERYTHING)["projections"]["gate"]["dense_match"] == pytest.approx([1.0] * E, abs=1e-6)


def test_scaling_an_expert_changes_no_cosine_and_shuffling_neurons_no_mean_neuron():
    weights, changed = made(), made()
    order = np.random.default_rng(9).permutation(F)
    for role in changed.held:
        changed.held[role] = changed.held[role].copy()
        changed.held[role][2] *= 3.5
    base, scaled = (measure_layer(w, EVERYTHING)["projections"]["gate"] for w in (weights, changed))
    assert scaled["matrix_cosine"] == pytest.approx(base["matrix_cosine"], abs=1e-6)
    changed.held["gate"][1] = changed.held["gate"][1][order]
    shuffled = measure_layer(changed, EVERYTHING)["projections"]["gate"]
    assert shuffled["neuron_cosine"] == pytest.approx(base["neuron_cosine"], abs=1e-6)
    assert abs(shuffled["matrix_cosine"] - base["matrix_cosine"]).max() > 0.01


def test_matching_recovers_a_shuffled_expert():
    weights = made()
    order = np.random.default_rng(3).permutation(F)
    weights.held["gate"][1] = weights.held["gate"][0][order]
    found = measure_layer(weights, EVERYTHING)["projections"]["gate"]["match"]
    at = found["pairs"].index([0, 1])
    assert found["cosine"][at] == pytest.approx(1, abs=1e-6)
    assert found["mean"][at] == pytest.approx(1, abs=1e-6)
    assert found["tau"][at] == pytest.approx(kendalltau(range(F), np.argsort(order)).statistic, abs=1e-9)
    assert found["cosine_unordered"][at] == pytest.approx(cos(weights.held["gate"][0], weights.held["gate"][1]), abs=1e-6)


def test_matching_is_the_best_of_all_orders():
    random = np.random.default_rng(4)
    a, b = random.normal(size=(5, 8)), random.normal(size=(5, 8))
    norms = [np.linalg.norm(m, axis=1) for m in (a, b)]
    found = sim.match(a @ b.T, *norms, np.arange(5))
    best = max(itertools.permutations(range(5)), key=lambda order: sum(cos(a[p], b[q]) for p, q in enumerate(order)))
    assert tuple(found.partner) == best
    assert found.matched == pytest.approx(cos(a, b[list(best)]))
    assert found.unmatched == pytest.approx(cos(a, b))
    same = sim.match(a @ a.T, norms[0], norms[0], np.arange(5))
    assert same.tau == pytest.approx(1)


def test_matching_of_unrelated_experts_is_at_its_null():
    random = np.random.default_rng(6)
    parts = [random.normal(size=(4, *shape)) for shape in ((40, 30), (40, 30), (30, 40))]
    found = measure_layer(Weights(*parts, random.normal(size=(4, 30))), EVERYTHING)["projections"]["gate"]["match"]
    assert found["similarity"] > 0.2  # what selection alone gives
    assert found["similarity"] == pytest.approx(found["null"], abs=0.02)


def test_sampled_neurons_come_near_all_of_them_within_the_stated_error():
    random = np.random.default_rng(7)
    common = random.normal(size=(64, 24))
    gate = np.stack([(common + 0.5 * random.normal(size=common.shape))[random.permutation(64)] for _ in range(4)])
    weights = Weights(gate, None, np.zeros((4, 24, 64)) + random.normal(size=(4, 24, 64)), random.normal(size=(4, 24)))
    weights.roles = ("gate", "down")
    whole, part = (measure_layer(weights, Sampling(n, 6))["projections"]["gate"] for n in (64, 32))
    assert part["match"]["neurons"] == 32
    assert part["match"]["similarity"] == pytest.approx(whole["match"]["similarity"], abs=4 * part["match"]["error"] + 0.03)
    assert (part["effective_rank_error"] > 0).all()
    assert (whole["effective_rank_error"] == 0).all()
    for found in (
        whole,
        part,
    ):  # 4 centred vectors of 64 * 24 standardised entries: the squared lengths add up to (4 - 1) times that
        assert (found["pca"] ** 2).sum() / sum(found["pca_explained"]) == pytest.approx(3 * 64 * 24, rel=1e-5)
    assert part["pca_explained"] == pytest.approx(whole["pca_explained"], abs=3 / np.sqrt(32 * 24))


def test_one_order_for_all_projections_finds_a_permuted_function():
    weights = made()
    order = np.random.default_rng(3).permutation(F)
    for role in ("gate", "up"):
        weights.held[role] = np.stack([weights.held[role][0], weights.held[role][0][order]])
    weights.held["down"] = np.stack([weights.held["down"][0], weights.held["down"][0][:, order]])
    weights._router = weights._router[:2]
    assert measure_layer(weights, EVERYTHING)["joint_match"]["mean"] == pytest.approx(1, abs=1e-6)


def test_router_expert_correlation_is_pearsons_with_a_permutation_null():
    found = measure_layer(made(), EVERYTHING)
    low = np.tril_indices(E, -1)
    x = found["router_cosine"][low]
    for role, row in found["router_expert"].items():
        r = pearsonr(x, found["projections"][role]["neuron_cosine"][low]).statistic
        assert row["r"] == pytest.approx(r, abs=1e-9)
        assert row["r2"] == pytest.approx(r * r, abs=1e-9)
        assert 0 < row["p"] <= 1
        assert row["null"] == pytest.approx(1 / (len(x) - 1), abs=0.08)


def test_correlation_of_an_affine_copy_is_exact_and_rare():
    y = sim.cosine(np.cov(np.random.default_rng(0).normal(size=(8, 9))))
    (found,) = sim.correlate(0.3 + 0.5 * y, [y])
    assert found.r == pytest.approx(1)
    assert found.p == pytest.approx(1 / 1000)
    (flipped,) = sim.correlate(0.3 - 0.5 * y, [y])
    assert flipped.r == pytest.approx(-1)
    assert sim.correlate(np.ones((8, 8)), [y]) == [None]


def test_permutation_p_is_uniform_without_relation():
    random = np.random.default_rng(1)
    ps = [sim.correlate(*(lambda m: (m[0], [m[1]]))([sim.cosine(np.cov(random.normal(size=(7, 20)))) for _ in range(2)]), seed)[0].p for seed in range(120)]  # fmt: skip
    assert 0.35 < np.mean(ps) < 0.65
    assert np.mean(np.array(ps) < 0.05) < 0.15


def test_principal_components_are_those_of_a_full_svd():
    weights = made()
    found = measure_layer(weights, EVERYTHING)["projections"]["up"]
    flat = weights.held["up"].reshape(E, -1)
    standard = (flat - flat.mean(0)) / flat.std(0, ddof=1)
    u, s, _ = np.linalg.svd(standard, full_matrices=False)
    for k in range(2):
        assert np.abs(found["pca"][:, k]) == pytest.approx(np.abs(u[:, k] * s[k]), abs=1e-4)
        assert found["pca"][:, k].mean() == pytest.approx(0, abs=1e-5)
    assert found["pca_explained"] == pytest.approx((s**2 / (s**2).sum())[:2], abs=1e-5)


def test_effective_rank_is_the_entropy_of_singular_values():
    matrix = np.random.default_rng(0).normal(size=(6, 9))
    s = np.linalg.svd(matrix, compute_uv=False)
    p = s / s.sum()
    assert sim.effective_rank(matrix @ matrix.T) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert sim.effective_rank(np.eye(5)) == pytest.approx(5)
    assert sim.effective_rank(np.outer(matrix[0], matrix[0])) == pytest.approx(1, abs=1e-3)
    assert math.isnan(sim.effective_rank(np.zeros((3, 3))))


def test_angular_similarity_and_clamping():
    assert sim.angular(np.array([1, 0.5, 0, -1, 1 + 1e-9])) == pytest.approx([1, 2 / 3, 1 / 2, 0, 1])


def test_copies_are_counted_and_left_out_and_zero_experts_have_no_cosine():
    weights = made()
    for role in weights.held:
        weights.held[role][1] = weights.held[role][0]
        weights.held[role][5] = 0
    found = measure_layer(weights, EVERYTHING)["projections"]["gate"]
    held = weights.held["gate"]
    assert found["copies"] == 1
    assert found["zero_experts"] == 1
    assert np.isnan(found["matrix_cosine"][5]).all()
    pairs = [cos(held[i], held[j]) for i in range(5) for j in range(i) if (i, j) != (1, 0)]
    assert found["matrix_similarity"] == pytest.approx(np.mean(pairs), abs=1e-6)


def test_stripes_of_any_size_give_the_same(monkeypatch):
    from expertsmith.analysis import static

    whole = measure_layer(made(), EVERYTHING)["projections"]["down"]
    monkeypatch.setattr(static, "STRIPE", E * F * 3)
    parts = measure_layer(made(), EVERYTHING)["projections"]["down"]
    for name in ("matrix_cosine", "neuron_cosine", "pca"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-4)


def test_sampled_pairs_are_a_seeded_subset():
    assert len(sim.sample_pairs(8, 100, 0)) == 28
    some = sim.sample_pairs(64, 32, 1)
    assert len(set(some)) == 32
    assert all(0 <= a < b < 64 for a, b in some)
    assert some == sim.sample_pairs(64, 32, 1) != sim.sample_pairs(64, 32, 2)
    assert sim.sample_pairs(1, 32, 1) == []


# --- usage ---


def statistics_of(selected: dict[str, np.ndarray], n: int, sequences: int = 4, layer: int = 0) -> LayerStatistics:
    """From [T, k] selected experts a domain: weight 1/k, norm 1 + id, saliency 1."""
    domains = {}
    for name, ids in selected.items():
        tokens, k = ids.shape
        hit = np.zeros((tokens, n))
        np.put_along_axis(hit, ids, 1.0, 1)
        count, norm = hit.sum(0), 1.0 + np.arange(n)
        domains[name] = {
            "tokens": np.array([tokens]), "selections": count.astype(np.int64), "coselections": (hit.T @ hit).astype(np.int64),
            "weight_sum": count / k, "score_sum": count / k, "norm_sum": count * norm, "norm_max": norm * (count > 0),
            "weighted_norm_sum": count * norm / k, "weighted_norm_sq_sum": count * (norm / k) ** 2, "weight_sq_sum": count / k**2, "norm_sq_sum": count * norm**2,
            "easy_ep": count, "turn_sum": np.array([0.1 * tokens]), "entropy_sum": np.array([0.5 * tokens]),
            "easy_ep_by_sequence": np.stack([part.sum(0) for part in np.array_split(hit, sequences)]).astype(np.float32),
        }  # fmt: skip
    return LayerStatistics(layer, domains)


def draws(tokens: int, n: int, k: int, weights=None, seed=0) -> np.ndarray:
    random = np.random.default_rng(seed)
    p = None if weights is None else np.asarray(weights) / np.sum(weights)
    return np.stack([random.choice(n, k, replace=False, p=p) for _ in range(tokens)])


def test_shares_entropies_and_load():
    ids = np.array([[0], [0], [0], [1]])
    found = usage.measure_usage(statistics_of({"a": ids}, 4))["domains"]["a"]
    assert found["usage"].tolist() == [0.75, 0.25, 0, 0]
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["load_entropy_share"] == pytest.approx(h / math.log(4))
    assert found["effective_experts"] == pytest.approx(math.exp(h))
    assert found["load_cv"] == pytest.approx(np.std([3, 1, 0, 0]))
    assert found["load_peak"] == pytest.approx(3)
    assert found["unused"] == 2
    assert found["routing_entropy"] == pytest.approx(0.5)
    assert found["turn"] == pytest.approx(0.1)
    assert found["energy"].tolist() == pytest.approx([3 / 7, 4 / 7, 0, 0])
    assert math.isnan(found["mean_norm"][3])


def test_coselection_lift_is_1_for_independent_choices_and_more_for_a_couple():
    counts = statistics_of({"a": draws(20000, 6, 2)}, 6).domains["a"]["coselections"]
    lift = usage.coselection_lift(counts)
    low = np.tril_indices(6, -1)
    assert lift[low] == pytest.approx(np.ones(15), abs=0.1)
    couples = np.array([[0, 1], [2, 3]] * 50 + [[0, 2], [1, 3]])
    lift = usage.coselection_lift(statistics_of({"a": couples}, 4).domains["a"]["coselections"])
    assert lift[0, 1] > 2 > 1 > lift[0, 2]
    assert lift == pytest.approx(lift.T, nan_ok=True)


def test_coselection_chance_by_hand():
    """N = 3, 2, 1 with top-2 of 3 tokens: (0,1), (0,1), (0,2). e_01 = (3·1·2/(6-3) + 2·1·3/(6-2)) / 2 = (2 + 1.5) / 2."""
    lift = usage.coselection_lift(statistics_of({"a": np.array([[0, 1], [0, 1], [0, 2]])}, 3).domains["a"]["coselections"])
    assert lift[0, 1] == pytest.approx(2 / 1.75)


def test_information_of_expert_and_domain():
    assert usage.information(np.array([[10, 0], [0, 10]])) == pytest.approx(math.log(2))
    assert usage.information(np.array([[5, 5], [50, 50]])) == pytest.approx(0, abs=1e-12)
    counts = np.array([[8.0, 2, 5], [1, 6, 3]])
    joint = counts / counts.sum(1, keepdims=True) / 2
    brute = sum(joint[d, e] * math.log(joint[d, e] / (joint[d].sum() * joint[:, e].sum())) for d in range(2) for e in range(3))
    assert usage.information(counts) == pytest.approx(brute)


def test_specialisation_is_told_from_chance():
    apart = {"a": draws(400, 6, 2, [9, 9, 9, 1, 1, 1]), "b": draws(400, 6, 2, [1, 1, 1, 9, 9, 9], 1)}
    alike = {"a": draws(400, 6, 2), "b": draws(400, 6, 2, None, 1)}
    far, near = (usage.specialisation(statistics_of(held, 6, 8)) for held in (apart, alike))
    assert far["saliency_information_p"] < 0.02
    assert far["saliency_information"] > 5 * far["saliency_information_null"]
    assert near["saliency_information_p"] > 0.05
    assert near["information"] == pytest.approx(near["information_bias"], abs=0.01)
    assert far["expert_domain"][0, 0] > 0.8
    assert far["expert_domain"].sum(1) == pytest.approx(np.ones(6))
    assert usage.specialisation(statistics_of({"a": draws(10, 6, 2)}, 6)) == {}


def test_stability_compares_few_demonstrations_with_the_others():
    random = np.random.default_rng(0)
    clear = np.tile([9.0, 9, 9, 1, 1, 1], (16, 1)) + random.random((16, 6))
    rows = usage.stability(clear)
    assert [row["demonstrations"] for row in rows] == [1, 2, 4, 8]
    assert all(row["overlap"] == 1 and row["chance"] == 0.5 for row in rows)
    noise = usage.stability(random.random((64, 40)))
    assert noise[0]["overlap"] == pytest.approx(0.5, abs=0.1)
    assert usage.stability(clear[:1]) == []


def test_super_experts_are_far_above_the_others():
    ids = draws(200, 40, 4)
    entry = statistics_of({"a": ids}, 40)
    assert usage.super_experts([entry])["experts"] == []
    entry.domains["a"]["norm_max"][7] = 900.0
    made = usage.super_experts([entry])
    (found,) = made["experts"]
    assert made["bar"] == max(np.quantile(entry.total("norm_max"), 0.995), 90.0, 5 * made["median"]) < 900
    assert (found["layer"], found["expert"], found["max_norm"]) == (0, 7, 900.0)


# --- all experts ---


def sample_of(norms, scores, selected, sequence=None) -> LayerSample:
    tokens, n = norms.shape
    similar = np.full((n, n), 0.5) + 0.5 * np.eye(n)
    sequence = np.arange(tokens) // 4 if sequence is None else sequence
    counts = np.array([10, 10, 3])
    routed = np.zeros((3, n), dtype=int)
    routed[0, 0], routed[1, 1], routed[2, 0] = 10, 10, 3
    return LayerSample(
        0, n, norms, scores, selected, np.ones(selected.shape), similar, similar, np.full(tokens, 0.5), similar,
        [str(e) for e in range(n)], 0.0, ["a"] * tokens, sequence, np.array([5, 6, 7]), counts, routed,
    )  # fmt: skip


def test_rank_counts_by_hand():
    counts = sampled.rank_counts(np.array([[0.2, 0.5, 0.3]]), np.array([[1.0, 2.0, 3.0]]))
    assert counts.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_rank_counts_are_diagonal_for_a_router_that_follows_norms():
    norms = np.random.default_rng(0).random((50, 5))
    assert (sampled.rank_counts(norms**2, norms) == 50 * np.eye(5)).all()
    assert (sampled.rank_counts(-norms, norms) == 50 * np.eye(5)[::-1]).all()
    ties = sampled.rank_counts(np.zeros((50, 5)), norms)
    assert (ties.sum(0) == 50).all()
    assert (ties.sum(1) == 50).all()
    assert sampled.rank_counts(np.random.default_rng(1).random((3, 128)), np.random.default_rng(2).random((3, 128))).shape == (
        16,
        16,
    )


def test_spearman_is_scipys_row_by_row():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 4, (30, 6)).astype(float), random.random((30, 6))
    expected = [spearmanr(x, y).statistic if np.ptp(x) else float("nan") for x, y in zip(a, b, strict=True)]
    assert sampled.spearman(a, b) == pytest.approx(expected, nan_ok=True)


def test_norms_against_scores():
    random = np.random.default_rng(0)
    norms = random.random((40, 5))
    follows = sampled.measure_sample(sample_of(norms, norms**3, np.argsort(-norms, 1)[:, :2]))
    assert follows["norm_score_rho"]["mean"] == pytest.approx(1)
    assert follows["largest_norm_top_scored"]["mean"] == 1
    assert follows["chosen_norm_percentile"]["mean"] == pytest.approx((1 + 0.75) / 2)
    norms = random.random((2000, 5))
    free = sampled.measure_sample(sample_of(norms, random.random((2000, 5)), np.tile([0, 1], (2000, 1))))
    assert free["norm_score_rho"]["mean"] == pytest.approx(0, abs=0.05)
    assert free["largest_norm_top_scored"]["mean"] == pytest.approx(0.2, abs=0.04)
    assert free["chosen_norm_percentile"]["mean"] == pytest.approx(0.5, abs=0.04)
    assert free["rank_counts"].sum() == 10000
    assert follows["output_similarity"] == pytest.approx(0.5)


def test_ids_beyond_the_experts_are_not_chosen():
    norms = np.random.default_rng(0).random((8, 3))
    found = sampled.measure_sample(sample_of(norms, norms, np.full((8, 2), 3)))
    assert found["largest_norm_selected"]["mean"] == 0
    assert found["chosen_norm_percentile"]["mean"] is None


def test_intervals_resample_whole_texts():
    """All tokens of a text agree: the interval is that of 6 values, not of 600."""
    values, groups = np.repeat([0.0, 1, 0, 1, 0, 1], 100), np.repeat(np.arange(6), 100)
    wide, narrow = sampled.bootstrap(values, groups), sampled.bootstrap(values, np.arange(600))
    assert wide["mean"] == narrow["mean"] == 0.5
    assert wide["high"] - wide["low"] > 5 * (narrow["high"] - narrow["low"])
    assert sampled.bootstrap(values, np.zeros(600))["low"] is None
    assert sampled.bootstrap(np.full(3, np.nan), np.arange(3))["mean"] is None


def test_loved_tokens_need_evidence():
    found = sampled.loved_tokens(sample_of(np.ones((4, 3)), np.ones((4, 3)), np.zeros((4, 1), dtype=int)), lambda t: f"<{t}>")
    assert [(row["token"], row["text"], row["seen"], row["routed"]) for row in found[0]] == [
        (5, "<5>", 10, 1.0)
    ]  # 7 is too rare
    rate = 13 / 23
    assert found[0][0]["lift"] == pytest.approx((10 + 5 * rate) / 15 / rate)
    assert found[2] == []


# --- the three observations ---


def layer_of(
    number: int, gate: float = 0.5, similarity: float = 0.6, rho: float = 0.3, experts: int = 8, p: float = 0.001
) -> dict:
    null = np.full(999, 0.03)
    row = lambda r2, p: {"r": math.sqrt(r2), "r2": r2, "p": p, "null": 0.03, "null_values": null}  # noqa: E731
    low = rho - 0.05
    return {
        "layer": number,
        "num_experts": experts,
        "static": {
            "router_expert": {"gate": row(gate, p), "up": row(0.05, 0.5), "down": row(0.04, 0.5)},
            "projections": {role: {"neuron_similarity": similarity, "matrix_similarity": similarity} for role in ("gate", "up", "down")},
        },
        "sample": {
            "output_similarity": similarity,
            "norm_score_rho": {"mean": rho, "low": low, "high": rho + 0.05},
            "largest_norm_top_scored": {"mean": (3 if rho > 0 else 0.5) / experts, "low": None, "high": None},
            "chosen_norm_percentile": {"mean": 0.6, "low": None, "high": None},
        },
    }  # fmt: skip


def verdicts(layers) -> list[str]:
    return [found["verdict"] for found in observations.observations(layers)]


def test_verdicts_of_a_model_as_in_the_paper():
    falling = [layer_of(i, similarity=0.8 - 0.05 * i) for i in range(7)] + [layer_of(7, similarity=0.9)]
    assert verdicts(falling) == ["supported"] * 3


def test_verdicts_of_the_opposite():
    rising = [layer_of(i, gate=0.02, similarity=0.4 + 0.05 * i, rho=-0.2, p=0.6) for i in range(7)] + [
        layer_of(7, 0.02, 0.3, -0.2, p=0.6)
    ]
    assert verdicts(rising) == ["not supported"] * 3


def test_verdicts_in_between():
    assert verdicts([layer_of(i, gate=0.08, similarity=0.8 - 0.05 * i, p=0.02) for i in range(8)])[::2] == ["partly", "partly"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: [row["static"]["router_expert"].pop("gate") for row in rows], ["not testable", "supported", "partly"]),
        (lambda rows: [row.pop("sample") for row in rows], ["supported", "not testable", "partly"]),
        (lambda rows: rows.__delitem__(slice(3, None)), ["supported", "supported", "not testable"]),
        (lambda rows: [row.update(num_experts=4) for row in rows], ["not testable", "partly", "partly"]),
    ],
)
def test_what_cannot_be_tested_says_why(change, expected):
    rows = [layer_of(i, similarity=0.8 - 0.05 * i) for i in range(8)]
    change(rows)
    found = observations.observations(rows)
    assert [row["verdict"] for row in found] == expected
    assert all(len(row["text"]) > 20 for row in found)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0.0, "negligible"),
        (-0.099, "negligible"),
        (0.1, "weak"),
        (-0.29, "weak"),
        (0.3, "moderate"),
        (0.5, "strong"),
        (-1.0, "strong"),
    ],
)
def test_sizes_are_cohens(value, word):
    assert effects.Effect(value, None, None, 0, 1).size == word


def test_the_interval_over_layers_by_hand():
    """z = 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3), t of two degrees of freedom 4.302653."""
    found = effects.over_layers([math.tanh(z) for z in (0.1, 0.2, 0.3)], None)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((math.tanh(0.2 - half), math.tanh(0.2 + half)), abs=1e-6)
    assert found.value == pytest.approx(sum(math.tanh(z) for z in (0.1, 0.2, 0.3)) / 3)
    assert (found.agree, found.of) == (3, 3)


def test_the_interval_of_one_layer_counts_experts():
    """arctanh 0.5 = 0.549306, 1.96 / sqrt(19 - 3) = 0.49."""
    alone = effects.of_experts(0.5, 19)
    assert alone == pytest.approx((math.tanh(0.549306 - 0.49), math.tanh(0.549306 + 0.49)), abs=1e-6)
    assert effects.over_layers([0.5], alone) == effects.Effect(0.5, *alone, 1, 1)
    assert effects.of_experts(0.5, 3) is None
    assert effects.over_layers([0.5], None).word == "weak"  # nothing says how sure it is


def test_the_interval_of_ranks_by_hand():
    """Four in order are 0.9 (1 - 6 / 60), and arctanh 0.9 = 1.472219 is less than 1.96 sqrt(1.06): too few to say."""
    low, high = effects.of_ranks(1.0, 4)
    assert (low, high) == pytest.approx((math.tanh(1.472219 - 2.017943), math.tanh(1.472219 + 2.017943)), abs=1e-5)
    assert low < 0
    assert effects.of_ranks(1.0, 8)[0] > 0.8
    assert effects.of_ranks(1.0, 3) is None


@pytest.mark.parametrize(
    ("effect", "word"),
    [
        ((0.4, 0.2, 0.6, 5, 5), "supported"),
        ((0.1, 0.01, 0.2, 3, 5), "supported"),
        ((0.1, 0.01, 0.2, 2, 4), "mixed"),  # half of the layers are not most
        ((0.09, 0.01, 0.2, 5, 5), "weak"),
        ((0.12, -0.06, 0.3, 4, 5), "mixed"),
        ((0.12, -0.06, 0.3, 5, 5), "weak"),
        ((0.05, -0.1, 0.2, 4, 5), "not supported"),
        ((0.3, None, None, 1, 1), "weak"),
        ((-0.3, -0.4, -0.2, 0, 5), "not supported"),
        ((0.0, 0.0, 0.0, 0, 5), "not supported"),
    ],
)
def test_the_word_follows_from_size_interval_and_signs(effect, word):
    assert effects.Effect(*effect).word == word


def test_a_correlation_of_a_tenth_with_mixed_signs_is_not_supported():
    """Four layers with an interval above 0 and a high lift are not enough, if they disagree. By hand: Fisher's z 0.1029 on average, its standard error
    0.0650, t of four degrees of freedom 2.7764."""
    rows = [layer_of(i, rho=rho) for i, rho in enumerate((0.34, 0.08, 0.06, -0.02, 0.04))]
    for row in rows:
        row["sample"]["norm_score_rho"]["low"] = row["sample"]["norm_score_rho"]["mean"] - 0.01
        row["sample"]["largest_norm_top_scored"]["mean"] = 3 / 8
    found = observations.router_likes_norms(rows)
    assert found["rho"] == pytest.approx(0.1)
    assert found["layers_above"] == 4
    assert found["verdict"] == "mixed"
    assert "+0.10, weak (95 % interval -0.08 to +0.28)" in found["text"]
    assert found["effect"] == pytest.approx(
        {"value": 0.1, "low": -0.0775, "high": 0.2760, "size": "weak", "agree": 4, "of": 5}, abs=1e-3
    )
    assert "Cohen (1988)" in found["rule"]


def test_a_trend_over_few_layers_is_weak():
    """Four layers in order before the last: one in 24 orders is."""
    rows = [layer_of(i, similarity=0.8 - 0.05 * i) for i in range(4)] + [layer_of(4, similarity=0.9)]
    found = observations.diversity_grows(rows)
    assert (found["rho"], found["last_above"], found["verdict"]) == (-1, True, "weak")
    assert "It falls in 3 of 3 steps" in found["text"]


def test_depth_trend_by_scipy():
    values = np.array([0.9, 0.7, 0.8, 0.5, 0.4, 0.95])
    found = observations.depth_trend(values)
    assert found["rho"] == pytest.approx(spearmanr(range(5), values[:5]).statistic)
    exact = np.mean(
        [spearmanr(range(5), order).statistic <= found["rho"] + 1e-9 for order in itertools.permutations(values[:5])]
    )
    assert found["p"] == pytest.approx(exact, abs=0.02)
    assert found["last_above"]
    assert found["last_z"] > 2


# --- before and after a cut ---


def statistics(layers: int = 2, n: int = 8) -> Statistics:
    held = {
        layer: statistics_of(
            {"a": draws(300, n, 2, np.arange(1, n + 1), layer), "b": draws(300, n, 2, np.arange(n, 0, -1), layer)}, n, 4, layer
        )
        for layer in range(layers)
    }
    header = {
        "model": {"fingerprint": "sha256:x"},
        "data": {"tokens": {"a": 300, "b": 300}, "sequences": {"a": 4, "b": 4}, "sequence_lengths": {"a": [75] * 4, "b": [75] * 4}, "packed": {"a": False, "b": False}, "fingerprint": "y"},
    }  # fmt: skip
    return Statistics(header, held)


def test_lost_shares_are_those_of_the_dropped_experts():
    held = statistics()
    found = cutting.before_cut(held, dict.fromkeys((0, 1), Rules(8, 2)), "mixtral")
    m, r, d = found["methods"].index("frequency"), found["ratios"].index(0.5), 0
    assert found["counts"][r] == [4, 4]
    for column in (0, 1):
        entry = held.layers[column]
        kept = np.argsort(-entry.total("selections"), kind="stable")[:4]
        mass = entry.domains["a"]["weight_sum"]
        assert found["mass"][m, r, d, column] == pytest.approx(1 - mass[kept].sum() / mass.sum())
        own = np.argsort(-entry.domains["a"]["selections"], kind="stable")[:4]
        energy = entry.domains["a"]["weighted_norm_sq_sum"]
        assert found["energy_own"][m, r, d, column] == pytest.approx(1 - energy[own].sum() / energy.sum())
    assert {"easy_ep", "reap", "frequency", "random", "router_score"} <= set(found["methods"])
    assert (np.diff(found["mass"][m], axis=0) >= -1e-12).all()  # fewer experts, more lost
    assert sorted(found["kept"]) == ["all", "for a", "for b"]


def test_budget_is_the_fewest_experts_within_the_tolerance():
    held = statistics()
    found = cutting.suggest_budget(held, dict.fromkeys((0, 1), Rules(8, 2)), "mixtral")
    for row in found["by_layer"]:
        assert row["worst_lost_energy"] <= found["tolerance"] or row["keep"] == row["of"]
    assert found["uniform"] == max(row["keep"] for row in found["by_layer"])
    assert found["for_domain"]["a"]["uniform"] <= found["uniform"]
    grouped = cutting.suggest_budget(held, dict.fromkeys((0, 1), Rules(8, 2, 4, 2)), "deepseek_v3")
    assert all(row["keep"] % 4 == 0 for row in grouped["by_layer"])


def test_layers_that_do_little_are_named():
    held = statistics(3)
    for name in ("a", "b"):
        held.layers[1].domains[name]["turn_sum"] = np.array([0.001])
    found = cutting.redundant_layers(held)
    assert found["redundant"] == [1]
    assert found["turn"][0] == {"layer": 0, "a": pytest.approx(0.1), "b": pytest.approx(0.1)}


def plan_of(*layers: LayerPlan) -> Plan:
    return Plan(method=Method(name="m"), model=Source(model_type="mixtral", fingerprint="sha256:x"), calibration=CalibrationData(fingerprint="y", tokens={}), layers=list(layers))  # fmt: skip


def test_after_a_cut_what_went_and_what_moved():
    before = Statistics(statistics().header, {0: statistics_of({"a": np.array([[0, 1], [0, 2], [0, 1], [2, 3]])}, 4)})
    after = Statistics(before.header, {0: statistics_of({"a": np.array([[0, 1], [0, 1], [0, 1], [1, 2]])}, 3)})
    made_by = plan_of(
        LayerPlan(layer=0, num_experts=4, keep=[0, 1, 2], merge=[Merge(into=2, **{"from": [2, 3]}, weights=[0.5, 0.5])])
    )
    (row,) = cutting.after_cut(made_by, before, after)["layers"]
    assert row["dropped"] == [3]
    assert row["merged"] == [{"into": 2, "from": [2, 3]}]
    assert row["lost"]["a"]["selections"] == pytest.approx(1 / 8)
    old, new = np.array([3, 2, 2]) / 7, np.array([3, 4, 1]) / 8
    assert row["routing"]["a"]["moved"] == pytest.approx(np.abs(old - new).sum() / 2)


def test_a_plan_of_another_model_or_output_is_refused():
    made_by = plan_of(LayerPlan(layer=0, num_experts=4, keep=[0, 1]))
    cutting.check_plan(made_by, "ref", {0: 4}, {0: 2}, "out")
    with pytest.raises(UserError, match="the plan has 4 experts in decoder layer 0, ref has 8"):
        cutting.check_plan(made_by, "ref", {0: 8}, {0: 2}, "out")
    with pytest.raises(UserError, match="the plan keeps 2 experts in decoder layer 0, but out has 3"):
        cutting.check_plan(made_by, "ref", {0: 4}, {0: 3}, "out")
