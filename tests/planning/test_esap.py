"""Budgets that are searched: allocation by hand, what every distribution must hold, the search against all distributions, resuming, and the verbs."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CALIBRATION, run_cli
from expertsmith import api
from expertsmith.calibration.data import TokenData
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import load_model
from expertsmith.errors import UserError
from expertsmith.evaluation import overlap
from expertsmith.evaluation.overlap import Overlap
from expertsmith.evaluation.quality import measure
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.rules import Rules
from expertsmith.planning import budgets
from expertsmith.planning.budgets import Scores, Space, allot, first_generation, patterns, slopes, space_of, switched
from expertsmith.planning.plan import load_plan
from expertsmith.surgery.mask import masked

SHORT = ("--seq-len", 24, "--no-pack", "--batch-tokens", 72, "--device", "cpu")
QUICK = {"population": 8, "elites": 3, "generations": 8}


# ---- allocation


@pytest.mark.parametrize(
    ("weights", "total", "caps", "found"),
    [
        ([1, 2, 3], 6, [9, 9, 9], (1, 2, 3)),
        ([1, 2, 3], 7, [9, 9, 9], (1, 2, 4)),  # 7/6, 14/6, 21/6: the largest remainder is 3/6
        ([1, 1, 1], 4, [9, 9, 9], (2, 1, 1)),  # equal remainders: the first
        ([1, 2, 3], 7, [9, 9, 3], (1, 3, 3)),  # 3 is full; 4 over 1 : 2 is 4/3, 8/3
        (
            [0, 0, 5],
            6,
            [2, 9, 3],
            (2, 1, 3),
        ),  # nothing wants the rest: 3 over two, of which the first is full at 2 and then the second gets 1
        ([5, 1], 4, [0, 9], (0, 4)),
        ([1, 1], 0, [3, 3], (0, 0)),
        ([1, 9], 6, [3, 3], (3, 3)),
    ],
)
def test_shares_by_hand(weights, total, caps, found):
    assert allot(weights, total, caps) == found


def test_patterns_by_hand():
    assert patterns(5) == {
        "up": [1, 2, 3, 4, 5],
        "down": [5, 4, 3, 2, 1],
        "middle": [1, 2, 3, 2, 1],
        "ends": [3, 2, 1, 2, 3],
        "front": [3, 3, 1, 1, 1],
        "back": [1, 1, 1, 3, 3],
    }


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([(0, 0.0), (1, 0.1), (3, 0.5)], [0.1, 0.2, 0.2]),
        ([(0, 0.0), (1, 0.5), (2, 0.6), (4, 1.0)], [0.25] * 4),  # 0.5 and 0.6 lie above the line to 1.0
        ([(0, 0.0), (2, -0.2), (3, 0.1)], [-0.1, -0.1, 0.3]),
        ([(0, 0.0)], []),
    ],
)
def test_slopes_of_the_hull_by_hand(points, found):
    assert slopes(points) == pytest.approx(found)


def scores_of(space: Space, score, seed: int = 0, **more) -> Scores:
    """Scores of a function of the removals, without a model."""

    def kept(removals):
        return {layer: [removed] for layer, removed in zip(space.layers, removals, strict=True)}

    def by_kept(found):
        return score(tuple(removed for (removed,) in found.values()))

    return Scores(space, kept, by_kept, Random(seed), **more)


def test_sensitivity_by_hand():
    """Further losses of the first layer .01 .03 .05 .07, of the second .02 each: one of the first, then three of the second."""
    space = Space([0, 1], (4, 4), (2, 2))
    scores = scores_of(space, lambda r: 1 - 0.01 * r[0] ** 2 - 0.02 * r[1])
    assert budgets.sensitivity(scores, levels=4) == (1, 3)
    assert len(scores.seen) == 8


def test_sensitivity_measures_few_counts_and_draws_lines_between():
    """Measured at 2 and 4 only: the first costs .02, .02, .06, .06 and the second .03, .03, .03, .03."""
    space = Space([0, 1], (4, 4), (2, 2))
    table = {0: 0.0, 2: 0.04, 4: 0.16}
    scores = scores_of(space, lambda r: 1 - table[r[0]] - 0.03 * r[1])
    assert budgets.sensitivity(scores, levels=2) == (2, 2)


def test_sensitivity_shares_ties_over_the_layers():
    space = Space([0, 1, 2], (4, 4, 4), (1, 1, 1))
    assert budgets.sensitivity(scores_of(space, lambda r: 1.0), levels=2) == (1, 1, 1)


# ---- what every distribution holds


@st.composite
def spaces(draw) -> Space:
    layers = draw(st.integers(1, 6))
    caps = draw(st.lists(st.integers(0, 6), min_size=layers, max_size=layers))
    return Space(list(range(layers)), tuple(caps), tuple(draw(st.integers(0, cap)) for cap in caps))


@given(space=spaces(), seed=st.integers(0, 99), moves=st.integers(1, 4), step=st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_moves_keep_the_total_and_the_caps(space, seed, moves, step):
    found = space.uniform
    for number in range(5):
        found = switched(found, space, Random(seed + number), moves, step)
        assert sum(found) == space.total
        assert all(0 <= removed <= cap for removed, cap in zip(found, space.caps, strict=True))


@given(space=spaces(), seed=st.integers(0, 99), size=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_the_first_generation_is_new_permitted_and_has_uniform(space, seed, size):
    found = first_generation(space, Random(seed), size)
    assert found[0] == space.uniform
    assert len(set(found)) == len(found) <= size
    for made in found:
        assert sum(made) == space.total
        assert all(0 <= removed <= cap for removed, cap in zip(made, space.caps, strict=True))


def every(space: Space) -> list[tuple[int, ...]]:
    """All permitted distributions."""
    return [made for made in product(*(range(cap + 1) for cap in space.caps)) if sum(made) == space.total]


@given(space=spaces())
@settings(max_examples=100, deadline=None)
def test_free_says_whether_there_is_another(space):
    assert space.free == (len(every(space)) > 1)


def test_the_space_of_router_rules():
    """Groups of 4: 16 experts, at least 2 a group, so at most 8 removed, in units of 4. The method can remove fewer in the last layer."""
    rules = dict.fromkeys((1, 2), Rules(16, 4, groups=4, top_groups=2, group_minimum=2))
    space = space_of({1: 12, 2: 12}, rules, {1: 16, 2: 7})
    assert space == Space([1, 2], (2, 1), (1, 1), 4)
    with pytest.raises(UserError, match="different numbers of expert_groups"):
        space_of({1: 4, 2: 4}, {1: Rules(8, 2, groups=2), 2: Rules(8, 2)}, {1: 8, 2: 8})


# ---- the search


SPACE = Space([0, 1, 2], (6, 6, 6), (4, 4, 4))
HILL = {made: -abs(made[0] - 6) - 2 * abs(made[1] - 1) for made in every(SPACE)}


def evolved(score=HILL.__getitem__, seed=0, **options):
    scores = scores_of(SPACE, score, seed)
    return budgets.esap(scores, **{**QUICK, **options}), scores


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_the_top_of_a_hill(seed):
    found, scores = evolved(seed=seed)
    assert found == (6, 1, 5)
    assert set(scores.seen) <= set(HILL)


def test_the_same_seed_searches_the_same():
    assert list(evolved(seed=3)[1].seen) == list(evolved(seed=3)[1].seen)
    assert list(evolved(seed=3)[1].seen) != list(evolved(seed=4)[1].seen)


def test_no_distribution_is_scored_twice_and_a_small_space_ends_the_search():
    asked, told = [], []
    scores = scores_of(SPACE, lambda made: asked.append(made) or HILL[made], note=told.append)
    budgets.esap(scores, population=20, elites=4, generations=50)
    assert 20 < len(asked) == len(set(asked)) <= len(HILL)
    assert told[-1].startswith("no other distribution was found")
    assert told[0].startswith("generation 1 of 50: ESAP ")


def test_known_scores_are_not_asked_for_again():
    first = evolved()[1]
    known = dict(first.known)

    def never(kept):
        raise AssertionError("asked again")

    again = Scores(SPACE, first.kept, never, Random(0), known=known)
    assert budgets.esap(again, **QUICK) == evolved()[0]


def test_one_generation_is_the_patterns_only():
    found, scores = evolved(generations=1, population=7)
    assert len(scores.seen) == 7
    assert found == max(scores.seen, key=scores.seen.__getitem__)


# ---- on a model


@pytest.fixture
def mixtral(checkpoints):
    """Three layers of eight experts, two a token."""
    return take_inventory(open_checkpoint(checkpoints("mixtral")))


@pytest.fixture(scope="module")
def stats(checkpoints, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("esap") / "stats"
    api.calibrate(checkpoints("mixtral"), data, folder, **CALIBRATION)
    return folder


def opened(inventory, memory="resident"):
    return load_model(inventory.checkpoint, inventory.architecture, memory=memory, dtype="float32")


def batches_of(count=4):
    rows = torch.randint(3, 120, (count, 16), generator=torch.Generator().manual_seed(3)).tolist()
    return TokenData({"a": [*rows, rows[0][:5]]}, {"a": False}).batches(32)


KEPT = {0: [0, 1, 2], 1: [4, 5, 6, 7], 2: [1, 2, 3, 4, 5]}


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_the_overlap_is_that_of_quality(mixtral, memory):
    """Against `measure`, which holds two models against each other."""
    model, other = opened(mixtral, memory), opened(mixtral)
    mine = Overlap(model, batches_of())
    with masked(other, KEPT, mixtral.counts):
        expected = measure(other, batches_of(), opened(mixtral)).domains["a"]
    assert mine.exact
    assert mine.tokens == expected.tokens == 4 * 15 + 4
    assert mine.of(masked(model, KEPT, mixtral.counts)) == pytest.approx(expected.esap, abs=1e-6)
    assert mine.of(masked(model, {0: range(8)}, mixtral.counts)) == pytest.approx(1, abs=1e-6)
    assert mine.of(masked(model, KEPT, mixtral.counts)) < 0.999


def test_the_overlap_of_listed_tokens_is_an_upper_bound(mixtral, monkeypatch):
    model = opened(mixtral)
    exact = Overlap(model, batches_of()).of(masked(model, KEPT, mixtral.counts))
    monkeypatch.setattr(overlap, "STORED", 4 * 64 * 128 - 1)
    monkeypatch.setattr(overlap, "LISTED", 8)
    few = Overlap(model, batches_of())
    found = few.of(masked(model, KEPT, mixtral.counts))
    assert not few.exact
    assert exact < found <= 1


def test_an_overlap_by_hand():
    """p = .5 .3 .2, q = .2 .2 .6: minima .2 .2 .2. With the first listed only: min(.5, .2) + min(.5, .8)."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    assert overlap._shared((p, None, None), q) == pytest.approx(0.6)
    listed = (p[:, :1], torch.tensor([[0]], dtype=torch.int32), torch.tensor([0.5]))
    assert overlap._shared(listed, q) == pytest.approx(0.7)


