"""MoEITS: histograms that count as numpy's do, mutual information, the removal path and what is made of it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SUPPORTED
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules
from expertsmith.methods import counting, information
from expertsmith.methods.base import Facts
from expertsmith.methods.information import codes, edges, joint_counts, joint_entropy, nmi, nmi_matrix, on_cores
from expertsmith.methods.moeits import Path, choose, combine, grouped_path, measure, moeits, removal_path, threshold

always = settings(derandomize=True, deadline=None, max_examples=60)  # the same examples in every run
numpy_caps = pytest.mark.skipif(
    tuple(int(part) for part in np.__version__.split(".")[:2]) < (2, 4), reason="numpy2 stands for the rule of numpy 2.4"
)


def draws(count: int = 160, most: int = 20000):
    """Arrays of many kinds: normal, heavy tails, few values, uniform, constant, mostly zero, far from zero, one far outlier."""
    draw = np.random.default_rng(5)
    kinds = [
        lambda n: draw.standard_normal(n) * 0.02,
        lambda n: draw.standard_t(2, n),
        lambda n: np.round(draw.standard_normal(n) * draw.integers(1, 20)) / 8,
        lambda n: draw.uniform(-1, 1, n),
        lambda n: np.full(n, draw.standard_normal()),
        lambda n: np.where(draw.uniform(size=n) < 0.9, 0, draw.standard_normal(n)),
        lambda n: draw.standard_normal(n) + 1000,
        lambda n: np.concatenate([draw.standard_normal(n) * 0.01, [5.0]]),
    ]
    for number in range(count):
        array = kinds[number % len(kinds)](int(math.exp(draw.uniform(0, math.log(most)))))
        if number % 3 == 0 and number % len(kinds) != 6:
            array = array.astype(np.float16)
        yield array.astype(np.float32 if number // 8 % 2 else np.float64)


def plain_entropy(counts) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def plain_nmi(a, b) -> float:
    """The formula on numpy's own histograms, without any of the code under test."""
    one, ea = np.histogram(a, bins="auto")
    two, eb = np.histogram(b, bins="auto")
    both = np.histogram2d(a.reshape(-1), b.reshape(-1), bins=[ea, eb])[0]
    h, g = plain_entropy(one), plain_entropy(two)
    return (h + g - plain_entropy(both)) / math.sqrt(h * g)


def symmetric(upper: dict[tuple[int, int], float]) -> np.ndarray:
    count = 1 + max(j for _, j in upper)
    matrix = np.zeros((count, count))
    for (i, j), value in upper.items():
        matrix[i, j] = matrix[j, i] = value
    return matrix


def facts(matrix_or_count, groups: int = 1, least: int = 1, model_type: str = "") -> Facts:
    count = matrix_or_count if isinstance(matrix_or_count, int) else len(matrix_or_count)
    return Facts(0, count, model_type=model_type, rules=Rules(count, least, groups, groups))


def of_matrix(matrix, least: int = 1, groups: int = 1, **options):
    arrays = {"up": matrix, "baseline_up": np.array([]), "constant_up": np.zeros(len(matrix), bool)}
    return moeits(arrays, facts(matrix, groups, least), **options)


def kept(matrix, factor: float) -> set[int]:
    order = of_matrix(matrix, factor=factor)
    return set(range(len(matrix))) - set(order.experts[: order.stop])


class Held:
    """`Projections` of arrays."""

    def __init__(self, **roles) -> None:
        self.held = roles
        self.roles = tuple(roles)

    def of(self, role: str):
        return iter(self.held[role])


# ---- bins and counts


@numpy_caps
def test_edges_and_counts_are_those_of_numpy():
    for array in draws():
        found = codes(array, precision=str(array.dtype))
        assert np.array_equal(edges(array), np.histogram_bin_edges(array, bins="auto"))
        assert edges(array).dtype == array.dtype
        counts = np.histogram(array, bins="auto")[0]
        assert found.k == len(counts)
        assert np.array_equal(np.bincount(found.codes), counts[counts > 0])
        assert found.used == np.count_nonzero(counts)
        assert found.constant == (array.min() == array.max())


