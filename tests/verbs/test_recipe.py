"""Recipes: a whole job in one YAML file, and all of its faults at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from conftest import CALIBRATION, run_cli
from expertsmith import api
from expertsmith.calibration import corpus
from expertsmith.calibration.data import read_records
from expertsmith.errors import UserError
from expertsmith.methods import methods
from expertsmith.recipes import copy, shipped
from expertsmith.verbs.recipe import Recipe, load_recipe

RECIPES = sorted((Path(__file__).parent.parent.parent / "src" / "expertsmith").rglob("*.yaml"))
SYSTEMS = (
    "expert_sparsity",
    "easy_ep",
    "moeits",
    "tomoe",
    "look_into_moes",
)  # one headline experiment each, at the size of a laptop


def whole(model: Path, data: list[str], root: Path) -> dict:
    """A recipe with every section."""
    return {
        "model": str(model),
        "device": "cpu",
        "dtype": "bfloat16",
        "memory": "resident",
        "calibrate": {
            "data": data,
            "out": str(root / "stats"),
            "seq_len": 24,
            "pack": False,
            "batch_tokens": 72,
            "samples": 5,
            "seed": 3,
        },
        "plan": {
            "method": "ean",
            "keep": "50%",
            "out": str(root / "plan.json"),
            "domains": ["a"],
            "options": {"weighted": True},
        },
        "apply": {"out": str(root / "out")},
        "verify": {"tokens": 64},
        "evaluate": {"data": data, "seq_len": 16, "samples": 4},
    }


def written(tmp_path: Path, recipe: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe), encoding="utf-8")
    return path


def refusal(tmp_path: Path, recipe: object) -> str:
    path = written(tmp_path, recipe)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.fixture
def good(tmp_path) -> dict:
    """A recipe that is right; nothing of it has to exist to be checked."""
    return whole(tmp_path / "model", ["a=a.jsonl", "b=b.jsonl:4"], tmp_path)


# ---- running


@pytest.mark.slow
def test_a_recipe_does_what_the_single_commands_do(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    results = api.run(written(tmp_path, whole(source, data, tmp_path / "recipe")))
    assert list(results) == ["calibrate", "plan", "apply", "verify", "evaluate"]

    single, run = tmp_path / "single", {"device": "cpu", "memory": "resident"}
    stats = api.calibrate(source, data, single / "stats", samples=5, seed=3, dtype="bfloat16", memory="resident", **CALIBRATION)
    made = api.plan(source, "ean", "50%", stats=stats, domains=["a"], options={"weighted": True}, out=single / "plan.json")
    notes = api.apply(source, single / "plan.json", single / "out")
    verdict = api.verify(source, single / "out", tokens=64, **run)
    quality = api.evaluate(single / "out", data, reference=source, seq_len=16, samples=4, dtype="bfloat16", **run)

    assert results["plan"] == made
    assert results["apply"] == notes
    assert results["verify"] == verdict
    assert verdict.passed
    assert results["evaluate"].to_json() == quality.to_json()
    files = {path.relative_to(single) for path in single.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "recipe") for path in (tmp_path / "recipe").rglob("*") if path.is_file()}
    assert {Path("plan.json"), Path("stats/layer_000.safetensors"), Path("out/model.safetensors")} <= files
    for file in files:
        if file.name != "README.md":  # may say when it was made
            assert (single / file).read_bytes() == (tmp_path / "recipe" / file).read_bytes(), file


def test_sections_that_are_left_out_are_not_run(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    recipe = whole(source, data, tmp_path)
    only = {"model": str(source), "device": "cpu", "plan": {**recipe["plan"], "method": "random", "domains": [], "options": {}}}
    assert list(api.run(written(tmp_path, only))) == ["plan"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "recipe.steps.json", "recipe.yaml"]


def test_evaluate_alone_measures_the_model_without_a_reference(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    recipe = {"model": str(source), "device": "cpu", "evaluate": {"data": data, "seq_len": 16}}
    quality = api.run(written(tmp_path, recipe))["evaluate"].to_json()
    assert quality == api.evaluate(source, data, seq_len=16, device="cpu").to_json()
    assert "kl" not in quality["mean"]


def test_the_reference_can_be_left_out(checkpoints, data, tmp_path):
    recipe = whole(checkpoints("mixtral"), data, tmp_path)
    del recipe["verify"], recipe["calibrate"]
    recipe["plan"] = {"method": "random", "keep": 4, "out": str(tmp_path / "p.json")}
    recipe["evaluate"]["reference"] = False
    quality = api.run(written(tmp_path, recipe))["evaluate"].to_json()
    assert "kl" not in quality["mean"]
    assert quality == api.evaluate(tmp_path / "out", data, seq_len=16, samples=4, dtype="bfloat16", device="cpu").to_json()


def test_statistics_from_elsewhere_serve_the_plan(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    api.calibrate(source, data, tmp_path / "old", **CALIBRATION)
    recipe = {
        "model": str(source),
        "plan": {"method": "reap", "keep": 0.5, "out": str(tmp_path / "p"), "stats": str(tmp_path / "old")},
    }
    assert api.run(written(tmp_path, recipe))["plan"] == api.plan(source, "reap", 0.5, stats=tmp_path / "old")


# ---- running again


def verbs_run(monkeypatch) -> list[str]:
    """The verbs that a recipe runs from now on, in order."""
    from expertsmith.verbs import recipe as module

    ran: list[str] = []
    for name in ("calibrate", "analyze", "plan", "apply", "verify", "evaluate", "skip", "heal", "compare"):
        usual = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _u=usual, **o: (ran.append(_n), _u(*a, **o))[1])
    return ran


def everything(source: Path, data: list[str], root: Path) -> dict:
    recipe = whole(source, data, root)
    shape = {"seq_len": 24, "samples": 4}
    recipe["dtype"] = "float32"
    recipe["analyze"] = {"out": str(root / "look")}
    recipe["evaluate"]["report"] = str(root / "report.html")
    recipe["skip"] = {"data": data, "out": str(root / "skip"), "measure": False, **shape}
    recipe["heal"] = {"data": data, "out": str(root / "healed"), **shape}
    recipe["compare"] = {"methods": ["aimer"], "keep": [0.5], "data": data, "eval_data": data, "out": str(root / "c"), **shape}
    return recipe


@pytest.mark.slow
def test_a_recipe_run_again_keeps_what_did_not_change_and_says_so(checkpoints, data, tmp_path, monkeypatch, capsys):
    path = written(tmp_path, everything(checkpoints("mixtral"), data, tmp_path / "work"))
    ran = verbs_run(monkeypatch)
    code, first, err = run_cli(capsys, "run", path, "--json")
    assert code == 0, err
    assert ran == ["calibrate", "analyze", "plan", "apply", "verify", "evaluate", "skip", "heal", "evaluate", "compare"]
    reports = [tmp_path / "work" / name for name in ("report.html", "report_healed.html")]
    for page, where in zip(reports, ("out", "healed"), strict=True):
        assert f"<h1>{where} next to mixtral</h1>" in page.read_text()
    ran.clear()
    code, again, err = run_cli(capsys, "run", path, "--json")
    assert code == 0, err
    assert ran == []
    assert json.loads(again) == json.loads(first)
    for name in ("calibrate", "plan", "apply", "verify", "evaluate", "skip", "heal", "evaluate_healed", "compare", "analyze"):
        assert f"{name}: finished before, kept" in err
    reports[1].unlink()
    code, shown, err = run_cli(capsys, "run", path, "-q")
    assert (code, ran) == (0, ["evaluate"]), err
    assert reports[1].exists(), "a page that is gone is made again"
    ran.clear()
    assert "healed by least_squares" in shown
    code, _, err = run_cli(capsys, "run", path, "-q", "--overwrite")
    assert code == 0, err
    assert ran[:4] == ["calibrate", "analyze", "plan", "apply"]
    assert len(ran) == 10


def test_a_change_is_refused_with_what_changed_and_made_with_overwrite(checkpoints, data, tmp_path, monkeypatch):
    recipe = whole(checkpoints("mixtral"), data, tmp_path / "work")
    api.run(written(tmp_path, recipe))
    ran = verbs_run(monkeypatch)
    recipe["plan"]["keep"] = 5
    with pytest.raises(UserError, match=r"plan: .*plan\.json exists already, and keep changed since; .*--overwrite"):
        api.run(written(tmp_path, recipe))
    assert ran == []
    recipe["plan"]["out"], recipe["apply"]["out"] = str(tmp_path / "work" / "p5.json"), str(tmp_path / "work" / "five")
    assert api.run(written(tmp_path, recipe))["plan"].uniform_count == 5
    assert ran == ["plan", "apply", "verify", "evaluate"]  # the calibration is kept
    (tmp_path / "work" / "p5.json").write_text((tmp_path / "work" / "p5.json").read_text() + " ")
    with pytest.raises(UserError, match=r"p5\.json was changed since"):
        api.run(written(tmp_path, recipe))
    ran.clear()
    assert api.run(written(tmp_path, recipe), overwrite=True)["plan"].uniform_count == 5
    assert ran == ["calibrate", "plan", "apply", "verify", "evaluate"]


def test_a_report_in_the_way_is_refused_before_anything_runs(checkpoints, data, tmp_path, monkeypatch):
    recipe = whole(checkpoints("mixtral"), data, tmp_path / "work")
    recipe["evaluate"]["report"] = str(tmp_path / "page.html")
    recipe["heal"] = {"data": data, "out": str(tmp_path / "healed")}
    ran = verbs_run(monkeypatch)
    for name, step in (("page", "evaluate"), ("page_healed", "evaluate_healed")):
        (tmp_path / f"{name}.html").write_text("mine")
        with pytest.raises(UserError, match=rf"{step}: .*{name}\.html exists already"):
            api.run(written(tmp_path, recipe))
        (tmp_path / f"{name}.html").unlink()
    assert ran == []


def test_data_that_changed_is_no_finished_step(checkpoints, data, tmp_path):
    text = tmp_path / "a.jsonl"
    text.write_bytes(Path(data[0].partition("=")[2]).read_bytes())
    recipe = whole(checkpoints("mixtral"), [f"a={text}"], tmp_path / "work")
    api.run(written(tmp_path, recipe))
    text.write_text(json.dumps({"input_ids": list(range(3, 27))}) + "\n")
    with pytest.raises(UserError, match="an earlier step changed since"):
        api.run(written(tmp_path, recipe))


@pytest.mark.slow
def test_an_interrupted_recipe_goes_on_also_one_that_started_anew(checkpoints, data, tmp_path, monkeypatch):
    from expertsmith.verbs import recipe as module

    path = written(tmp_path, whole(checkpoints("mixtral"), data, tmp_path / "work"))
    api.run(path)
    for anew in (False, True):
        ran = verbs_run(monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(module, "apply", None)
            if anew:
                with pytest.raises(TypeError):
                    api.run(path, overwrite=True)
                assert ran == ["calibrate", "plan"]
            else:
                api.run(path)
                assert ran == []
        ran.clear()
        api.run(path)  # the outputs of the first run may still be replaced
        assert ran == (["apply", "verify", "evaluate"] if anew else [])


def test_finished_steps_that_cannot_be_read(checkpoints, data, tmp_path):
    path = written(tmp_path, whole(checkpoints("mixtral"), data, tmp_path / "work"))
    (tmp_path / "recipe.steps.json").write_text("{")
    with pytest.raises(UserError, match=r"recipe\.steps\.json .*cannot be read; delete it"):
        api.run(path)


# ---- reading


def test_the_good_recipe_is_accepted(good, tmp_path):
    """Otherwise the refusals below could be for another reason."""
    recipe = load_recipe(written(tmp_path, good))
    assert recipe.model == good["model"]
    assert recipe.calibrate.data == ["a=a.jsonl", "b=b.jsonl:4"]
    assert recipe.evaluate.reference is True
    assert (recipe.verify.tokens, recipe.verify.tolerance) == (64, 1e-4)


@pytest.mark.parametrize(("text", "keep"), [("0.5", 0.5), ("50%", "50%"), ("4", 4), ("'4'", "4"), ("1.0", 1.0)])
def test_keep_is_written_as_on_the_command_line(tmp_path, text, keep):
    found = load_recipe(written(tmp_path, f"model: m\nplan: {{method: random, keep: {text}, out: p.json}}\n")).plan.keep
    assert found == keep
    assert type(found) is type(keep)  # 1 is one expert, 1.0 all of them


def test_defaults_are_those_of_the_functions():
    """A recipe that says nothing about an option means what the command means."""
    import inspect

    from expertsmith.comparison.run import compare as run_comparison

    for section, function in (
        ("calibrate", api.calibrate),
        ("plan", api.plan),
        ("apply", api.apply),
        ("verify", api.verify),
        ("evaluate", api.evaluate),
        ("analyze", api.analyze),
        ("skip", api.skip),
        ("heal", api.heal),
        ("compare", run_comparison),
    ):
        parameters = {**inspect.signature(api.calibrate).parameters, **inspect.signature(function).parameters}
        annotation = Recipe.model_fields[section].annotation
        model = next(kind for kind in annotation.__args__ if kind is not type(None))
        for name, field in model.model_fields.items():
            if field.is_required() or (section, name) == ("evaluate", "reference"):
                continue
            default = field.get_default(call_default_factory=True)
            theirs = parameters[name].default
            assert default == theirs or not (default or theirs), (section, name)


HEAL = {"data": ["a.jsonl"], "out": "healed"}
COMPARE = {"methods": ["reap"], "keep": [0.5], "data": ["a.jsonl"], "eval_data": ["b.jsonl"], "out": "compared"}
FAULTS = {  # what: (change, what the message has to say)
    "no model": (lambda r: r.pop("model"), ["model: Field required"]),
    "an unknown section": (lambda r: r.update(hael={}), ["hael: unknown key"]),
    "an unknown option": (lambda r: r["calibrate"].update(sampels=3), ["calibrate.sampels: unknown key"]),
    "a word for a number": (lambda r: r["calibrate"].update(samples="many"), ["calibrate.samples", "valid integer"]),
    "no samples": (lambda r: r["calibrate"].update(samples=0), ["calibrate.samples", "greater than or equal to 1"]),
    "a short window": (lambda r: r["evaluate"].update(seq_len=1), ["evaluate.seq_len", "greater than or equal to 2"]),
    "data as one text": (lambda r: r["calibrate"].update(data="a.jsonl"), ["calibrate.data", "valid list"]),
    "no data": (lambda r: r["calibrate"].update(data=[]), ["calibrate.data", "at least 1 item"]),
    "data without a source": (lambda r: r["evaluate"].update(data=["a="]), ["evaluate.data", "has no source"]),
    "data with a bad limit": (lambda r: r["calibrate"].update(data=["a.jsonl:0"]), ["calibrate.data", "positive number"]),
    "a section that is a list": (lambda r: r.update(apply=["out"]), ["apply"]),
    "no output": (lambda r: r["apply"].pop("out"), ["apply.out: Field required"]),
    "a word for overlong": (lambda r: r["calibrate"].update(overlong="cut"), ["calibrate.overlong", "'refuse', 'truncate' or 'drop'"]),
    "a word for memory": (lambda r: r.update(memory="big"), ["memory", "'auto', 'resident' or 'stream'"]),
    "a word for dtype": (lambda r: r.update(dtype="float31"), ["dtype", "float32"]),
    "a word for device": (lambda r: r.update(device="tpu9"), ["device", "cpu"]),
    "a word for budget": (lambda r: r["plan"].update(budget="fair"), ["plan.budget", "'uniform', 'global'"]),
    "a searched budget without text": (lambda r: r["plan"].update(budget="esap"), ["plan: budget esap runs the model on text"]),
    "a wrong option of a searched budget": (
        lambda r: r["plan"].update(budget="esap", options={"generations": 0, "wieghted": 1}),
        ["generations of budget esap is 0", "did you mean weighted"],
    ),
    "an unknown method": (lambda r: r["plan"].update(method="raep", options={}), ["plan", "did you mean reap"]),
    "an unknown option of the method": (lambda r: r["plan"].update(options={"wieghted": 1}), ["plan", "did you mean weighted"]),
    "a wrong value of an option": (lambda r: r["plan"].update(options={"weighted": "perhaps"}), ["plan", "true or false"]),
    "keep above 1": (lambda r: r["plan"].update(keep=1.5), ["plan", "at most 1.0"]),
    "keep in words": (lambda r: r["plan"].update(keep="half"), ["plan", "neither a ratio nor a count"]),
    "a tolerance of nothing": (lambda r: r["verify"].update(tolerance=0), ["verify.tolerance", "greater than 0"]),
    "no statistics": (lambda r: r.pop("calibrate"), ["method ean needs statistics"]),
    "apply without a plan": (lambda r: r.pop("plan"), ["apply: there is no plan section"]),
    "verify without apply": (lambda r: r.pop("apply"), ["verify: there is no apply section"]),
    "heal without apply": (lambda r: (r.pop("apply"), r.update(heal=HEAL)), ["heal: there is no apply section"]),
    "an unknown way of healing": (lambda r: r.update(heal={**HEAL, "method": "prayer"}), ["heal", "no healing method"]),
    "an unknown option of healing": (lambda r: r.update(heal={**HEAL, "options": {"sweps": 2}}), ["heal", "did you mean sweeps"]),
    "an unknown method to compare": (lambda r: r.update(compare={**COMPARE, "methods": ["raep"]}), ["compare", "did you mean reap"]),
    "a wrong ratio to compare": (lambda r: r.update(compare={**COMPARE, "keep": [0.5, "half"]}), ["compare", "neither a ratio nor a count"]),
    "a wrong budget to compare": (lambda r: r.update(compare={**COMPARE, "budgets": ["fair"]}), ["compare.budgets", "'global'"]),
    "an unknown healing to compare": (lambda r: r.update(compare={**COMPARE, "heal": ["prayer"]}), ["compare", "no healing method"]),
    "nothing to compare on": (lambda r: r.update(compare={**COMPARE, "eval_data": []}), ["compare.eval_data", "at least 1 item"]),
    "an unknown way of converting": (lambda r: r.update(convert={"method": "tomeo", "out": "o"}), ["convert", "did you mean tomoe"]),
    "an unknown option of convert": (lambda r: r.update(convert={"method": "cmoe", "out": "o", "expert": 8}), ["convert", "did you mean experts"]),
    "a word for experts": (lambda r: r.update(convert={"method": "cmoe", "out": "o", "experts": "many"}), ["convert", "experts", "valid integer"]),
    "all experts of nothing": (lambda r: r.update(analyze={"out": "o", "all_experts": 8}), ["analyze", "add analyze.data"]),
    "skip without data": (lambda r: r.update(skip={"out": "o"}), ["skip.data: Field required"]),
    "two outputs of one name": (lambda r: r["plan"].update(out=r["calibrate"]["out"]), ["calibrate and plan have the same output"]),
    "a demo text that there is not": (lambda r: r["calibrate"].update(data=["demo:code/test"]), ["no text demo:code/test", "code, prose, unicode"]),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_named_with_its_place(what, good, tmp_path):
    change, says = FAULTS[what]
    change(good)
    message = refusal(tmp_path, good)
    for part in says:
        assert part in message


def test_all_faults_are_reported_at_once(good, tmp_path):
    good["calibrate"].update(samples=0, sampels=3, data=["a.jsonl:0", "b="])
    good["plan"].update(method="raep", keep="half", budget="fair")
    good["evaluate"].update(seq_len="long", data=["c.jsonl:-1"])
    good["memory"] = "big"
    good["extra"] = 1
    del good["apply"]
    message = refusal(tmp_path, good)
    wanted = (
        "calibrate.samples", "calibrate.sampels", "'a.jsonl:0'", "'b='", "did you mean reap", "neither a ratio nor a count", "plan.budget",
        "evaluate.seq_len", "'c.jsonl:-1'", "memory", "extra: unknown key", "verify: there is no apply section",
    )  # fmt: skip
    assert [part for part in wanted if part not in message] == []
    assert "more" not in message


def test_what_a_method_needs_besides_is_told_before_anything_runs(tmp_path):
    recipe = {
        "model": "m",
        "calibrate": {"data": ["a.jsonl"], "out": "s"},
        "plan": {"method": "hc_smoe", "keep": 4, "out": "p"},
    }
    assert "set calibrate.all_outputs to true" in refusal(tmp_path, recipe)
    recipe["calibrate"]["all_outputs"] = True
    assert load_recipe(written(tmp_path, recipe)).plan.method == "hc_smoe"
    recipe = {"model": "m", "plan": {"method": "aimer", "out": "p"}}
    assert "keep is required for method aimer: add plan.keep" in refusal(tmp_path, recipe)
    recipe["plan"]["method"] = "moeits"
    assert load_recipe(written(tmp_path, recipe)).plan.keep is None


def test_faults_of_the_chain_are_reported_together(tmp_path):
    message = refusal(tmp_path, {"model": "m", "apply": {"out": "o"}, "verify": {}})
    assert "apply: there is no plan section" in message
    assert "nothing to do" in message


def test_a_searched_budget_has_options(tmp_path):
    options = {"generations": 3, "population": 64, "elites": 40, "weighted": True}
    plan = {
        "method": "ean",
        "keep": 0.5,
        "out": "p.json",
        "budget": "esap",
        "data": ["a.jsonl"],
        "options": options,
        "stats": "s",
    }
    assert load_recipe(written(tmp_path, {"model": "m", "plan": plan})).plan.options == options


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_plan_needs_statistics_unless_its_method_needs_none(method, tmp_path):
    recipe = {"model": "m", "plan": {"method": method, "keep": 0.5, "out": "p.json"}}
    if methods()[method].data_free:
        assert load_recipe(written(tmp_path, recipe)).plan.method == method
    elif methods()[method].reads == "model":
        assert f"method {method} needs text: add plan.data" in refusal(tmp_path, recipe)
        recipe["plan"]["data"] = ["a.jsonl"]
        assert load_recipe(written(tmp_path, recipe)).plan.data == ["a.jsonl"]
    else:
        assert f"method {method} needs statistics" in refusal(tmp_path, recipe)
        recipe["plan"]["stats"] = "stats"
        assert load_recipe(written(tmp_path, recipe)).plan.stats == "stats"


@pytest.mark.slow
def test_nothing_runs_before_the_whole_recipe_is_right(checkpoints, data, tmp_path):
    recipe = whole(checkpoints("mixtral"), data, tmp_path / "made")
    recipe["evaluate"]["samples"] = -1
    with pytest.raises(UserError, match=r"evaluate\.samples"):
        api.run(written(tmp_path, recipe))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not a mapping of sections"),
        ("- model: x\n", "is not a mapping of sections"),
        ("just words\n", "is not a mapping of sections"),
        ("model: [a\nplan: b: c\n", "is not YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("model: m\n", "nothing to do"),
        ("model: m\nplan:\n", "nothing to do"),
        ("model: {a: b}\nevaluate: {data: [x]}\n", "model: Input should be a valid string"),
        ("1: 2\nmodel: m\nevaluate: {data: [x]}\n", "1: "),
    ],
)
def test_what_is_no_recipe(tmp_path, content, says):
    assert says in refusal(tmp_path, content)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(UserError, match="no recipe found at"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder, not a recipe"):
        load_recipe(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(tmp_path / "x.yaml")


def test_a_recipe_may_be_json(good, tmp_path):
    assert load_recipe(written(tmp_path, json.dumps(good))) == load_recipe(written(tmp_path, good))


# ---- the sections beyond the main job


def test_heal_and_compare_do_what_the_single_commands_do(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    recipe = whole(source, data, tmp_path)
    text = {"data": data, "seq_len": 24, "samples": 5}
    recipe |= {
        "dtype": "float32",
        "heal": {**text, "out": str(tmp_path / "healed"), "options": {"sweeps": 1}},
        "compare": {**text, "methods": ["reap"], "keep": [0.5], "eval_data": data, "out": str(tmp_path / "compared")},
        "skip": {**text, "out": str(tmp_path / "skipping"), "measure": False},
    }
    results = api.run(written(tmp_path, recipe))
    assert list(results) == ["calibrate", "plan", "apply", "verify", "evaluate", "skip", "heal", "evaluate_healed", "compare"]
    run = {"device": "cpu", "memory": "resident"}
    theirs = api.heal(tmp_path / "out", source, data, tmp_path / "h2", options={"sweeps": 1}, seq_len=24, samples=5, **run)
    assert results["heal"]["held_out"] == theirs["held_out"]
    healed = api.evaluate(tmp_path / "healed", data, reference=source, seq_len=16, samples=4, dtype="float32", **run)
    assert results["evaluate_healed"].to_json() == healed.to_json()
    assert results["skip"]["plan"].kept == results["plan"].kept
    compared = api.compare(source, ["reap"], [0.5], data, data, tmp_path / "c2", seq_len=24, samples=5, dtype="float32", **run)
    assert [group["random"] for group in results["compare"]["groups"]] == [group["random"] for group in compared["groups"]]


def test_what_convert_makes_is_the_model_of_the_later_sections(dense, texts, tmp_path):
    recipe = {
        "model": str(dense("llama")),
        "device": "cpu",
        "convert": {"method": "moefication", "experts": 4, "active": 0.5, "data": texts, "seq_len": 32, "measure": False, "out": str(tmp_path / "moe")},
        "analyze": {"out": str(tmp_path / "look")},
        "plan": {"method": "aimer", "keep": 3, "out": str(tmp_path / "plan.json")},
        "evaluate": {"data": texts, "seq_len": 16, "samples": 2},
    }  # fmt: skip
    results = api.run(written(tmp_path, recipe))
    assert list(results) == ["convert", "analyze", "plan", "evaluate"]
    assert results["plan"] == api.plan(tmp_path / "moe", "aimer", 3)
    assert results["analyze"]["model"]["source"] == str(tmp_path / "moe")
    assert "kl" not in results["evaluate"].to_json()["mean"]


# ---- the recipes that come along


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_the_recipes_that_come_along_are_right(path):
    load_recipe(path)
    entry = shipped()[path.stem]
    assert entry.text == path.read_text()
    assert all((entry.about, entry.needs, entry.size))


def test_one_for_each_system():
    assert {path.stem for path in RECIPES} == set(shipped())
    assert set(SYSTEMS) <= set(shipped())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in shipped().items() if entry.needs.startswith("nothing, ")])
def test_small_ones_run(name, tmp_path, monkeypatch, capsys):
    """From a fresh folder, with fewer sequences than they say."""
    monkeypatch.chdir(tmp_path)
    file = copy(name, tmp_path)
    text = re.sub(r":\d+\"", ':2"', file.read_text()).replace("seq_len: 256", "seq_len: 64")
    file.write_text(
        text.replace("keep: 12", "keep: 14")
        .replace("keep: [0.75, 0.5]", "keep: [0.5]")
        .replace("skip:", "skip:\n  measure: false")
    )
    code, out, err = run_cli(capsys, "run", file, "-q")
    assert (code, err) == (0, "")
    asked = yaml.safe_load(text)
    for section in asked.values():
        if isinstance(section, dict) and "out" in section:
            assert Path(section["out"]).exists()
    assert ("verify: passed" in out) == ("verify" in asked)
    assert ("healed" in out) == ("heal" in asked)


@pytest.mark.slow
def test_tomoe_runs_on_another_dense_model(dense, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(shipped()["tomoe"].text)
    recipe["model"] = str(dense("llama"))
    del recipe["convert"]["gguf_file"]
    recipe["convert"] |= {"steps": 2, "experts": 4, "data": texts, "eval_data": texts, "seq_len": 32}
    results = api.run(written(tmp_path, recipe))
    assert results["convert"]["method"]["name"] == "tomoe"
    assert api.inspect("work/tomoe")["num_experts"] == 4


def test_the_command_lists_and_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli(capsys, "recipes")
    assert code == 0
    assert all(name in out for name in SYSTEMS)
    code, out, _ = run_cli(capsys, "recipes", "--json")
    assert {row["name"] for row in json.loads(out)} == set(shipped())
    assert run_cli(capsys, "recipes", "easy_ep", "--to", "mine/own.yaml")[0] == 0
    assert (tmp_path / "mine" / "own.yaml").read_text() == shipped()["easy_ep"].text
    assert run_cli(capsys, "recipes", "easy_ep")[0] == 0
    for arguments, says in (
        (["easy_ep"], "exists already"),
        (["easy_pe"], "did you mean easy_ep"),
        (["--to", "x.yaml"], "without a recipe name"),
    ):
        code, _, err = run_cli(capsys, "recipes", *arguments)
        assert code == 2
        assert says in err


def test_the_demo_model_and_text_have_names(capsys):
    code, out, _ = run_cli(capsys, "inspect", "demo", "--json")
    assert code == 0
    assert json.loads(out)["model_type"] == "qwen3_moe"
    assert [record["text"] for _, record in read_records("demo:prose/heldout")] == list(corpus.pieces("prose", "heldout"))


# ---- lm-eval tasks


@pytest.mark.slow
def test_tasks_of_a_recipe(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from expertsmith.demo import MODEL

    section = {
        "tasks": ["everyday"],
        "task_path": [str(Path(__file__).parent.parent.parent / "examples" / "tasks")],
        "limit": 2,
    }
    recipe = {"model": str(MODEL), "device": "cpu", "dtype": "float32", "evaluate": section}
    found = api.run(written(tmp_path, recipe))["evaluate"].to_json()
    assert [row["documents"] for row in found["tasks"]["rows"]] == [2, 2]
    section["task_path"] = ["nowhere"]
    monkeypatch.setattr("expertsmith.verbs.recipe.evaluate", lambda *_, **__: pytest.fail("refused before anything runs"))
    with pytest.raises(UserError, match="task folder not found: nowhere"):
        api.run(written(tmp_path, recipe))


def test_an_evaluation_of_nothing_is_a_fault(tmp_path):
    with pytest.raises(UserError, match=r"add evaluate\.data or evaluate\.tasks"):
        load_recipe(written(tmp_path, {"model": "m", "evaluate": {"reference": False}}))
