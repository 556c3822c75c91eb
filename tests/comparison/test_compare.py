"""Methods side by side: what the cells are, that they are judged as their written checkpoints would be, and that nothing is made twice."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from conftest import CALIBRATION, DEVICE, run_cli
from expertsmith import api
from expertsmith.comparison import run
from expertsmith.comparison.cells import Cell, cells_of, contenders, short_names
from expertsmith.comparison.footprint import footprint
from expertsmith.comparison.results import _group, displayed, shown
from expertsmith.errors import UserError
from expertsmith.evaluation.quality import DomainQuality
from expertsmith.views.comparison_table import show_comparison
from expertsmith.views.pictures import looks, series_of, svg
from expertsmith.views.wording import cells, markdown

SHAPE = {**CALIBRATION, "dtype": "float32", "memory": "resident"}
METHODS = ["reap", "m_smoe", "moeits"]


@pytest.fixture(scope="module")
def found(checkpoints, data, tmp_path_factory) -> tuple[Path, dict]:
    """A comparison of a tiny Qwen2-MoE: a criterion, a merging method and one with its own threshold, with every budget."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    budgets = ("uniform", "global", "threshold")
    return folder, api.compare(checkpoints("qwen2_moe"), METHODS, [0.5], data, data, folder, budgets=budgets, **SHAPE)


def all_rows(made: dict) -> list[dict]:
    return [row for group in made["groups"] for row in group["rows"]]


# ---- cells


def test_every_method_meets_every_ratio_and_budget():
    made, notes = cells_of(["reap", "ean:weighted=true", "expert_sparsity"], [0.5, "75%", 4], ["uniform", "global"], [])
    names = [cell.name for cell in made]
    assert names[:6] == ["reap-0.5", "reap-0.75", "reap-4", "reap-0.5-global", "reap-0.75-global", "reap-4-global"]
    assert "ean-weighted=true-0.5" in names
    assert [name for name in names if name.startswith("expert_sparsity")] == [
        f"expert_sparsity-{share}" for share in ("0.5", "0.75", "4")
    ]
    assert notes == ["expert_sparsity does not support budget global, so it is not in the table"]
    assert len(names) == len(set(names)) == 6 + 6 + 3 + 3 * 6


def test_random_draws_are_always_in_once():
    assert [entry.label for entry in contenders(["random", "reap", "random:seed=7", "reap"])] == [
        "reap", "random:seed=7", "random:seed=0", "random:seed=1", "random:seed=2",
    ]  # fmt: skip
    everything = [entry.label for entry in contenders(["all"])]
    assert {"reap", "hc_smoe", "expert_sparsity", "moeits", "aimer", "random:seed=2"} <= set(everything)
    assert "random" not in everything


def test_healings_share_the_plan_and_thresholds_have_no_ratio():
    made, _ = cells_of(["moeits"], [0.5], ["uniform", "threshold"], ["layer_local:steps=3"])
    mine = [(cell.name, cell.plan_name, cell.keep) for cell in made if cell.contender.label == "moeits"]
    assert mine == [
        ("moeits-0.5", "moeits-0.5", 0.5),
        ("moeits-threshold", "moeits-threshold", None),
        ("moeits-0.5-layer_local-steps=3", "moeits-0.5", 0.5),
        ("moeits-threshold-layer_local-steps=3", "moeits-threshold", None),
    ]


def test_names_leave_out_what_all_have_in_common():
    assert short_names(["ean", "ean:weighted=true", "reap", "x:a=1,b=2", "x:a=1,b=3", "y:a=1"]) == {
        "ean": "ean", "ean:weighted=true": "ean weighted=true", "reap": "reap", "x:a=1,b=2": "x b=2", "x:a=1,b=3": "x b=3", "y:a=1": "y",
    }  # fmt: skip