@numpy_caps
def test_joint_counts_are_those_of_histogram2d():
    draw = np.random.default_rng(1)
    tables = set()
    for array in draws(64, 4000):
        other = (
            draw.permutation(array) if array.size % 2 else (array * 0.5 + draw.standard_normal(array.size)).astype(array.dtype)
        )
        a, b = (codes(x, precision=str(x.dtype)) for x in (array, other))
        found = joint_counts(a, b)
        reference = np.histogram2d(array, other, bins=[edges(array), edges(other)])[0]
        reference = reference[reference.any(1)][:, reference.any(0)]  # without empty bins
        dense = a.used * b.used <= array.size
        tables.add(dense)
        if dense:
            assert np.array_equal(found.reshape(a.used, b.used), reference)
        else:  # sparse: the non-zero cells, in order of the table
            assert np.array_equal(found, reference[reference > 0])
    assert tables == {True, False}  # both ways of counting were used


def test_the_sum_over_chunks_is_the_whole(monkeypatch):
    draw = np.random.default_rng(2)
    a, b = draw.standard_normal((2, 5000))
    whole = [codes(x, precision="float64") for x in (a, b)]
    table = joint_counts(*whole)
    for module in (information, counting):
        monkeypatch.setattr(module, "CHUNK", 64)
    parts = [codes(x, precision="float64") for x in (a, b)]
    assert all(np.array_equal(x.codes, y.codes) for x, y in zip(whole, parts, strict=True))
    assert np.array_equal(joint_counts(*parts), table)


def test_a_value_on_an_edge_is_in_the_bin_that_begins_there():
    array = np.arange(1, 9, dtype=np.float64)
    assert edges(array).tolist() == [1, 2.75, 4.5, 6.25, 8]
    assert np.bincount(codes(array).codes).tolist() == [2, 2, 2, 2]
    on_edges = np.concatenate([edges(array), array])  # same range, so bins of width 7 / ceil(log2 13 + 1)
    found = codes(on_edges, precision="float64")
    bins = np.minimum(np.searchsorted(edges(on_edges), on_edges, side="right") - 1, found.k - 1)
    assert np.array_equal(found.codes, np.unique(bins, return_inverse=True)[1])


def test_edges_that_rounding_has_moved_far_decide_themselves():
    # 700 steps of float32 between the ends and bins of one or two steps: an edge is rounded by up to a third of a bin
    steps = np.random.default_rng(3).normal(0, 20, 50000).round()
    array = (1000 + np.concatenate([[-350, 350], steps]) * 2.0**-14).astype(np.float32)
    found, bounds = codes(array), edges(array)
    assert 350 < found.k < 700
    bins = np.minimum(np.searchsorted(bounds, array, side="right") - 1, found.k - 1)
    assert np.array_equal(found.codes, np.unique(bins, return_inverse=True)[1])


def test_numpy1_has_no_cap():
    # worked by hand from the rule of numpy 1.26
    ramp = np.concatenate([np.arange(1000) / 1000, [50.0]]).astype(np.float32)  # IQR 0.5, n 1001: FD width 0.09997
    assert [len(edges(ramp, rule)) - 1 for rule in ("numpy1", "numpy2")] == [501, 64]  # 2 sqrt(1001) = 63.3
    zeros = np.array([0.0] * 12 + [1.0, 2.0, 3.0])  # IQR 0: Sturges, ceil(log2 15 + 1) = 5, against ceil(2 sqrt 15) = 8
    assert [len(edges(zeros, rule)) - 1 for rule in ("numpy1", "numpy2")] == [5, 8]


def test_a_constant_has_one_bin():
    assert edges(np.zeros(5)).tolist() == [-0.5, 0.5]
    found = codes(np.zeros(5))
    assert (found.k, found.entropy, found.constant) == (1, 0.0, True)


