"""Experts' weights binned and counted on a torch device: the integers of the CPU's way, in few operations and little memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from expertsmith import api
from expertsmith.errors import UserError
from expertsmith.methods import information
from expertsmith.methods.information import Codes, codes, nmi_matrix, on_cores
from expertsmith.planning import pairs, work
from expertsmith.planning.pairs import codes_on, counting_on, joint_entropies
from waits import Waits

CPU = torch.device("cpu")
PLENTY = 2**30


def of_codes(values) -> Codes:
    """Codes of labels, each of which is a bin."""
    _, found = np.unique(values, return_inverse=True)
    used = int(found.max()) + 1
    return Codes(found.astype(np.uint16), used, used, 0.0, used == 1, 0.0)


def normal(experts: int, size: int, scale: float = 0.02) -> list[Codes]:
    draw = np.random.default_rng(experts)
    return [codes((draw.standard_normal(size) * scale).astype(np.float32)) for _ in range(experts)]


def counted(a: Codes, b: Codes, most: int) -> list[int]:
    """The non-zero counts of the pair, ascending, as they leave the device."""
    columns = torch.from_numpy(b.codes.astype(np.int32))[None]
    ((_, often),) = pairs._row(torch.from_numpy(a.codes.astype(np.int32)), a.used, columns, [b.used], most)
    few, many = pairs._split(a.codes.size)
    assert often.shape == (1, few + many)
    small = [count for count in range(1, few) for _ in range(often[0, count])]
    return sorted(small + [int(count) for count in often[0, few:] if count])


def test_hand_worked():
    """Pairs (0,0) (0,0) (0,1) (1,1) (2,1) (2,1): counts 1 1 2 2, so H = ln 6 - (2 * 2 ln 2) / 6."""
    a, b = of_codes([0, 0, 0, 1, 2, 2]), of_codes([0, 0, 1, 1, 1, 1])
    assert counted(a, b, 64) == [1, 1, 2, 2]
    ((i, j, entropy),) = joint_entropies(CPU, [a, b], PLENTY)
    assert (i, j) == (0, 1)
    assert entropy == pytest.approx(np.log(6) - 4 * np.log(2) / 6, abs=1e-15)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=80), st.integers(1, 200))
def test_counts_are_those_of_bincount(entries, most):
    """Tables and sorted cells, entries in pieces that do not divide them, few and many equal counts."""
    a, b = (of_codes(column) for column in zip(*entries, strict=True))
    reference = np.bincount(a.codes.astype(int) * b.used + b.codes)
    assert counted(a, b, most) == sorted(reference[reference > 0].tolist())


def test_both_ways_of_counting_are_used(monkeypatch):
    """A table if it has no more cells than there are entries; sorted cells otherwise."""
    called = []
    for name in ("_table", "_runs"):
        real = getattr(pairs, name)
        monkeypatch.setattr(pairs, name, lambda *given, name=name, real=real: called.append(name) or real(*given))
    few, many = of_codes(np.arange(100) % 5), of_codes(np.arange(100) % 50)
    list(joint_entropies(CPU, [few, many, few, many], PLENTY))
    # rows in ascending order of bins: few with few, few with many (250 cells), and many with many
    assert called == ["_table", "_runs", "_runs", "_runs"]


@pytest.mark.parametrize("room", [1, 10**5, 10**6, 10**7, None])
def test_entropies_are_those_of_the_cpu_to_the_last_bit(room):
    """Whatever memory there is: arrays in tiles, pairs and entries in pieces; outliers and int32 codes among them."""
    draw = np.random.default_rng(1)
    arrays = [
        *normal(5, 3001),
        codes(draw.standard_t(2, 3001), "numpy1", "float64"),
        codes(np.where(draw.uniform(size=3001) < 0.9, 0, draw.standard_normal(3001))),
    ]
    wide = codes(np.arange(3001.0) ** 2, "numpy1", "float64")
    arrays.append(Codes(wide.codes.astype(np.int32), wide.k, wide.used, wide.entropy, False, 0.0))
    expected = {(i, j): value for i, j, value in on_cores(arrays, 1)}
    found = list(joint_entropies(CPU, arrays, room))
    assert len(found) == len(expected)
    assert {(i, j): value for i, j, value in found} == expected


def test_more_bins_than_16_bits_can_number():
    full = codes(np.concatenate([np.linspace(0, 0.01, 350000), np.linspace(1, 1000, 80000)]), "numpy1", "float64")
    narrow = codes(np.random.default_rng(9).standard_normal(full.codes.size))
    assert full.used > 2**16
    assert sorted(joint_entropies(CPU, [full, narrow, full])) == sorted(on_cores([full, narrow, full], 1))


def test_one_array_has_no_pairs_and_constants_are_left_out():
    assert list(joint_entropies(CPU, normal(1, 50))) == []
    arrays = [*normal(3, 400), codes(np.zeros(400)), codes(np.ones(400)), codes(np.zeros(400))]
    found = nmi_matrix(arrays, partial(joint_entropies, CPU))
    assert np.array_equal(found, nmi_matrix(arrays))
    assert found[3, 5] == 1.0


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("bins", ["numpy2", "numpy1"])
def test_bins_are_those_of_the_cpu(bins, precision):
    draw = np.random.default_rng(2)
    arrays = [
        draw.standard_normal((40, 30)) * 0.02,
        np.round(draw.standard_normal(999) * 8) / 8,
        np.concatenate([draw.standard_normal(700) * 0.1, [50.0]]),
        np.full(7, 0.25),
        np.arange(1.0, 9),
        draw.standard_normal(500).astype(np.float16),
        (1000 + np.concatenate([[-350, 350], draw.normal(0, 20, 5000).round()]) * 2.0**-14).astype(np.float32),
    ]
    for array in arrays:
        one, other = codes(array, bins, precision), codes_on(CPU, array, bins, precision)
        assert np.array_equal(one.codes, other.codes)
        assert one.codes.dtype == other.codes.dtype
        kept = [(each.k, each.used, each.entropy, each.constant, each.value) for each in (one, other)]
        assert kept[0] == kept[1]
    with pytest.raises(UserError, match="empty array"):
        codes_on(CPU, np.empty((0, 3)), bins, precision)
    with pytest.raises(UserError, match="too narrow for float32"):
        codes_on(CPU, np.concatenate([np.arange(1000) * 1e-3, [1e5]]) + 1e6, "numpy1", "float32")


VIEWS = {
    "slice",
    "select",
    "expand",
    "unbind",
    "detach",
    "alias",
    "lift_fresh",
    "scalar_tensor",
}  # and numbers: nothing is launched


class Launched(TorchDispatchMode):
    """Counts operations that a device would launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def test_operations_and_waits_do_not_grow_with_pairs(monkeypatch):
    """A layer of 24 experts, 276 pairs: each expert is counted with all later ones in 13 operations, and fetched once."""
    fetched = []
    fetch = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *given: fetched.append(len(self)) or fetch(self, *given))
    arrays = normal(24, 4000)
    mode, waits = Launched(), Waits()
    with waits, mode:
        assert len(list(joint_entropies(CPU, arrays, PLENTY))) == 276
    assert waits.found == []
    assert fetched == list(range(23, 0, -1))
    assert mode.count <= 23 * 13 + 24 + 1  # a copy of each array to the device before


