"""From a method and a budget to a plan: counts of every shape of method, what is kept beside the plan, and what a user can do wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CALIBRATION, DEVICE, run_cli, save_tiny
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory
from expertsmith.experts.rules import Rules
from expertsmith.methods import find, methods
from expertsmith.methods.base import Choice, Order, method
from expertsmith.planning import work
from expertsmith.planning.build import make_plan
from expertsmith.planning.given import statistics_for
from expertsmith.planning.job import Job, choose_budget, rules_of
from expertsmith.planning.orders import _by_height
from expertsmith.planning.plan import Plan, load_plan
from expertsmith.surgery.skip import is_padded
from expertsmith.verbs.recipe import load_recipe, run_recipe
from expertsmith.views.progress import Silent

NEW = ("expert_sparsity", "moeits", "hc_smoe", "m_smoe")
SHORT = ("--seq-len", 24, "--no-pack", "--batch-tokens", 72)


@pytest.fixture
def mixtral(checkpoints) -> Inventory:
    """Three layers of eight experts, two a token."""
    return take_inventory(open_checkpoint(checkpoints("mixtral")))


@pytest.fixture(scope="session")
def full_stats(checkpoints, data, tmp_path_factory) -> Path:
    """Statistics of the tiny Mixtral that hold every expert's output on all tokens."""
    folder = tmp_path_factory.mktemp("planning") / "stats"
    api.calibrate(checkpoints("mixtral"), data, folder, all_outputs=True, **CALIBRATION)
    return folder


def job(inventory: Inventory, chosen, keep=None, budget="uniform", groups="keep", options=None, **more) -> Job:
    values = chosen.parse_options(options or {})
    return Job(inventory, chosen, values, keep, budget, rules_of(inventory, groups), Silent(), **more)


def made_by(work: Job, uniform: bool = False) -> Plan:
    return make_plan(work, "keep", uniform, {})


# ---- budgets


@pytest.mark.parametrize(
    ("name", "budget", "keep", "found"),
    [
        ("reap", None, 0.5, "uniform"),
        ("reap", "global", 4, "global"),
        ("moeits", None, None, "threshold"),
        ("moeits", None, 0.5, "uniform"),
        ("moeits", "global", 0.5, "global"),
        ("moeits", "threshold", None, "threshold"),
        ("expert_sparsity", None, 4, "uniform"),
        ("m_smoe", "global", 0.5, "global"),
    ],
)
def test_the_budget_that_goes_with_keep(name, budget, keep, found):
    assert choose_budget(find(name), budget, keep) == found


@pytest.mark.parametrize(
    ("name", "budget", "keep", "says"),
    [
        ("reap", None, None, "--keep is required for method reap; e.g. --keep"),
        ("expert_sparsity", "global", 0.5, "method expert_sparsity has no budget 'global'; choose uniform"),
        ("hc_smoe", "threshold", None, "method hc_smoe has no budget 'threshold'; choose uniform"),
        ("m_smoe", "globl", 0.5, "no budget 'globl'; choose uniform or global"),
        ("moeits", "threshold", 0.5, "uses the method's own threshold; leave --keep out"),
        ("moeits", "global", None, "--keep is required with budget global"),
    ],
)
def test_a_budget_that_the_method_does_not_have(name, budget, keep, says):
    with pytest.raises(UserError, match=says):
        choose_budget(find(name), budget, keep)


TABLE = {  # sums 400, 8 and 2: scaled .25 .225 .2 .175 .15 0 0 0, .125 each, .5 .5 0 0 0 0 0 0
    0: [100, 90, 80, 70, 60, 0, 0, 0],
    1: [1] * 8,
    2: [1, 1, 0, 0, 0, 0, 0, 0],
}


@method("table", "A table", "-", reads="nothing")
def by_table(facts):
    """Made up."""
    return np.array(TABLE[facts.layer], dtype=float)