def test_half_precision_is_cast_first():
    array = np.random.default_rng(0).standard_normal(3000).astype(np.float16)
    assert np.array_equal(codes(array).codes, codes(array.astype(np.float32)).codes)
    assert codes(array, precision="float64").k == codes(array).k


def test_more_than_65535_bins_are_told_apart():
    array = np.concatenate([np.random.default_rng(0).standard_normal(4000), [30000.0]])
    found = codes(array, "numpy1", "float64")
    assert found.k > 2**16
    assert found.codes.dtype == np.uint16  # most bins are empty
    counts = np.histogram(array, bins=edges(array, "numpy1"))[0]
    assert np.array_equal(np.bincount(found.codes), counts[counts > 0])
    full = many_bins()
    assert full.used > 2**16
    assert full.codes.dtype == np.int32
    assert nmi(found, found) == nmi(full, full) == 1.0


def many_bins():
    """More bins in use than 16 bits can number: most entries close together, and the others far apart."""
    return codes(np.concatenate([np.linspace(0, 0.01, 350000), np.linspace(1, 1000, 80000)]), "numpy1", "float64")


@pytest.mark.parametrize(
    ("array", "bins", "says"),
    [
        (np.array([]), "numpy2", "empty array"),
        (np.concatenate([np.arange(1000) * 1e-12, [5.0]]), "numpy1", "would take .* bins"),
        (np.array([-3e38, 3e38, 0, 0], dtype=np.float32), "numpy2", "would take"),
        (np.concatenate([np.arange(1000) * 1e-3, [1e5]]) + 1e6, "numpy1", "too narrow for float32"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_arrays_that_no_histogram_can_hold_are_refused(array, bins, says):
    with pytest.raises(UserError, match=says):
        codes(array, bins)


# ---- mutual information


def of_codes(values):
    """Codes of labels, each of which is a bin."""
    labels, found = np.unique(values, return_inverse=True)
    k = len(labels)
    return information.Codes(found.astype(np.uint16), k, k, plain_entropy(np.bincount(found)), k == 1, labels[0])


@pytest.mark.parametrize(
    ("other", "h", "joint", "value"),
    [
        ([0, 0, 1, 1], 0.693147, 0.693147, 1.0),
        ([0, 1, 0, 1], 0.693147, 1.386294, 0.0),
        ([0, 0, 0, 1], 0.562335, 1.039721, 0.345592),
    ],
)
def test_worked_by_hand(other, h, joint, value):
    a, b = codes(np.array([0.0, 0, 1, 1])), codes(np.array(other, dtype=float))
    assert a.entropy == pytest.approx(math.log(2), abs=1e-12)
    assert b.entropy == pytest.approx(h, abs=1e-6)
    assert joint_entropy(a, b) == pytest.approx(joint, abs=1e-6)
    assert nmi(a, b) == pytest.approx(value, abs=1e-6)
    assert nmi(of_codes([0, 0, 1, 1]), of_codes(other)) == nmi(a, b)


@numpy_caps
def test_equals_the_plain_formula():
    draw = np.random.default_rng(4)
    for size in (50, 3000, 60000):
        for tie in (0.0, 0.3, 0.99):
            a = draw.standard_normal(size)
            b = draw.standard_t(5, size) * math.sqrt(1 - tie**2) + tie * a
            for kind in (np.float32, np.float64):
                x, y = a.astype(kind), b.astype(kind)
                found = nmi(codes(x, precision=np.dtype(kind).name), codes(y, precision=np.dtype(kind).name))
                assert found == pytest.approx(plain_nmi(x, y), abs=1e-10)


def test_symmetric_bounded_blind_to_sign_scale_and_order_of_entries():
    draw = np.random.default_rng(6)
    a = draw.standard_normal(20000).astype(np.float32)
    b = (0.5 * a + draw.standard_normal(20000)).astype(np.float32)
    order = draw.permutation(a.size)
    x, y = codes(a), codes(b)
    assert nmi(x, y) == nmi(y, x) == nmi(codes(a[order]), codes(b[order]))
    assert 0 < nmi(x, y) < 1
    assert nmi(x, x) == pytest.approx(1, abs=1e-12)
    assert nmi(x, codes(2 * a)) == pytest.approx(1, abs=1e-12)
    assert nmi(x, codes(-a)) > 0.99
    table = joint_counts(x, y).reshape(x.used, y.used)
    assert np.array_equal(table.sum(1), np.bincount(x.codes))
    assert np.array_equal(table.sum(0), np.bincount(y.codes))


@pytest.mark.parametrize(("size", "level"), [(1000, 0.071), (20000, 0.0259), (400000, 0.0090)])
def test_chance_alone_gives_more_than_zero(size, level):
    a, b = np.random.default_rng(7).standard_normal((2, size))
    assert nmi(codes(a), codes(b)) == pytest.approx(level, rel=0.12)


def test_constants():
    zero, other, varied = codes(np.zeros(8)), codes(np.ones(8)), codes(np.arange(8.0))
    assert nmi(zero, codes(np.zeros(8))) == 1.0
    assert nmi(zero, other) == nmi(zero, varied) == nmi(varied, zero) == 0.0
    matrix = nmi_matrix([zero, varied, codes(np.zeros(8)), other, codes(np.arange(8.0))])
    assert matrix[0, 2] == matrix[2, 0] == 1.0
    assert matrix[1, 4] == pytest.approx(1, abs=1e-12)
    assert matrix.sum() == pytest.approx(4)


@always
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60))
def test_any_codes(pairs):
    a, b = (of_codes(column) for column in zip(*pairs, strict=True))
    value = nmi(a, b)
    assert value == nmi(b, a)
    assert 0 <= value <= 1
    if not (a.constant or b.constant):
        both = plain_entropy(np.unique(np.array(pairs), axis=0, return_counts=True)[1])
        assert value == pytest.approx((a.entropy + b.entropy - both) / math.sqrt(a.entropy * b.entropy), abs=1e-10)


def test_sizes_must_agree():
    a, b = codes(np.arange(8.0)), codes(np.arange(9.0))
    with pytest.raises(UserError, match="8 and 9 entries cannot be paired"):
        nmi(a, b)
    with pytest.raises(UserError, match="arrays 0 and 1 have 8 and 9 entries"):
        nmi_matrix([a, b])


@pytest.mark.slow
def test_processes_give_the_same_matrix(monkeypatch):
    draw = np.random.default_rng(8)
    base = draw.standard_normal(4000)
    arrays = [codes(base * share + draw.standard_normal(4000)) for share in (0, 0.5, 1, 2, 3)]
    arrays += [codes(np.ones(4000)), codes(np.append(base[:-1], 1e6), "numpy1", "float64")]
    told: list[int] = []
    alone = nmi_matrix(arrays, partial(on_cores, workers=1), told.append)
    assert len(told) == 21
    monkeypatch.setattr(information, "ALONE", 0)
    together = nmi_matrix(arrays, partial(on_cores, workers=2), told.append)
    assert np.array_equal(alone, together)
    assert len(told) == 42
    assert np.array_equal(alone, alone.T)
    assert alone.diagonal().tolist() == [0.0] * 7
    assert alone[2, 4] == nmi(arrays[2], arrays[4])
    full = many_bins()  # int32 codes beside uint16 ones
    narrow = codes(np.random.default_rng(9).standard_normal(full.codes.size))
    three = [full, narrow, full]
    found = nmi_matrix(three, partial(on_cores, workers=2))
    assert np.array_equal(found, nmi_matrix(three, partial(on_cores, workers=1)))
    assert found[0, 2] == 1.0


def test_a_worker_that_dies_is_named(monkeypatch):
    monkeypatch.setattr(information, "ALONE", 0)
    monkeypatch.setattr(information.sys, "executable", "/bin/false")
    with pytest.raises((RuntimeError, BrokenPipeError)):
        nmi_matrix([codes(np.arange(8.0) ** power) for power in (1, 2, 3)], partial(on_cores, workers=2))


@pytest.mark.slow
def test_information_and_its_workers_need_no_torch():
    script = "import sys, expertsmith.methods.information; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env={**os.environ}).returncode == 0


# ---- the removal path

FOUR = symmetric({(0, 1): 0.9, (0, 2): 0.25, (0, 3): 0.3, (1, 2): 0.1, (1, 3): 0.4, (2, 3): 0.2})
TIED = symmetric({(0, 1): 0.5, (0, 2): 0.25, (1, 2): 0.25})


def test_path_worked_by_hand():
    path = removal_path(FOUR)
    assert path.order[:2] == [0, 3]
    assert path.height[:2] == [0.9, 0.4]
    assert path.pair[:2] == [(0, 1), (1, 3)]
    assert path.height[2] == 0.1
    assert path.pair[2] == (1, 2)
    assert path.order[2] == 2  # closeness is tied between the last two, so the higher id goes
    limit = threshold(FOUR, 0)
    assert (limit.mean, limit.iqr) == (pytest.approx(0.26875), pytest.approx(0.25))


@pytest.mark.parametrize(
    ("factor", "tau", "stay"),
    [
        (0, 0.26875, {1, 2}),
        (0.5, 0.39375, {1, 2}),
        (1, 0.51875, {1, 2, 3}),
        (2, 0.76875, {1, 2, 3}),
        (3, 1.01875, {0, 1, 2, 3}),
    ],
)
def test_thresholds_worked_by_hand(factor, tau, stay):
    assert threshold(FOUR, factor).tau == pytest.approx(tau)
    assert kept(FOUR, factor) == stay


def test_ties_remove_the_higher_id():
    assert threshold(TIED, 0.5).tau == pytest.approx(2 / 9 + 0.125)
    assert kept(TIED, 0.5) == {0, 2}
    assert kept(TIED, 0) == {0}


def test_a_last_bit_does_not_decide():
    # rows 0 and 1 both hold 0.1, 0.2, 0.3 beside their own pair; added one after the other, 0.1 + 0.2 + 0.3 > 0.3 + 0.2 + 0.1
    upper = {(0, 1): 0.9, (0, 2): 0.1, (0, 3): 0.2, (0, 4): 0.3, (1, 2): 0.3, (1, 3): 0.2, (1, 4): 0.1}
    matrix = symmetric({**upper, (2, 3): 0.0, (2, 4): 0.0, (3, 4): 0.0})
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert removal_path(matrix).order[0] == 1
    nudged = matrix.copy()
    nudged[0, 2] = nudged[2, 0] = np.nextafter(0.1, 1)
    assert removal_path(nudged).order[0] == 1
    nudged[0, 2] = nudged[2, 0] = 0.1 + 1e-9  # a difference that is one
    assert removal_path(nudged).order[0] == 0


def test_all_pairs_alike_leave_one_expert():
    matrix = np.full((6, 6), 0.3) - 0.3 * np.eye(6)
    order = of_matrix(matrix, factor=50)
    assert order.experts == [1, 2, 3, 4, 5]
    assert order.why["threshold"] == pytest.approx(0.25)
    assert order.stop == 5
    assert "every pair is above the threshold, which would leave one expert" in order.why["warnings"]
    assert any("hardly differs" in text for text in order.why["warnings"])


def test_never_fewer_than_the_router_needs():
    matrix = np.full((6, 6), 0.3) - 0.3 * np.eye(6)
    order = of_matrix(matrix, least=4)
    assert (order.stop, order.why["guard"]) == (2, True)
    assert len(order.experts) == 5  # the path itself goes on
    assert not of_matrix(FOUR, factor=3, least=4).why["guard"]


def test_a_negative_factor_removes_more_but_never_all():
    assert threshold(FOUR, -9).tau == 0
    assert kept(FOUR, -9) == {1}


def test_one_and_two_experts():
    assert removal_path(np.zeros((1, 1))) == Path([], [], [])
    assert of_matrix(np.zeros((1, 1))).stop == 0
    pair = symmetric({(0, 1): 0.5})  # mean 0.25, IQR 0.5
    assert removal_path(pair) == Path([1], [0.5], [(0, 1)])
    assert kept(pair, 0) == {0}
    assert kept(pair, 1.5) == {0, 1}
    assert removal_path(np.zeros((3, 3))).order == [1, 2]  # nothing shared at all: still a path


@st.composite
def matrices(draw, least: int = 1, most: int = 9, distinct: bool = False):
    count = draw(st.integers(least, most))
    pairs = count * (count - 1) // 2
    values = draw(st.lists(st.integers(0, 10**6 if distinct else 8), min_size=pairs, max_size=pairs, unique=distinct))
    matrix = np.zeros((count, count))
    # whole numbers over 2^20: sums are exact
    matrix[np.triu_indices(count, 1)] = np.array(values, dtype=float) / 2**20
    return matrix + matrix.T


def by_definition(matrix, tau: float) -> list[int]:
    """The loop as it is told, on a matrix that shrinks; sums of the examples are exact."""
    ids, current, gone = list(range(len(matrix))), matrix.copy(), []
    while current.max() > tau:
        i, j = np.unravel_index(current.argmax(), current.shape)
        close = current.mean(axis=1)
        out = i if close[i] > close[j] else j
        gone.append(ids.pop(out))
        current = np.delete(np.delete(current, out, 0), out, 1)
    return gone


@always
@given(matrices(), st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_any_matrix(matrix, factor):
    path = removal_path(matrix)
    assert sorted({*path.order}) == sorted(path.order)
    assert len(path.order) == len(path.height) == len(path.pair) == len(matrix) - 1
    assert all(a >= b for a, b in pairwise(path.height))
    assert all(gone in pair and pair[0] < pair[1] for gone, pair in zip(path.order, path.pair, strict=True))
    assert all(matrix[pair] == height for pair, height in zip(path.pair, path.height, strict=True))
    tau = threshold(matrix, factor).tau
    assert path.order[: choose(path, tau, len(matrix))[0]] == by_definition(matrix, tau)


@always
@given(matrices())
def test_kept_sets_are_nested(matrix):
    sets = [kept(matrix, factor) for factor in (-1, 0, 0.5, 1, 2, 5)]
    assert all(small <= large for small, large in pairwise(sets))
    assert all(sets)


@always
@given(matrices(2, 8, distinct=True), st.randoms(use_true_random=False))
def test_numbering_does_not_matter_where_nothing_is_tied(matrix, random):
    order = list(range(len(matrix)))
    random.shuffle(order)
    path, other = removal_path(matrix), removal_path(matrix[np.ix_(order, order)])
    clear = 0  # steps before the first tie; the last two experts are always tied
    for i, j in path.pair:
        left = [x for x in range(len(matrix)) if x not in path.order[:clear]]
        if matrix[i, left].sum() == matrix[j, left].sum():
            break
        clear += 1
    assert clear < len(path.order)
    assert [order[place] for place in other.order[:clear]] == path.order[:clear]
    assert other.height[: clear + 1] == path.height[: clear + 1]
    assert threshold(matrix[np.ix_(order, order)], 1.5) == threshold(matrix, 1.5)


def test_numbering_does_not_matter_example():
    # the last two experts are always tied, so their numbers decide
    draw = np.random.default_rng(11)
    matrix = np.triu(draw.uniform(size=(12, 12)), 1)
    matrix += matrix.T
    order = draw.permutation(12)
    path, other = removal_path(matrix), removal_path(matrix[np.ix_(order, order)])
    assert [int(order[place]) for place in other.order[:-1]] == path.order[:-1]
    assert other.height == path.height


# ---- expert_groups


@always
@given(matrices(6, 6), st.sampled_from([1, 2, 3]), st.sampled_from([0.0, 1.0]))
def test_groups_stay_equal(matrix, groups, factor):
    path = grouped_path(matrix, groups)
    size = 6 // groups
    order = of_matrix(matrix, least=groups, groups=groups, factor=factor)
    assert order.experts == path.order
    assert len(path.order) == groups * (size - 1)
    for stop in {order.stop, *range(0, len(path.order) + 1, groups)}:
        gone = set(path.order[:stop])
        counts = {sum(expert not in gone for expert in range(g * size, (g + 1) * size)) for g in range(groups)}
        assert len(counts) == 1
    assert all(a >= b for a, b in pairwise(path.height))
    assert all(matrix[pair] >= height for pair, height in zip(path.pair, path.height, strict=True))


def test_a_round_waits_for_every_group():
    # experts 0, 1, 2 share much, 3, 4, 5 less: 0 and 3 are in a pair of .9 and .4
    matrix = symmetric({(0, 1): 0.9, (0, 2): 0.8, (1, 2): 0.1, (3, 4): 0.4, (3, 5): 0.3, (4, 5): 0.2})
    path = grouped_path(matrix, 2)
    assert path.order == [0, 3, 2, 5]
    assert path.height == [0.4, 0.4, 0.1, 0.1]
    assert choose(path, 0.3, 6) == (2, False)
    assert choose(path, 0.5, 6) == (0, False)  # .9 alone does not do


# ---- weights of the roles, and the whole method


def test_roles_are_weighted():
    arrays = {"gate": np.array([[0.0, 0.5], [0.5, 0]]), "up": np.array([[0.0, 1.0], [1.0, 0]]), "down": np.zeros((2, 2))}
    assert combine(arrays, {"gate": 0.2, "up": 0.4, "down": 0.4})[0, 1] == pytest.approx(0.5)
    assert combine(arrays, {"gate": 1, "up": 1, "down": 1})[0, 1] == pytest.approx(0.5)
    assert combine({"up": arrays["up"], "down": arrays["down"]}, {"gate": 0.2, "up": 0.6, "down": 0.2})[0, 1] == pytest.approx(
        0.75
    )
    with pytest.raises(UserError, match="weights are 0 for every matrix"):
        combine({"up": arrays["up"]}, {"gate": 1, "up": 0, "down": 0})


@pytest.mark.parametrize(
    ("model_type", "text", "shares"),
    [
        ("qwen2_moe", "preset", [0.2, 0.4, 0.4]),
        ("deepseek_v2", "preset", [0.2, 0.4, 0.4]),
        ("mixtral", "preset", [1, 1, 1]),
        ("qwen2_moe", "1, 2,3", [1, 2, 3]),
    ],
)
def test_weights_of_families(model_type, text, shares):
    arrays = {role: np.zeros((2, 2)) for role in ("gate", "up", "down")}
    arrays |= {f"{what}_{role}": np.zeros(1) for role in ("gate", "up", "down") for what in ("baseline", "constant")}
    assert list(moeits(arrays, facts(2, model_type=model_type), weights=text).why["weights"].values()) == shares


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "a,b,c", "0,0,0", "1,-1,1", "nan,1,1", "inf,1,1", "presets"])
def test_weights_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match=r"three numbers for gate, up and down"):
        of_matrix(FOUR, weights=text)