@pytest.mark.parametrize(("experts", "room"), [(12, 10**6), (20, 2 * 10**6)])
@pytest.mark.parametrize("many", [False, True])
def test_memory_stays_within_its_bound(experts, room, many):
    """Arrays that do not fit together; with many bins, cells are sorted."""
    draw = np.random.default_rng(3)
    labels = [draw.integers(0, 3000, 8000) if many else np.round(draw.standard_normal(8000) * 8) for _ in range(experts)]
    arrays = [of_codes(each) for each in labels]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = sorted(joint_entropies(CPU, arrays, room))
    assert found == sorted(on_cores(arrays, 1))
    live = np.cumsum([event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"])
    assert room / 8 < live.max() <= room


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_plans_are_equal_to_the_last_byte(model_type, checkpoints, monkeypatch):
    source = checkpoints(model_type)
    plain = api.plan(source, "moeits").dumps()
    monkeypatch.setattr(work, "counting", lambda device: counting_on(CPU))
    assert api.plan(source, "moeits").dumps() == plain


def test_the_device_decides_who_counts():
    assert work.counting("cpu") == information.Counting()
    found = work.counting("meta")
    assert [part.func for part in found] == [codes_on, joint_entropies]
    assert [part.args for part in found] == [(torch.device("meta"),)] * 2
    with pytest.raises(UserError, match="is not supported"):
        work.counting("nonsense")