def test_saliency_uniform(mixtral):
    made = made_by(job(mixtral, by_table, 3))
    assert made.kept == {0: [0, 1, 2], 1: [5, 6, 7], 2: [0, 1, 7]}  # the higher id stays on a tie
    assert made.method.options == {"budget": "uniform", "keep": 3}
    assert made.summary.experts == (24, 9)
    assert made.notes == []


def test_saliency_global(mixtral):
    """12 stay: two a layer, then .2 .175 .15 of layer 0 and three of layer 1's .125."""
    made = made_by(job(mixtral, by_table, 0.5, "global"))
    assert made.kept == {0: [0, 1, 2, 3, 4], 1: [3, 4, 5, 6, 7], 2: [0, 1]}


def test_uniform_says_what_it_costs(mixtral):
    """Shares that stay: 1, 5/8, 1 (mean .8750) become 340/400, 1/2, 1 (mean .7833)."""
    work = job(mixtral, by_table, 4, "global")
    made = made_by(work, uniform=True)
    assert made.kept == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [0, 1, 6, 7]}
    (note,) = made.notes
    assert note.startswith("global kept 2 to 5 experts per layer, 12 in all; uniform keeps 4 in each of 3, 12 in all")
    assert note.endswith("mean over layers: 0.8750 → 0.7833")
    assert made.method.options == {"budget": "uniform", "keep": 4}


def test_uniform_changes_nothing_where_nothing_is_uneven(mixtral):
    assert made_by(job(mixtral, by_table, 4), uniform=True) == made_by(job(mixtral, by_table, 4))


HEIGHTS = {0: [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 1: [0.9, 0.9, 0.2, 0.1, 0.1, 0.1, 0.1], 2: [0.5] * 7}
STOPS = {0: 6, 1: 2, 2: 0}
SAYS = {0: ["first"], 1: ["first", "every"], 2: ["last"]}
MEASURED: list[int] = []


def measure(weights, facts, *, fineness: int = 1):
    MEASURED.append(facts.layer)
    return {"height": np.array(HEIGHTS[facts.layer]) * fineness}


@method("steps", "Steps", "-", reads="arrays", gives="order", budgets=("threshold", "uniform", "global"), measure=measure)
def steps(arrays, facts, *, sign: float = 1.0):
    """Made up: expert 7 goes first, then 6, and so on; `stop` of the table."""
    height = [sign * float(value) for value in arrays["height"]]
    why = {"guard": facts.layer == 0, "warnings": [f"{word} words" for word in SAYS[facts.layer]]}
    return Order([7, 6, 5, 4, 3, 2, 1][: len(height)], height, STOPS[facts.layer], why)


def counts(made: Plan) -> list[int]:
    assert all(entry.keep == list(range(len(entry.keep))) for entry in made.layers)  # a prefix of the order went
    return made.counts


def test_order_threshold(mixtral):
    assert counts(made_by(job(mixtral, steps, None, "threshold"))) == [2, 6, 8]


def test_order_uniform(mixtral):
    assert counts(made_by(job(mixtral, steps, 0.625))) == [5, 5, 5]


def test_order_global_ties_go_to_the_lower_layer(mixtral):
    """9 go: .9 .8 .7 .6 of layer 0, .9 .9 of layer 1, then .5 of layer 0 before two of layer 2's."""
    assert counts(made_by(job(mixtral, steps, 5, "global"))) == [3, 6, 6]


def test_order_global_stops_at_the_floor(mixtral):
    """15 go: layers 0 and 2 are left with the router's two, though .3 of layer 0 is higher than the .2 that goes from layer 1."""
    assert counts(made_by(job(mixtral, steps, 3, "global"))) == [2, 5, 2]


def test_order_uniform_from_the_threshold(mixtral):
    """2 + 6 + 8 = 16: 5 each. One of layer 1 and three of layer 2 go early, three of layer 0 stay. Notes of the first plan do not."""
    made = made_by(job(mixtral, steps, None, "threshold"), uniform=True)
    assert counts(made) == [5, 5, 5]
    assert made.notes == [
        "layers 0–1: first words",
        "layer 1: every words",
        "layer 2: last words",
        "threshold kept 2 to 8 experts per layer, 16 in all; uniform keeps 5 in each of 3, 15 in all"
        "; 4 experts are removed that the threshold would keep, 3 are kept that it would remove",
    ]


def test_notes_tell_of_the_layers_that_the_guard_held(mixtral, monkeypatch):
    made = made_by(job(mixtral, steps, None, "threshold"))
    assert "layer 0: the threshold would keep fewer experts than the router needs, so 2 are kept" in made.notes
    monkeypatch.setattr("test_planning.SAYS", {layer: ["all"] for layer in range(3)})
    assert made_by(job(mixtral, steps, 4)).notes == ["all layers: all words"]  # a count is no threshold


def test_order_of_too_few(mixtral, monkeypatch):
    monkeypatch.setitem(HEIGHTS, 1, [0.9, 0.8, 0.7])
    with pytest.raises(UserError, match="decoder layer 1: the method can remove at most 3 of 8 experts"):
        made_by(job(mixtral, steps, 4))


@given(
    st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.2, 0.5, 0.9]), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(0, 20),
    st.integers(1, 3),
)
@settings(deadline=None)
def test_by_height_takes_the_highest_removals(heights, total, least):
    """Against sorting all removals that the floors allow by height and layer."""
    orders = {n: Order(list(range(len(h))), sorted(h, reverse=True), 0) for n, h in enumerate(heights)}
    rules = {n: Rules(len(order.experts) + 1, least) for n, order in orders.items()}
    room = {n: max(0, min(len(order.experts), len(order.experts) + 1 - least)) for n, order in orders.items()}
    every = sorted((-order.height[i], n, i) for n, order in orders.items() for i in range(room[n]))
    wanted = [n for _, n, _ in every[:total]]
    assert _by_height(orders, total, rules) == {n: wanted.count(n) for n in orders}