def planned(source, method, stats, data, budget="esap", **more):
    options = {**({"stats": stats} if method == "reap" else {}), **CALIBRATION, **more}
    if budget == "esap":
        options["options"] = {**QUICK, **more.get("options", {})}
    return api.plan(source, method, 0.5, data=data, budget=budget, **options)


def all_plans(inventory, stats, data) -> dict[tuple[int, ...], float]:
    """Counts by layer → ESAP, of all 19 distributions of 12 experts over three layers with 2 to 8 each, by `evaluation.quality`."""
    saliency = [entry.saliency for entry in api.plan(inventory, "reap", 0.5, stats=stats).layers]
    model, own = opened(inventory), opened(inventory)
    rows = TokenData({}, {}).sequences
    for spec in data:
        domain, _, path = spec.partition("=")
        rows[domain] = [json.loads(line)["input_ids"] for line in Path(path).read_text().splitlines()]
    batches = TokenData(rows, dict.fromkeys(rows, False)).batches(72)
    found = {}
    for counts in product(range(2, 9), repeat=3):
        if sum(counts) != 12:
            continue
        kept = {n: sorted(sorted(range(8), key=lambda e, n=n: saliency[n][e])[-counts[n] :]) for n in range(3)}
        with masked(model, kept, 8):
            quality = measure(model, batches, own)
        total = sum(entry.tokens for entry in quality.domains.values())
        found[counts] = sum(entry.esap_sum for entry in quality.domains.values()) / total
    return found