WRONG = {
    "no method": (([], [0.5], ["uniform"], []), "no method given"),
    "unknown method": ((["raep"], [0.5], ["uniform"], []), "did you mean reap"),
    "unknown option": ((["ean:wieghted=1"], [0.5], ["uniform"], []), "did you mean weighted"),
    "option without value": ((["ean:weighted"], [0.5], ["uniform"], []), "is not KEY=VALUE"),
    "no ratio": ((["reap"], [], ["uniform"], []), "no ratio given"),
    "ratio above 1": ((["reap"], [1.5], ["uniform"], []), "at most 1.0"),
    "unknown budget": ((["reap"], [0.5], ["fair"], []), "no budget 'fair'"),
    "option of another budget": ((["reap"], [0.5], ["uniform:samples=4"], []), "only sensitivity and esap"),
    "unknown option of a search": ((["reap"], [0.5], ["sensitivity:generations=4"], []), "choose from levels, samples"),
    "wrong option of a search": ((["reap"], [0.5], ["esap:samples=0"], []), "samples"),
    "no generation would be new": ((["reap"], [0.5], ["esap:population=4,elites=4"], []), "fewer elites"),
    "unknown healing": ((["reap"], [0.5], ["uniform"], ["prayer"]), "no healing method"),
    "nothing left": ((["reap"], [0.5], ["threshold"], []), "no method to compare"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused_before_anything_runs(what):
    asked, says = WRONG[what]
    with pytest.raises(UserError, match=says):
        cells_of(*asked)


# ---- numbers


def test_paired_standard_error_by_hand():
    """d = 1, 0 over 2 tokens each: rise 1/4, deviations 1/2 and -1/2, so sqrt(2 * (1/4 + 1/4)) / 4 = 1/4."""
    entry = DomainQuality(tokens=4, loss_sum=9.0, reference_loss_sum=8.0, rises={0: (2, 1.0), 1: (2, 0.0)})
    assert (entry.rise, entry.rise_se) == (0.25, 0.25)
    assert DomainQuality(tokens=2, loss_sum=1.0, rises={0: (2, 1.0)}).rise_se == 0.0


def test_unequal_sequences_count_by_their_tokens():
    """1 token with d = 1 and 3 with d = 1: rise 1/2, deviations 1/2 and -1/2, so sqrt(2 * 1/2) / 4."""
    entry = DomainQuality(tokens=4, loss_sum=2.0, reference_loss_sum=0.0, rises={0: (1, 1.0), 1: (3, 1.0)})
    assert (entry.rise, entry.rise_se) == (0.5, 0.25)


def test_a_cell_is_judged_as_its_written_checkpoint_would_be(found, checkpoints, data, tmp_path):
    """Pruned, merged and uneven plans, applied and evaluated by the single commands."""
    folder, made = found
    source, rows = checkpoints("qwen2_moe"), [row for row in all_rows(made) if row["heal"] is None]
    assert any("merge" in text for text in ((folder / row["plan"]).read_text() for row in rows))
    assert {row["budget"] for row in rows} == {"uniform", "global", "threshold"}
    for number, row in enumerate(rows):
        out = tmp_path / str(number)
        api.apply(source, folder / row["plan"], out)
        quality = api.evaluate(out, data, reference=source, seq_len=24, dtype="float32", device=DEVICE)
        for name, theirs in quality.to_json()["domains"].items():
            mine = row["quality"]["domains"][name]
            assert mine == pytest.approx(theirs, rel=2e-5, abs=2e-6), row["method"]
            assert row["rise"]["domains"][name] == pytest.approx(
                [quality.domains[name].rise, quality.domains[name].rise_se], abs=2e-5
            )
        rises = list(row["rise"]["domains"].values())
        assert row["rise"]["mean"][0] == pytest.approx(sum(rise for rise, _ in rises) / 2)
        assert row["rise"]["mean"][1] == pytest.approx(math.sqrt(sum(error**2 for _, error in rises)) / 2)


def test_a_healed_cell_is_what_heal_makes(checkpoints, data, tmp_path):
    source, folder = checkpoints("mixtral"), tmp_path / "out"
    made = api.compare(source, ["reap"], [0.5], data, data, folder, heal=["least_squares:sweeps=1"], **SHAPE)
    assert len(made["groups"][0]["random"]) == 2  # as they are, and healed
    row = next(row for row in all_rows(made) if row["method"] == "reap" and row["heal"])
    api.apply(source, folder / row["plan"], tmp_path / "pruned")
    api.heal(tmp_path / "pruned", source, data, tmp_path / "healed", options={"sweeps": 1}, **SHAPE)
    theirs = api.evaluate(tmp_path / "healed", data, reference=source, seq_len=24, dtype="float32", device=DEVICE).to_json()
    assert row["quality"]["mean"] == pytest.approx(theirs["mean"], rel=1e-6)
    assert row["healing"]["seconds"] > 0
    assert not list((folder / "work").glob("*least_squares*"))
    assert api.compare(source, ["reap"], [0.5], data, data, folder, heal=["least_squares:sweeps=1"], **SHAPE) == made


def test_plans_are_those_of_the_plan_command(found, checkpoints, data):
    folder, made = found
    row = next(row for row in all_rows(made) if (row["method"], row["budget"], row["heal"]) == ("reap", "global", None))
    plan = api.plan(checkpoints("qwen2_moe"), "reap", 0.5, budget="global", stats=folder / "work" / "statistics")
    assert json.loads((folder / row["plan"]).read_text()) == json.loads(plan.dumps())
    assert row["experts"] == list(plan.summary.experts)
    assert row["bytes"] == list(plan.summary.bytes)


def test_a_searched_budget_takes_options(checkpoints, data, tmp_path):
    source = checkpoints("qwen2_moe")
    searches = [f"esap:generations=1,population={size},elites=1,samples=2" for size in (2, 3)]
    made = api.compare(source, ["reap"], [0.5], data, data, tmp_path / "out", budgets=searches, **SHAPE)
    assert [group["budget"] for group in made["groups"]] == ["esap population=2", "esap population=3"]
    assert f"budget esap population=3 is {searches[1]}" in made["notes"]
    options = {"generations": 1, "population": 3, "elites": 1, "samples": 2}
    stats = tmp_path / "out" / "work" / "statistics"
    plan = api.plan(source, "reap", 0.5, budget="esap", options=options, stats=stats, data=data, **SHAPE)
    (row,) = (row for row in made["groups"][1]["rows"] if row["method"] == "reap")
    assert json.loads((tmp_path / "out" / row["plan"]).read_text())["layers"] == json.loads(plan.dumps())["layers"]


def test_footprint_sees_memory_and_time():
    import numpy

    with footprint() as took:
        held = numpy.ones(24_000_000)  # 192 MB: far more than what else comes and goes in the process
    assert 140e6 < took["memory"] < 280e6
    assert 0 < took["seconds"] < 10
    del held
    with footprint() as took:
        pass
    assert took["memory"] < 40e6


# ---- the table


def row_of(name: str, rise: float, heal: str | None = None, size: int = 50) -> dict:
    quality = {"loss": 1 + rise, "perplexity": math.exp(1 + rise), "kl": rise / 2, "top1_agreement": 1 - rise / 4}
    return {
        "name": name, "method": name, "title": name, "heal": heal, "keep": 0.5, "budget": "uniform", "plan": f"plans/{name}.json",
        "experts": [8, 4], "parameters": [100, size], "bytes": [1000, 10 * size], "planning": {"seconds": 0.5, "memory": 2000},
        "quality": {"domains": {"a": quality}, "mean": quality}, "rise": {"domains": {"a": [rise, 0.01]}, "mean": [rise, 0.01]},
    }  # fmt: skip


@pytest.fixture
def small() -> dict:
    """A comparison made by hand."""
    draws = [row_of(f"random:seed={seed}", rise) for seed, rise in enumerate((0.2, 0.4, 0.6))]
    rows = [row_of("bad", 0.5), *draws, row_of("good", 0.1), row_of("bad", 0.3, "least_squares")]
    return {
        "model": {"source": "some/model", "model_type": "mixtral"},
        "made_by": "expertsmith",
        "calibration": {"tokens": {"a": 10}, "seconds": 1.0},
        "heldout": {"tokens": {"a": 20}},
        "dtype": "float32",
        "original": {"experts": 8, "parameters": 100, "bytes": 1000, "domains": {"a": {"loss": 1.0, "perplexity": math.e}}},
        "groups": [_group(0.5, "uniform", rows)],
        "notes": [],
    }


def test_worse_than_chance_is_above_the_mean_of_the_draws_with_the_same_healing(small):
    group = small["groups"][0]
    assert group["random"] == [{"heal": None, "mean": pytest.approx(0.4), "least": 0.2, "largest": 0.6, "draws": 3}]
    found = {(row["method"], row["heal"]): row["worse_than_random"] for row in group["rows"]}
    assert found[("bad", None)] is True
    assert found[("good", None)] is False
    assert found[("bad", "least_squares")] is None  # no healed draws here
    assert found[("random:seed=2", None)] is None


def test_the_draws_are_one_row_and_the_best_is_marked(small):
    rows = shown(small["groups"][0])
    assert [row["name"] for row in rows] == ["good", "bad", "random, mean of 3", "bad"]
    texts = [cells(row, small, rows) for row in rows]
    assert texts[0] == [
        ("good", False),
        ("3.00", True),
        ("+0.100 ± 0.010", True),
        ("0.050", True),
        ("97.5 %", True),
        ("0.50", False),
        ("2.00 kB", False),
    ]
    assert texts[1][0] == ("bad + least_squares", False)
    assert texts[2][2] == ("+0.400 [0.200, 0.600]", False)
    assert texts[3][0] == ("bad †", False)
    assert float(texts[2][1][0]) == pytest.approx(math.exp(1.4), abs=5e-3)  # of the mean loss


def test_markdown(small):
    text = markdown(displayed(small))
    assert "**Keep 0.5: 4 of 8 experts, 50 parameters, 500 B (50 %)**" in text
    assert "| good | **3.00** | **+0.100 ± 0.010** | **0.050** | **97.5 %** | 0.50 | 2.00 kB |" in text
    assert (
        "Keep 0.5: good has the smallest loss increase, +0.100 ± 0.010 nats per token; random draws +0.400 [0.200, 0.600], 1 of 2 methods are worse"
        in text
    )


def with_sequences(row: dict, sums: list[list[float]]) -> dict:
    """A row whose rise is that of these sequences of [tokens, summed rise]."""
    mean = sum(total for _, total in sums) / sum(tokens for tokens, _ in sums)
    rise = {"domains": {"a": [mean, 0.01]}, "mean": [mean, 0.01], "sequences": {"a": sums}}
    return {**row, "rise": rise}


def test_a_lead_within_the_noise_is_a_tie(small):
    """Differences to the best by hand: near +0.1 0 +0.2 -0.1 (mean 0.05, deviation 0.129, error 0.129 / 2), far +0.4 +0.5 +0.4 +0.5 a token."""
    best = with_sequences(row_of("best", 0), [[10, 1.0], [10, 9.0], [10, 2.0], [10, 4.0]])
    near = with_sequences(row_of("near", 0), [[10, 2.0], [10, 9.0], [10, 4.0], [10, 3.0]])
    far = with_sequences(row_of("far", 0), [[10, 5.0], [10, 14.0], [10, 6.0], [10, 9.0]])
    same = with_sequences(row_of("same", 0), [[10, 1.0], [10, 9.0], [10, 2.0], [10, 4.0]])
    group = _group(0.5, "uniform", [far, near, best, same])
    held = {row["name"]: (row["to_best"], row["tied"]) for row in group["rows"]}
    error = math.sqrt(sum((d - 0.05) ** 2 for d in (0.1, 0, 0.2, -0.1)) / 3) / 2
    assert held["best"] == ([0.0, 0.0], False)
    assert held["near"] == ([pytest.approx(0.05), pytest.approx(error)], True)
    assert held["far"] == ([pytest.approx(0.45), pytest.approx(math.sqrt(0.01 / 3) / 2)], False)
    assert "sequences" not in json.dumps(group)
    lucky = with_sequences(
        {**row_of("random:seed=0", 0), "method": "random:seed=0"}, [[10, -9.0], [10, -1.0], [10, -8.0], [10, -6.0]]
    )
    better = next(row for row in _group(0.5, "uniform", [lucky, best])["rows"] if row["name"] != "best")
    assert better["to_best"][0] < 0
    assert not better["tied"]  # a difference far beyond its error, on the other side
    shown_now = displayed({**small, "groups": [group]})
    text = markdown(shown_now)
    assert "| method | a | mean increase ± se | above the best ± se | KL |" in text
    assert "+0.050 ± 0.065 ≈" in text
    assert "| best |" in text
    assert "Keep 0.5: near is within the noise of best: the paired difference is below two standard errors." in text
    assert "Keep 0.5: same gives exactly the losses of best." in text
    assert "far is within" not in text


def test_a_narrow_terminal_keeps_names_and_increases(small, capsys, monkeypatch):
    small["original"]["tasks"] = {"task_one": 0.5, "task_two": 0.6}
    for row in small["groups"][0]["rows"]:
        row["tasks"] = {"task_one": 0.4, "task_two": 0.5}
    for width in (60, 80, 100, 400):
        monkeypatch.setenv("COLUMNS", str(width))
        show_comparison(displayed(small), Path("out"))
        text = capsys.readouterr().out
        table = text[: text.index("Keep 0.5: good")]
        assert max(map(len, table.partition("left out")[0].splitlines())) <= width
        assert "bad + least_squares" in table
        assert "+0.400 [0.200, 0.600]" in table
        left_out = "left out, for the width of this terminal: " in table
        assert left_out == (width < 400)
        assert ("memory" in table.partition("left out")[0]) == (not left_out)
        assert "…" not in table


def test_a_method_looks_the_same_in_every_comparison(small):
    alone = looks(displayed({**small, "groups": [_group(0.5, "uniform", [row_of("good", 0.1)])]}))
    more = looks(displayed(small))
    assert more["good"] == alone["good"]
    assert more["bad"]["colour"] == more["bad + least_squares"]["colour"] != more["good"]["colour"]
    assert more["bad"]["marker"] == more["bad + least_squares"]["marker"]
    assert more["bad"]["dash"] != more["bad + least_squares"]["dash"]


def test_sizes_that_differ_get_columns(small):
    group = small["groups"][0]
    group["rows"][0] = row_of("good", 0.1, size=60)
    text = markdown(displayed({**small, "groups": [_group(0.5, "global", group["rows"])]}))
    assert "**Keep 0.5, budget global**" in text
    assert "| method | experts | parameters | bytes | a |" in text
    assert "| good | 4 of 8 | 60 | 600 B (60 %) |" in text


def test_the_picture(small):
    lines = series_of(displayed(small))
    assert [line["name"] for line in lines] == ["bad", "random, mean of 3", "bad + least_squares", "good"]
    assert lines[3]["points"] == [[0.5, 0.1], [1.0, 0.0]]
    assert lines[1]["points"][0] == [0.5, pytest.approx(0.4), 0.2, 0.6]
    small["model"]["source"] = "<script>&"
    root = ElementTree.fromstring(svg(displayed(small)))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == 4
    assert len(root.findall(f"{space}polygon")) == 1
    heights = {
        point.find(f"{space}title").text.split(",")[0]: float(point.get("cy")) for point in root.findall(f"{space}circle")
    }
    assert heights["bad"] < heights["good"]  # more loss stands higher
    assert not root.findall(f"{space}script")


def test_many_methods_are_told_apart(small):
    rows = [row_of(f"method_{number}", 0.01 * number) for number in range(20)]
    root = ElementTree.fromstring(svg(displayed({**small, "groups": [_group(0.5, "uniform", rows)]})))
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len({(line.get("class"), line.get("stroke-dasharray")) for line in lines}) == 20
    texts = [float(text.get("y")) for text in root.findall("{http://www.w3.org/2000/svg}text")]
    assert max(texts) <= 500


# ---- files


def test_what_is_left_behind(found):
    folder, made = found
    assert {path.name for path in folder.iterdir()} == {
        "plans",
        "cells",
        "work",
        "comparison.json",
        "comparison.html",
        "comparison.svg",
        "comparison.md",
    }
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(json.dumps(made))
    assert made["notes"] == [
        "reap does not support budget threshold, so it is not in the table",
        "m_smoe does not support budget threshold, so it is not in the table",
    ]
    for group in made["groups"]:
        assert [entry["draws"] for entry in group["random"]] == ([] if group["budget"] == "threshold" else [3])
    text = (folder / "comparison.html").read_text()
    assert "<h1>qwen2_moe</h1>" in text
    assert "{{" not in text.split('<script type="application/json"')[0]


def test_nothing_is_made_twice_and_changes_are_made_again(checkpoints, data, tmp_path, monkeypatch):
    source, judged, planned = checkpoints("mixtral"), [], []
    measure, plan = run._judged, api.plan
    monkeypatch.setattr(run, "_judged", lambda *a: judged.append(1) or measure(*a))
    monkeypatch.setattr("expertsmith.verbs.compare.plan", lambda *a, **k: planned.append(a[1]) or plan(*a, **k))

    def again(methods=("reap",), eval_data=data[:1], **more) -> tuple[int, int, dict]:
        judged.clear(), planned.clear()
        made = api.compare(source, methods, [0.5], data[:1], eval_data, tmp_path / "out", **{**SHAPE, **more})
        return len(planned), len(judged), made

    first = again()
    assert first[:2] == (4, 4)
    second = again()
    assert second == (0, 0, first[2])
    assert again(["reap", "frequency"])[:2] == (1, 1)
    assert again(eval_data=data[1:])[:2] == (0, 4)  # other text to judge on, the same plans
    assert again(resume=False)[:2] == (4, 4)


def test_an_interrupted_run_goes_on(checkpoints, data, tmp_path, monkeypatch):
    source, measure, judged = checkpoints("mixtral"), run._judged, []

    def breaks(*args):
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(1)
        return measure(*args)

    monkeypatch.setattr(run, "_judged", breaks)
    with pytest.raises(KeyboardInterrupt):
        api.compare(source, ["reap"], [0.5], data, data, tmp_path / "out", **SHAPE)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2
    assert not (tmp_path / "out" / "comparison.json").exists()
    judged.clear()
    monkeypatch.setattr(run, "_judged", lambda *a: judged.append(1) or measure(*a))
    whole = api.compare(source, ["reap"], [0.5], data, data, tmp_path / "out", **SHAPE)
    assert len(judged) == 2
    assert len(all_rows(whole)) == 4


def test_streaming_gives_the_same_numbers(checkpoints, data, tmp_path):
    resident, streamed = (
        api.compare(checkpoints("mixtral"), ["m_smoe"], [0.5], data[:1], data[:1], tmp_path / memory, **{**SHAPE, "memory": memory}) for memory in ("resident", "stream")
    )  # fmt: skip
    assert [row["quality"] for row in all_rows(resident)] == [row["quality"] for row in all_rows(streamed)]


@pytest.mark.slow
def test_tasks_get_columns(tmp_path, monkeypatch, capsys):
    """A score a task of every cell and of the original; cells of other tasks, or of none, are judged again, and the scores are those of `evaluate`."""
    pytest.importorskip("lm_eval")
    from expertsmith.evaluation import tasks

    folder, asked = Path(__file__).parent.parent.parent / "examples" / "tasks", []
    real = tasks.answer
    monkeypatch.setattr(tasks, "answer", lambda found, name, *rest: (asked.append(name), real(found, name, *rest))[1])
    shape = {"seq_len": 24, "device": DEVICE, "dtype": "float32", "samples": 2, "batch_tokens": 512}
    arguments = ("demo", ["reap"], [0.5], ["demo:code/calib"], ["demo:code/heldout"], tmp_path / "out")
    api.compare(*arguments, **shape)
    made = api.compare(*arguments, tasks=["everyday"], task_path=[folder], limit=4, **shape)
    assert asked == ["everyday"] * 5
    (name,) = made["original"]["tasks"]
    assert name.startswith("everyday ")
    row = next(row for row in all_rows(made) if row["method"] == "reap")
    api.apply("demo", tmp_path / "out" / row["plan"], tmp_path / "half")
    options = {"tasks": ["everyday"], "task_path": [folder], "limit": 4, "device": DEVICE, "dtype": "float32"}
    found = api.evaluate(tmp_path / "half", reference="demo", **options).to_json()["tasks"]["rows"]
    judged = next(entry for entry in found if f"everyday {entry['metric']}" == name)
    assert (judged["value"], judged["reference"]) == pytest.approx((row["tasks"][name], made["original"]["tasks"][name]))
    assert f"| top-1 | {name} |" in (tmp_path / "out" / "comparison.md").read_text()
    del asked[:]
    assert api.compare(*arguments, tasks=["everyday"], task_path=[folder], limit=4, **shape) == made
    assert asked == []
    assert "tasks" not in api.compare(*arguments, **shape)["original"]
    with pytest.raises(UserError, match="the whole model must be in memory"):
        api.compare(*arguments, tasks=["everyday"], task_path=[folder], memory="stream", **shape)


def test_a_method_that_refuses_is_noted_and_the_others_go_on(checkpoints, data, tmp_path, monkeypatch):
    plan = api.plan

    def refuses(model, method, *args, **options):
        if method == "aimer":
            raise UserError("packed codes", "use another method")
        return plan(model, method, *args, **options)

    monkeypatch.setattr("expertsmith.verbs.compare.plan", refuses)
    made = api.compare(checkpoints("mixtral"), ["reap", "aimer"], [0.5], data, data, tmp_path / "out", **SHAPE)
    assert made["notes"] == ["aimer-0.5: packed codes; use another method"]
    assert {row["method"] for row in all_rows(made)} == {"reap", "random:seed=0", "random:seed=1", "random:seed=2"}


# ---- the command


def test_the_command(checkpoints, data, tmp_path, capsys):
    arguments = ["compare", checkpoints("mixtral"), "-m", "reap", "-k", "0.5", "-d", data[0], "-e", data[0], "--seq-len", "24", "--no-pack", "--device", DEVICE, "-q"]  # fmt: skip
    code, out, _ = run_cli(capsys, *arguments, "-o", tmp_path / "out")
    assert code == 0
    assert "random, mean of 3" in out
    assert "has the smallest loss increase" in out
    code, out, _ = run_cli(capsys, *arguments, "-o", tmp_path / "out", "--json")
    assert json.loads(out)["format"] == "expertsmith.comparison"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["-m", "raep"], "did you mean reap"),
        (["-k", "0.1"], "top_k"),
        (["--budget", "fair"], "no budget 'fair'"),
        (["--heal", "prayer"], "no healing method"),
        (["-e", "nowhere.jsonl"], "data file not found: nowhere.jsonl"),
    ],
)
def test_mistakes_end_in_one_line(change, says, checkpoints, data, tmp_path, capsys):
    base = ["compare", checkpoints("mixtral"), "-m", "reap", "-k", "0.5", "-d", data[0], "-e", data[0], "-o", tmp_path / "out"]
    code, out, err = run_cli(capsys, *base, *change)
    assert (code, out) == (2, "")
    assert says in err
    assert not (tmp_path / "out" / "cells").exists()