@pytest.mark.parametrize("chosen", [by_table, steps])
def test_global_budgets_and_expert_groups_do_not_go_together(chosen, checkpoints, monkeypatch):
    inventory = take_inventory(open_checkpoint(checkpoints("deepseek_v3")))
    assert inventory.rules.groups > 1
    for layer in inventory.layers:
        monkeypatch.setitem(TABLE, layer, list(range(8)))
        monkeypatch.setitem(HEIGHTS, layer, [0.5] * 7)
        monkeypatch.setitem(STOPS, layer, 0)
        monkeypatch.setitem(SAYS, layer, [])
    with pytest.raises(UserError, match=r"expert_groups.*--router-groups flatten"):
        made_by(job(inventory, chosen, 6, "global"))
    flat = make_plan(job(inventory, chosen, 6, "global", groups="flatten"), "flatten", False, {})
    assert sum(flat.counts) == 6 * len(inventory.layers)


@method(
    "first",
    "The first",
    "-",
    gives="choice",
    budgets=("uniform", "global"),
    allot=lambda statistics, average: {0: 1, 1: 8, 2: 3},
)
def first(statistics, facts, keep):
    """Made up: the first experts stay, one more is merged into the last of them where there is one."""
    merge = [] if keep == 8 else [{"into": keep - 1, "from": [keep - 1, keep], "weights": [0.5, 0.5]}]
    return Choice(list(range(keep)), merge, {"asked": keep})


def test_choice_is_asked_for_the_count_of_every_layer(mixtral, full_stats):
    statistics = statistics_for(mixtral, first, full_stats, ())
    made = made_by(job(mixtral, first, 0.5, statistics=statistics))
    assert made.counts == [4, 4, 4]
    assert [entry.why["asked"] for entry in made.layers] == [4, 4, 4]
    assert all(entry.merge[0].sources == [3, 4] for entry in made.layers)
    assert sum(made.layers[0].why["selections"]) == 2 * sum(made.calibration.tokens.values())