def test_the_search_finds_the_best_of_all_plans(mixtral, stats, data):
    every_plan = all_plans(mixtral, stats, data)
    made = planned(mixtral, "reap", stats, data)
    best = max(every_plan, key=every_plan.__getitem__)
    assert tuple(map(len, made.kept.values())) == best
    said = made.method.options["search"]
    assert said["esap"] == pytest.approx(every_plan[best], abs=1e-6)
    assert said["uniform_esap"] == pytest.approx(every_plan[4, 4, 4], abs=1e-6)
    assert said["esap"] > said["uniform_esap"]
    assert {key: said[key] for key in ("population", "elites", "generations", "moves", "step", "samples", "seed", "exact")} == {
        **QUICK,
        "moves": 3,
        "step": 4,
        "samples": 64,
        "seed": 42,
        "exact": True,
    }
    assert made.method.options["budget"] == "esap"
    assert made.summary.experts == (24, 12)
    assert any(
        note.startswith(f"budget esap: ESAP {said['esap']:.4f}, uniform {said['uniform_esap']:.4f}") for note in made.notes
    )
    assert any("searched on the calibration text" in note for note in made.notes)


def test_sensitivity_on_a_model_is_no_worse_than_uniform(mixtral, stats, data):
    every_plan = all_plans(mixtral, stats, data)
    made = planned(mixtral, "reap", stats, data, "sensitivity")
    said = made.method.options["search"]
    assert said["esap"] == pytest.approx(every_plan[tuple(map(len, made.kept.values()))], abs=1e-6)
    assert said["esap"] >= said["uniform_esap"]
    assert sum(map(len, made.kept.values())) == 12
    assert "generations" not in said