def test_copies_of_an_expert_go_first():
    draw = np.random.default_rng(12)
    experts = {role: list(draw.standard_normal((5, 30, 40)).astype(np.float32)) for role in ("gate", "up", "down")}
    for role in experts:
        experts[role][3] = experts[role][1].copy()
    arrays = measure(Held(**experts), facts(5))
    assert arrays["up"][1, 3] == 1.0
    order = moeits(arrays, facts(5))
    assert order.experts[0] in (1, 3)
    assert order.height[0] == pytest.approx(1)
    assert order.height[1] < 0.2
    assert order.stop == 1
    for role in experts:
        assert arrays[role].shape == (5, 5)
        assert np.array_equal(arrays[role], arrays[role].T)
        assert arrays[f"entropy_{role}"].shape == arrays[f"bins_{role}"].shape == (5,)
        i, j = 0, 4
        assert arrays[role][i, j] == nmi(codes(experts[role][i]), codes(experts[role][j]))
        # the pair of equal experts is shuffled as well, and is then like any other
        assert arrays[f"baseline_{role}"] == pytest.approx(arrays[role][0, 4], rel=0.2)


def test_weights_by_chance_are_said_to_be():
    draw = np.random.default_rng(13)
    experts = list(draw.standard_normal((6, 60, 80)))
    order = moeits(measure(Held(up=experts, down=experts), facts(6)), facts(6))
    assert any("no more than chance" in text for text in order.why["warnings"])
    common = draw.standard_normal((60, 80))
    related = [common + 0.3 * (1 + i) * noise for i, noise in enumerate(experts)]
    order = moeits(measure(Held(up=related, down=related), facts(6)), facts(6))
    assert not any("chance" in text for text in order.why["warnings"])
    assert 0 < order.why["baseline"] < order.height[0] / 3