def test_choice_global_never_falls_below_the_router(mixtral, full_stats):
    statistics = statistics_for(mixtral, first, full_stats, ())
    made = made_by(job(mixtral, first, 4, "global", statistics=statistics))
    assert made.counts == [2, 8, 3]
    assert "decoder layer 0: 1 experts would be left, but the router needs 2, so 2 are kept" in made.notes


def test_search_keeps_the_count_in_every_layer(checkpoints, data):
    made = api.plan(checkpoints("mixtral"), "expert_sparsity", "75%", data=data, **CALIBRATION)
    assert made.counts == [6, 6, 6]
    assert made.calibration.tokens == {"a": 122, "b": 122}
    for entry in made.layers:
        tried = {tuple(row["drop"]): row["loss"] for row in entry.why["subset_losses"]}
        assert len(tried) == 28  # 8 over 2
        assert min(tried, key=tried.get) == tuple(e for e in range(8) if e not in entry.keep)


# ---- what is kept beside a plan


@pytest.fixture
def measured() -> Iterator[list[int]]:
    """The layers that were measured."""
    MEASURED.clear()
    yield MEASURED
    MEASURED.clear()


def test_measured_weights_are_used_again(mixtral, measured, tmp_path):
    once = made_by(job(mixtral, steps, None, "threshold", work=tmp_path / "w"))
    assert measured == [0, 1, 2]
    other = made_by(job(mixtral, steps, 5, "global", work=tmp_path / "w", options={"sign": 2.0}))
    assert measured == [0, 1, 2]  # what the weights gave depends on `fineness` alone
    assert counts(other) == [3, 6, 6]
    assert other.layers[0].why["height"][0] == 2 * once.layers[0].why["height"][0]


def test_measured_weights_of_other_options_or_models_are_not(mixtral, measured, tmp_path):
    made_by(job(mixtral, steps, 4, work=tmp_path / "w"))
    made = made_by(job(mixtral, steps, 4, work=tmp_path / "w", options={"fineness": 3}))
    assert measured == [0, 1, 2] * 2
    assert made.layers[0].why["height"][0] == pytest.approx(2.7)
    other = take_inventory(open_checkpoint(save_tiny("mixtral", tmp_path / "m", intermediate_size=40)))
    made_by(job(other, steps, 4, work=tmp_path / "w", options={"fineness": 3}))
    assert measured == [0, 1, 2] * 3
    made_by(job(other, steps, 4, work=tmp_path / "w", options={"fineness": 3}, resume=False))
    assert measured == [0, 1, 2] * 4