def test_resident_and_streamed_search_the_same(mixtral, stats, data):
    plans = [planned(mixtral, "reap", stats, data, memory=memory) for memory in ("resident", "stream")]
    assert plans[0].kept == plans[1].kept
    found = [plan.method.options["search"] for plan in plans]
    assert found[0]["scored"] == found[1]["scored"]
    assert found[0]["esap"] == pytest.approx(found[1]["esap"], abs=1e-6)


def test_other_text_than_that_of_the_calibration_is_not_said_to_be_the_same(mixtral, stats, data):
    made = planned(mixtral, "reap", stats, data[:1])
    assert not any("searched on the calibration text" in note for note in made.notes)


def test_a_search_that_finds_nothing_better_is_uniform(mixtral, stats, data, monkeypatch):
    monkeypatch.setattr(Overlap, "of", lambda self, change: 0.5)
    made = planned(mixtral, "reap", stats, data)
    assert made.kept == api.plan(mixtral, "reap", 0.5, stats=stats).kept
    assert any(note.startswith("budget esap found nothing better than uniform (ESAP 0.5000 on ") for note in made.notes)


def test_nothing_to_search(mixtral, stats, data):
    made = api.plan(mixtral, "reap", 2, stats=stats, data=data, budget="esap", **CALIBRATION)
    assert set(map(len, made.kept.values())) == {2}
    assert "budget esap: no other distribution over the layers is possible, so it is the uniform one" in made.notes
    assert "search" not in made.method.options


def test_an_order_of_removal_is_kept(mixtral, data):
    """moeits removes the first of its order, whatever the count."""
    made = planned(mixtral, "moeits", None, data)
    assert sum(map(len, made.kept.values())) == 12
    for entry in made.layers:
        gone = set(range(8)) - set(entry.keep)
        assert gone == set(entry.why["order"][: len(gone)])