def test_methods_without_data_need_none(checkpoints, data, tmp_path):
    made = api.compare(checkpoints("mixtral"), ["aimer"], [0.5], [], data[:1], tmp_path / "out", **SHAPE)
    assert made["calibration"] == {}
    assert "Experts chosen without text; evaluated on" in (tmp_path / "out" / "comparison.md").read_text()
    for asked in ({"methods": ["reap"]}, {"methods": ["aimer"], "heal": ["least_squares"]}):
        with pytest.raises(UserError, match=r"(reap|least_squares) needs calibration text; pass --data FILE"):
            api.compare(checkpoints("mixtral"), keep=[0.5], data=[], eval_data=data, out=tmp_path / "out", **asked, **SHAPE)


def test_a_folder_with_other_files_is_left_alone(checkpoints, data, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"letter\.txt"):
        api.compare(checkpoints("mixtral"), ["reap"], [0.5], data, data, tmp_path, **SHAPE)


def test_a_cell_is_a_name_for_a_file():
    entry = contenders(["expert_sparsity:tokens=10,loss=authors"])[0]
    assert (
        Cell(entry, 0.5, "uniform", "lora:targets=attention,rank=2").name
        == "expert_sparsity-tokens=10-loss=authors-0.5-lora-targets=attention-rank=2"
    )