def test_a_folder_with_other_files_is_left_alone(mixtral, measured, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="contains files that are not measured weights; choose another"):
        made_by(job(mixtral, steps, 4, work=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    assert measured == []


class HaltError(Exception):
    """Stands for a machine that was switched off."""


def breaking(function, at: int, calls: list[int]):
    """The function, until its call number `at`."""

    def call(*arguments, **options):
        calls.append(len(calls))
        if len(calls) == at:
            raise HaltError
        return function(*arguments, **options)

    return call


def test_interrupted_measuring_goes_on(checkpoints, tmp_path, monkeypatch):
    """24 matrices a layer: the run stops in the second layer, and the next one measures the last two."""
    from expertsmith.methods.information import Counting, codes

    whole = api.plan(checkpoints("mixtral"), "moeits", out=tmp_path / "whole.json")
    calls: list[int] = []
    monkeypatch.setattr(work, "counting", lambda device: Counting(breaking(codes, 30, calls)))
    with pytest.raises(HaltError):
        api.plan(checkpoints("mixtral"), "moeits", out=tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    calls.clear()
    monkeypatch.setattr(work, "counting", lambda device: Counting(breaking(codes, 0, calls)))
    assert api.plan(checkpoints("mixtral"), "moeits", out=tmp_path / "plan.json") == whole
    assert len(calls) == 48
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize("progressive", ["false", "true"])
def test_interrupted_search_goes_on(progressive, checkpoints, data, tmp_path, monkeypatch):
    from expertsmith.methods import expert_sparsity as module

    options = {"progressive": progressive}

    def search(out: Path, **more) -> Plan:
        return api.plan(
            checkpoints("mixtral"), "expert_sparsity", 5, data=data, options=options, out=out, **CALIBRATION, **more
        )

    whole = search(tmp_path / "whole.json")
    calls: list[int] = []
    subsets = module.every_subset
    monkeypatch.setattr(module, "every_subset", breaking(subsets, 3, calls))
    with pytest.raises(HaltError):
        search(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    calls.clear()
    monkeypatch.setattr(module, "every_subset", breaking(subsets, 0, calls))
    resumed = search(tmp_path / "plan.json")
    assert len(calls) == 1
    assert resumed.kept == whole.kept
    for one, other in zip(resumed.layers, whole.layers, strict=True):
        assert one.why["loss"] == pytest.approx(other.why["loss"], rel=1e-6)
    search(tmp_path / "plan.json", resume=False, overwrite=True)
    assert len(calls) == 4


# ---- statistics


def test_statistics_have_to_be_of_this_model(full_stats, tmp_path):
    other = take_inventory(open_checkpoint(save_tiny("mixtral", tmp_path / "m", intermediate_size=40)))
    with pytest.raises(UserError, match=r"from another model.*calibrate this model"):
        statistics_for(other, find("m_smoe"), full_stats, ())


def test_hc_smoe_needs_all_outputs(checkpoints, data, tmp_path, capsys):
    api.calibrate(checkpoints("mixtral"), data, tmp_path / "s", **CALIBRATION)
    line = ("plan", checkpoints("mixtral"), "-m", "hc_smoe", "-k", 4, "-s", tmp_path / "s", "-o", tmp_path / "p.json", "-q")
    code, _, err = run_cli(capsys, *line)
    assert (code, err.count("\n")) == (2, 1)
    assert "calibrate again with --all-outputs" in err
    assert not (tmp_path / "p.json").exists()


def test_a_calibration_too_small_is_noted_in_the_plan(checkpoints, tmp_path):
    """Two tokens of two experts each cannot have reached eight."""
    (tmp_path / "few.jsonl").write_text(json.dumps({"input_ids": [5, 7]}) + "\n")
    few = [str(tmp_path / "few.jsonl")]
    for name in ("m_smoe", "expert_sparsity", "reap"):
        made = api.plan(checkpoints("mixtral"), name, 7, data=few, out=tmp_path / f"{name}.json", **CALIBRATION)
        assert any("got no calibration token" in note for note in made.notes), name
        assert load_plan(tmp_path / f"{name}.json") == made


# ---- a user's mistakes


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("keep", ["0", "-1", "-0.5", "99", "1.5", "nan", "inf", "text", "", "1", "0.01"])
def test_keep_out_of_range(name, keep, checkpoints, data, full_stats, tmp_path, capsys):
    """Counts below 1, above 8, ratios above 1, no numbers, and what leaves fewer than the router's two."""
    source = ("-d", data[0], *SHORT) if name == "expert_sparsity" else ("-s", full_stats)
    line = ("plan", checkpoints("mixtral"), "-m", name, "-k", keep, "-o", tmp_path / "p.json", *source, "-q")
    code, out, err = run_cli(capsys, *line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "option", "says"),
    [
        ("moeits", "factor=nan", "factor of moeits is 'nan'"),
        ("moeits", "factor=text", "factor of moeits is 'text'"),
        ("moeits", "weights=1,2", "weights of moeits is '1,2'; give preset"),
        ("moeits", "bins=many", "choose one of numpy2, numpy1"),
        ("moeits", "factr=1", "did you mean factor?"),
        ("expert_sparsity", "limit=0", "limit of expert_sparsity is 0; give 1 or more"),
        ("expert_sparsity", "beam=0", "give 1 or more"),
        ("expert_sparsity", "batch_size=0", "give 1 or more"),
        ("expert_sparsity", "passes=-1", "give 0 or more"),
        ("expert_sparsity", "tokens=-1", "give 0 or more"),
        ("expert_sparsity", "search=all", "choose one of auto, greedy, beam"),
        ("hc_smoe", "linkage=wart", "choose one of"),
        ("hc_smoe", "seed=-1", "give 0 or more"),
        ("m_smoe", "capacity=-1", "give 0 or more"),
        ("m_smoe", "capacity=1", "use -O capacity=2 or more"),
        ("m_smoe", "align=perhaps", "not true or false"),
    ],
)
def test_options_out_of_range(name, option, says, checkpoints, data, full_stats, tmp_path, capsys):
    source = {"expert_sparsity": ("-d", data[0], *SHORT), "moeits": ()}.get(name, ("-s", full_stats))
    keep = () if name == "moeits" else ("-k", 4)
    line = ("plan", checkpoints("mixtral"), "-m", name, *keep, "-O", option, "-o", tmp_path / "p.json", *source, "-q")
    code, out, err = run_cli(capsys, *line)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "p.json").exists()


def test_bounds_hold_in_recipes_too(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: m\nplan: {method: expert_sparsity, keep: 4, out: p.json, data: [x.jsonl], options: {beam: 0, tokens: -1}}\n"
    )
    with pytest.raises(UserError, match=r"beam of expert_sparsity is 0; give 1 or more.*tokens of expert_sparsity is -1"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", ["moeits", "expert_sparsity", "aimer"])
def test_domains_choose_among_statistics_only(name, checkpoints, data):
    with pytest.raises(UserError, match=f"method {name} reads no statistics, so --domain has no effect"):
        api.plan(checkpoints("mixtral"), name, 4, data=data, domains=["a"], **CALIBRATION)


def test_a_padded_checkpoint_is_not_planned_on(checkpoints, tmp_path, capsys):
    """Its dead experts would count as experts: planning and applying refuse, skipping (which drops none) does not."""
    source, out = checkpoints("gpt_oss"), tmp_path / "padded"
    made = api.plan(source, "random", 5, budget="global")
    assert made.uniform_count is None
    api.apply(source, made, out, pad=True)
    assert is_padded(open_checkpoint(out).config)
    for line in (
        ("plan", out, "-m", "aimer", "-k", 4, "-o", tmp_path / "p.json"),
        ("compress", out, "-m", "moeits", "-o", tmp_path / "o"),
    ):
        code, _, err = run_cli(capsys, *line, "-q")
        assert (code, err.count("\n")) == (2, 1)
        assert "padded with dead experts" in err
    inventory = take_inventory(open_checkpoint(out))
    by_hand = made_by(job(inventory, find("aimer"), 4))
    with pytest.raises(UserError, match="padded with dead experts"):
        api.apply(out, by_hand, tmp_path / "o")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["padded"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--statistic", "quantile", "--quantile", "1.5"), "it must be between 0 and 1"),
        (("--statistic", "quantile", "--quantile", "nan"), "it must be between 0 and 1"),
        (("--statistic", "quantile"), "--statistic is quantile; pass both"),
        (("--quantile", "0.7"), "--statistic is median, but --quantile 0.7 was given; pass both"),
        (("--active", "1.5"), "for more than two experts per token; choose a quantile"),
        (("-e", "no.jsonl"), "data file not found: no.jsonl"),
    ],
)
@pytest.mark.parametrize("planned", [False, True])
def test_skip_leaves_nothing_behind(planned, arguments, says, checkpoints, data, tmp_path, capsys):
    made = api.plan(checkpoints("mixtral"), "random", 4)
    made.save(tmp_path / "p.json")
    plan = ("--plan", tmp_path / "p.json") if planned else ()
    line = ("skip", checkpoints("mixtral"), "-d", data[0], *SHORT, *plan, *arguments, "-o", tmp_path / "out", "-q")
    code, out, err = run_cli(capsys, *line)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_an_interrupted_skip_leaves_what_was_there(checkpoints, data, tmp_path, monkeypatch):
    """With --overwrite the old output stands until the new one has its thresholds."""
    from expertsmith.calibration import ratios

    made, out = api.plan(checkpoints("mixtral"), "random", 4), tmp_path / "out"
    api.skip(checkpoints("mixtral"), data, out, plan=made, measure=False, **CALIBRATION)
    before = (out / "config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ratios, "thresholds", breaking(ratios.thresholds, 1, []))
        with pytest.raises(HaltError):
            api.skip(checkpoints("mixtral"), data[:1], out, plan=made, measure=False, overwrite=True, **CALIBRATION)
    assert (out / "config.json").read_bytes() == before
    api.skip(checkpoints("mixtral"), data[:1], out, plan=made, measure=False, overwrite=True, **CALIBRATION)
    assert (out / "config.json").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_compress_looks_for_all_data_first(checkpoints, data, tmp_path, capsys):
    line = ("compress", checkpoints("mixtral"), "-m", "m_smoe", "-k", 4, "-d", data[0], "-e", tmp_path / "no.jsonl", *SHORT)
    code, _, err = run_cli(capsys, *line, "-o", tmp_path / "out", "-q")
    assert (code, err.count("\n")) == (2, 1)
    assert "data file not found:" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda plan, layer: layer["merge"][0].update(into=0), "merge into 0, which is not a kept expert"),
        (lambda plan, layer: layer["merge"][0].update(weights=[-1, 2]), "they must be shares"),
        (lambda plan, layer: layer["merge"][0].update({"from": [1, 9]}), "names expert 9, but the ids run from 0 to 7"),
        (lambda plan, layer: layer["merge"][0].update(log_count=True), "has no logit bias to store it in"),
        (lambda plan, layer: layer.update(keep=[1], merge=[]), "layer 1 keeps 1 of 8 experts, but the router needs 2"),
        (lambda plan, layer: layer.update(skip_threshold=0.5), "layer 1 has a skip_threshold, but the plan has no skip rule"),
        (
            lambda plan, layer: plan.update(
                skip={"rule": "ratio", "statistic": "x", "calibration": {"fingerprint": "", "tokens": {}}}
            ),
            "the plan has the skip rule ratio, but no layer has a skip_threshold",
        ),
    ],
)
def test_plans_edited_by_hand(edit, says, checkpoints, tmp_path, capsys):
    source = checkpoints("mixtral")
    plan = api.plan(source, "random", 7).to_json()
    for layer in plan["layers"]:
        layer.update(keep=[1, 2, 3, 4, 5, 6, 7], merge=[{"into": 1, "from": [0, 1], "weights": [0.5, 0.5]}])
    (tmp_path / "p.json").write_text(json.dumps(plan))
    assert run_cli(capsys, "apply", source, tmp_path / "p.json", "-o", tmp_path / "good", "-q")[0] == 0
    edit(plan, plan["layers"][1])
    (tmp_path / "p.json").write_text(json.dumps(plan))
    code, _, err = run_cli(capsys, "apply", source, tmp_path / "p.json", "-o", tmp_path / "bad", "-q")
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "p.json"]