def test_expert_groups_lose_the_same_number(checkpoints, data):
    inventory = take_inventory(open_checkpoint(checkpoints("deepseek_v3")))
    rules = inventory.rules_of(inventory.layers[0])
    assert rules.groups > 1
    made = planned(inventory, "aimer", None, data)
    size = rules.num_experts // rules.groups
    for entry in made.layers:
        counts = {sum(e // size == group for e in entry.keep) for group in range(rules.groups)}
        assert len(counts) == 1
        assert len(entry.keep) >= rules.least


def test_uniform_evens_it_out(mixtral, stats, data):
    made = planned(mixtral, "reap", stats, data, uniform=True)
    assert made.kept == api.plan(mixtral, "reap", 0.5, stats=stats).kept
    assert made.method.options["budget"] == "uniform"
    assert "search" not in made.method.options
    assert any(note.startswith("esap kept ") for note in made.notes)


# ---- resuming


def test_an_interrupted_search_resumes_to_the_same_plan(mixtral, stats, data, tmp_path, monkeypatch):
    whole = planned(mixtral, "reap", stats, data, out=tmp_path / "whole.json")
    score, asked = Overlap.of, []

    def stopping(self, change):
        asked.append(1)
        if len(asked) == 9:
            raise KeyboardInterrupt
        return score(self, change)

    with monkeypatch.context() as patch:
        patch.setattr(Overlap, "of", stopping)
        with pytest.raises(KeyboardInterrupt):
            planned(mixtral, "reap", stats, data, out=tmp_path / "again.json")
    lines = (tmp_path / "again.json.work" / "searched" / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 8
    with (tmp_path / "again.json.work" / "searched" / "scores.jsonl").open("a") as file:
        file.write('["half a li')
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Overlap, "of", lambda self, change: asked.append(1) or score(self, change))
        again = planned(mixtral, "reap", stats, data, out=tmp_path / "again.json")
    assert len(asked) == whole.method.options["search"]["scored"] - 8
    assert again.dumps() == whole.dumps() == planned(mixtral, "reap", stats, data).dumps()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "whole.json"]


def test_a_work_folder_is_shared_by_plans(mixtral, data, tmp_path, monkeypatch):
    """Scores are those of kept experts, so another seed, ratio or budget reuses what it has in common; --fresh reuses nothing."""
    first = planned(mixtral, "aimer", None, data, work=tmp_path / "work")
    monkeypatch.setattr(Overlap, "of", lambda self, change: pytest.fail("scored again"))
    assert planned(mixtral, "aimer", None, data, work=tmp_path / "work").dumps() == first.dumps()
    with pytest.raises(pytest.fail.Exception):
        planned(mixtral, "aimer", None, data, work=tmp_path / "work", resume=False)
    with pytest.raises(pytest.fail.Exception):
        planned(mixtral, "aimer", None, data[:1], work=tmp_path / "work")


def test_scores_of_flattened_groups_are_not_those_of_groups(checkpoints, data, tmp_path, monkeypatch):
    options = {"work": tmp_path / "work", "options": {"population": 2, "elites": 1, "generations": 1}}
    source = take_inventory(open_checkpoint(checkpoints("deepseek_v3")))
    planned(source, "aimer", None, data, **options)
    score, asked = Overlap.of, []
    monkeypatch.setattr(Overlap, "of", lambda self, change: asked.append(1) or score(self, change))
    planned(source, "aimer", None, data, **options)
    assert not asked
    planned(source, "aimer", None, data, router_groups="flatten", **options)
    assert asked


# ---- the verbs


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-m", "aimer", "-k", 0.5), "budget esap runs the model on text; pass --data FILE"),
        (("-m", "aimer"), "--keep is required with budget esap"),
        (("-m", "hc_smoe", "-k", 0.5), "method hc_smoe has no budget 'esap'; choose uniform"),
        (("-m", "expert_sparsity", "-k", 0.5), "method expert_sparsity has no budget 'esap'"),
        (("-m", "aimer", "-k", 0.5, "-O", "generations=0"), "option generations of budget esap is 0; give 1 or more"),
        (("-m", "aimer", "-k", 0.5, "-O", "elites=40"), "elites is 40 and population 32"),
        (("-m", "aimer", "-k", 0.5, "-O", "levels=3"), "method aimer has no options, but 'levels' was given"),
        (("-m", "reap", "-k", 0.5), "method reap needs calibration"),
    ],
)
def test_mistakes(arguments, says, checkpoints, capsys, tmp_path):
    out = ("-o", tmp_path / "plan.json")
    code, _, err = run_cli(capsys, "plan", checkpoints("mixtral"), "--budget", "esap", *arguments, *out)
    assert code == 2
    assert says in " ".join(err.split())
    assert not any(tmp_path.iterdir())