def test_a_constant_matrix_is_warned_of():
    draw = np.random.default_rng(14)
    experts = [*draw.standard_normal((3, 20, 20)), np.zeros((20, 20)), np.zeros((20, 20))]
    arrays = measure(Held(up=experts), facts(5))
    assert arrays["up"][3, 4] == 1.0
    assert arrays["up"][0, 3] == 0.0
    assert arrays["constant_up"].tolist() == [False, False, False, True, True]
    order = moeits(arrays, facts(5))
    assert "all entries of up are equal in experts [3, 4]: NMI taken as 0, or 1 between equal ones" in order.why["warnings"]
    assert np.isfinite(order.height).all()


def test_a_layer_of_one_expert():
    arrays = measure(Held(up=[np.arange(12.0).reshape(3, 4)]), facts(1))
    assert arrays["up"].tolist() == [[0.0]]
    order = moeits(arrays, facts(1))
    assert (order.experts, order.stop, order.why["warnings"]) == ([], 0, [])


def test_a_matrix_that_cannot_be_binned_is_named():
    ramp = np.concatenate([np.arange(999) * 1e-12, [5.0]])
    with pytest.raises(UserError, match=r"decoder layer 0, expert 1, down: .* bins=numpy2"):
        measure(Held(down=[np.arange(1000.0), ramp]), facts(2), bins="numpy1")


@numpy_caps
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_family(model_type, checkpoints):
    """Read from a checkpoint, each role's matrices are compared with their namesakes: numbers of the plain formula."""
    from expertsmith.checkpoint.reader import open_checkpoint
    from expertsmith.experts.inventory import take_inventory
    from expertsmith.experts.weights import Projections

    inventory = take_inventory(open_checkpoint(checkpoints(model_type)))
    layer = inventory.layers[0]
    weights = Projections(inventory, layer)
    count = len(inventory.expert_claims(layer))
    arrays = measure(weights, facts(count))
    assert set(weights.roles) in ({"gate", "up", "down"}, {"up", "down"})
    for role in weights.roles:
        matrices = list(weights.of(role))
        assert arrays[role].shape == (count, count)
        assert arrays[role][0, 1] == pytest.approx(plain_nmi(matrices[0], matrices[1]), abs=1e-10)
    order = moeits(arrays, facts(count))
    assert sorted({*order.experts}) == sorted(order.experts)
    assert len(order.experts) == count - 1