# ---- end to end


@pytest.mark.parametrize("name", NEW)
def test_compress(name, checkpoints, data, tmp_path, capsys):
    """calibrate, plan, apply, verify, evaluate: one JSON object on stdout, and a second round on what came out."""
    keep = () if name == "moeits" else ("-k", "0.75")
    texts = [part for text in data for part in ("-d", text)]
    line = ("-m", name, *keep, *texts, *SHORT, "--json", "-q")
    code, out, err = run_cli(capsys, "compress", checkpoints("mixtral"), *line, "-o", tmp_path / "one")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["verify"]["passed"]
    assert set(found["quality"]["domains"]) == {"a", "b"}
    assert found["plan"]["method"]["name"] == name
    assert load_plan(tmp_path / "one" / "expertsmith" / "plan.json").to_json() == found["plan"]
    assert any(entry.get("merge") for entry in found["plan"]["layers"]) == (name in ("hc_smoe", "m_smoe"))
    card = (tmp_path / "one" / "README.md").read_text()
    assert ("Merged experts are weighted means" in card) == (name in ("hc_smoe", "m_smoe"))
    code, out, _ = run_cli(capsys, "compress", tmp_path / "one", *line, "--no-measure", "-o", tmp_path / "two")
    assert code == 0
    again = json.loads(out)
    assert again["verify"]["passed"]
    assert [entry["num_experts"] for entry in again["plan"]["layers"]] == [
        len(entry["keep"]) for entry in found["plan"]["layers"]
    ]