def test_options_of_the_search_need_its_budget(checkpoints, capsys, tmp_path):
    command = ("plan", checkpoints("mixtral"), "-m", "aimer", "-k", 0.5, "-O", "generations=2", "-o", tmp_path / "plan.json")
    code, _, err = run_cli(capsys, *command)
    assert code == 2
    assert "method aimer has no options, but 'generations' was given" in " ".join(err.split())


def test_a_family_of_equal_layers_is_refused_before_the_search(checkpoints, data, monkeypatch):
    inventory = take_inventory(open_checkpoint(checkpoints("mixtral")))
    monkeypatch.setattr("expertsmith.surgery.uneven.check_uneven", lambda found: (_ for _ in ()).throw(UserError("equal only")))
    with pytest.raises(UserError, match="equal only"):
        planned(inventory, "aimer", None, data)
    assert set(map(len, planned(inventory, "aimer", None, data, uniform=True).kept.values())) == {4}


def test_from_text_to_checkpoint(checkpoints, data, tmp_path, capsys):
    """One command calibrates and searches; what it plans is written with its counts, and `verify` holds it to the masked original."""
    command = ["plan", checkpoints("mixtral"), "-m", "reap", "-k", 0.5, "--budget", "esap", *SHORT]
    command += [word for spec in data for word in ("-d", spec)]
    for name, value in QUICK.items():
        command += ["-O", f"{name}={value}"]
    code, _, err = run_cli(capsys, *command, "-o", tmp_path / "plan.json")
    assert code == 0, err
    assert "generation 1 of 8: ESAP" in err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    made = load_plan(tmp_path / "plan.json")
    assert len(set(map(len, made.kept.values()))) > 1
    api.apply(checkpoints("mixtral"), made, tmp_path / "out")
    assert api.verify(checkpoints("mixtral"), tmp_path / "out", plan=made, device="cpu").passed


def test_compress_holds_text_out_of_a_search(checkpoints, texts, tmp_path):
    """aimer reads no text, but the search does."""
    options = {"budget": "esap", "options": {"population": 4, "elites": 1, "generations": 2}, "seq_len": 40, "device": "cpu"}
    made = api.compress(checkpoints("mixtral"), "aimer", 0.5, out=tmp_path / "out", data=texts, **options)
    assert made["quality"]["held_out"]
    assert any(note.startswith("held out: every eighth record") for note in made["notes"])
    assert made["plan"].method.options["search"]["tokens"] == 2 * 14 * 39


def test_compare_has_searched_budgets(checkpoints, data, tmp_path, monkeypatch):
    monkeypatch.setitem(budgets.esap.__kwdefaults__, "population", 8)
    monkeypatch.setitem(budgets.esap.__kwdefaults__, "generations", 2)
    shape = {"seq_len": 24, "pack": False, "batch_tokens": 72, "device": "cpu"}
    found = api.compare(
        checkpoints("mixtral"),
        ["reap"],
        [0.5],
        data,
        data,
        tmp_path / "out",
        budgets=("uniform", "sensitivity", "esap"),
        **shape,
    )
    assert [group["budget"] for group in found["groups"]] == ["uniform", "sensitivity", "esap"]
    made = load_plan(tmp_path / "out" / "plans" / "reap-0.5-esap.json")
    assert made.method.options["search"]["population"] == 8
    with pytest.raises(UserError, match="budget esap needs calibration text"):
        api.compare(checkpoints("mixtral"), ["aimer"], [0.5], [], data, tmp_path / "other", budgets=("esap",), **shape)