def test_skip_after_a_plan(checkpoints, data, tmp_path, capsys, monkeypatch):
    from expertsmith.evaluation import skipping

    monkeypatch.setattr(skipping, "prefill_and_decode", lambda *_: {"all": {"decode": 2.0}, "skipping": {"decode": 3.0}})
    source = checkpoints("mixtral")
    made = api.plan(source, "random", 5, budget="global")
    assert made.uniform_count is None
    made.save(tmp_path / "p.json")
    line = ("skip", source, "-d", data[0], *SHORT, "--plan", tmp_path / "p.json", "-o", tmp_path / "out", "--json", "-q")
    code, out, err = run_cli(capsys, *line)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert all(entry["skip_threshold"] > 0 for entry in found["plan"]["layers"])
    assert (
        0 < max(found["quality"]["skip_rate"].values() if "skip_rate" in found["quality"] else found["skip_rate"].values()) < 1
    )
    assert found["speed"]["ratio"] == {"decode": 1.5}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "config.json has skip thresholds" in card
    assert "load with expertsmith.load" in card  # what apply noted is still there
    assert run_cli(capsys, "verify", source, tmp_path / "out", "-q")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.json"]


def test_recipe_with_a_threshold(checkpoints, data, tmp_path):
    recipe = {
        "model": str(checkpoints("mixtral")),
        "device": DEVICE,
        "plan": {"method": "moeits", "out": str(tmp_path / "p.json"), "options": {"factor": 1.0}},
        "apply": {"out": str(tmp_path / "out")},
        "verify": {"tokens": 128},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    results = run_recipe(load_recipe(tmp_path / "r.yaml"))
    assert results["plan"].method.options["budget"] == "threshold"
    assert "keep" not in results["plan"].method.options
    assert results["plan"].summary.experts[1] < 24
    assert results["verify"].passed
    assert load_plan(tmp_path / "p.json") == results["plan"]


@pytest.mark.parametrize("name", NEW)
def test_methods_are_described(name, monkeypatch, capsys):
    """Two lines: paper; needs, cost, budgets and limits."""
    monkeypatch.setenv("COLUMNS", "200")
    entry = methods()[name]
    lines = run_cli(capsys, "methods")[1].splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(f"{name}  "))
    assert entry.paper in lines[place]
    assert entry.paper.startswith("arXiv")
    for word in (f"cost: {entry.cost}", f"budget {' or '.join(entry.budgets)}", entry.limits, "needs "):
        assert word
        assert word in lines[place + 1]
    assert ("--all-outputs" in lines[place + 1]) == (name == "hc_smoe")
    for option in entry.options:
        assert f"{option}=" in lines[place + 2]


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("6", "keep: 6 of 8 experts per layer (75%)"),
        ("0.5", "keep: 4 of 8 experts per layer (50%)"),
        ("1.0", "keep: all experts of every layer, so nothing is removed"),
    ],
)
def test_what_a_keep_comes_to_is_said(checkpoints, tmp_path, capsys, keep, says):
    code, _, err = run_cli(capsys, "plan", checkpoints("mixtral"), "-m", "random", "-k", keep, "-o", tmp_path / "p.json")
    assert code == 0
    assert says in err
