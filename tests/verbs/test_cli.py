"""The command line: help, what is imported, JSON, exit codes, Ctrl-C, and what there is."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file

from conftest import passed, save_tiny, strict
from conftest import run_cli as run
from expertsmith import __version__, api, cli
from expertsmith.arch import families
from expertsmith.calibration.stats import load_statistics
from expertsmith.methods import methods
from expertsmith.verbs.definition import VERBS

SMALL = ["--seq-len", "24", "--no-pack", "--device", "cpu"]
CALIBRATING = {"--data", "--samples", "--seq-len", "--seed", "--pack", "--no-pack", "--overlong", "--batch-tokens"}
RUNNING = {"--device", "--dtype", "--memory"}
CHOOSING = {"--method", "--keep", "--stats", "--domain", "--budget", "--option", "--router-groups"}
OPTIONS = {
    "compress": CALIBRATING
    | RUNNING
    | CHOOSING
    | {"--out", "--eval-data", "--measure", "--resume", "--fresh", "--overwrite", "--allow-pickle"},
    "calibrate": CALIBRATING | RUNNING | {"--out", "--output-sum", "--sample-tokens", "--resume", "--fresh", "--allow-pickle"},
    "plan": CALIBRATING | RUNNING | CHOOSING | {"--out", "--allow-pickle"},
    "apply": {"--out", "--check-values", "--overwrite", "--allow-pickle"},
    "verify": RUNNING | {"--plan", "--data", "--tokens", "--seq-len", "--tolerance", "--allow-pickle"},
    "evaluate": RUNNING
    | {"--data", "--reference", "--samples", "--seq-len", "--seed", "--batch-tokens"}
    | {"--tasks", "--task-path", "--limit", "--generate", "--format", "--out", "--resume", "--fresh"},
    "analyze": CALIBRATING
    | RUNNING
    | {"--out", "--stats", "--all-experts", "--dense", "--reference", "--plan", "--reference-stats", "--neurons", "--pairs"},
    "heal": CALIBRATING
    | RUNNING
    | {"--teacher", "--method", "--option", "--eval-data", "--out", "--resume", "--fresh", "--overwrite"},
    "export": {"--format", "--out"},
    "inspect": {"--allow-pickle"},
    "lint": {"--engine", "--tp", "--ep"},
    "methods": set(),
    "architectures": set(),
    "demo": {"--out"},
    "run": set(),
}
LONG = {"analyze", "compress", "calibrate", "plan", "apply", "verify", "evaluate", "demo", "run"}


pytestmark = pytest.mark.usefixtures("wide")


# ---- help


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(capsys, command):
    out = passed(capsys, command, "--help")
    wanted = OPTIONS[command] | {"--json"} | ({"--quiet"} if command in LONG else set())
    if command == "demo":
        wanted -= {"--help"}
    missing = {option for option in wanted if f"{option} " not in out.replace("\n", " ").replace("│", " ")}
    assert not missing
    assert out == passed(capsys, command, "-h")


def test_every_command_is_in_the_list_above_and_explains_itself(capsys):
    commands = typer.main.get_command(cli.app).commands
    assert set(OPTIONS) <= set(commands)
    overview = passed(capsys, "--help")
    for name, command in commands.items():
        assert f" {name} " in overview
        assert command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


def test_without_a_command_the_help_is_shown(capsys):
    _, out, err = run(capsys)
    assert "compress" in out + err


def test_version(capsys):
    for flag in ("--version", "-V"):
        assert passed(capsys, flag) == f"expertsmith {__version__}\n"


def test_the_shell_completes_commands(monkeypatch, capsys):
    monkeypatch.setenv("_EXPERTSMITH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "expertsmith comp")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert passed(capsys).split() == ["compress", "compare"]


# ---- what is imported

WATCH = """
import json, sys
from expertsmith import cli
seen = {}
for line in json.loads(sys.argv[1]):
    sys.argv = ["expertsmith", *line]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, (line, stop.code)
    seen[" ".join(line[:2])] = sorted({"torch", "transformers", "datasets", "accelerate"} & set(sys.modules))
print(json.dumps(seen), file=sys.stderr)
"""


@pytest.mark.slow
def test_commands_that_run_no_model_do_not_import_torch(checkpoints, tmp_path):
    source = str(checkpoints("mixtral"))
    lines = [
        ["--help"], ["compress", "--help"], ["--version"], ["methods"], ["architectures"], ["inspect", source], ["lint", source],
        ["plan", source, "-m", "random", "-k", "4", "-o", str(tmp_path / "p.json"), "-q"],
        ["apply", source, str(tmp_path / "p.json"), "-o", str(tmp_path / "out"), "-q"],
        ["run", "--help"],
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", WATCH, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stderr.splitlines()[-1])
    assert len(seen) == len(lines)
    assert {line: found for line, found in seen.items() if found} == {}


@pytest.mark.slow
def test_help_imports_neither_numpy_nor_pydantic():
    """They are half of its time, and no option needs them."""
    code = WATCH.replace('"torch", "transformers", "datasets", "accelerate"', '"torch", "numpy", "pydantic", "huggingface_hub"')
    done = subprocess.run([sys.executable, "-c", code, '[["--help"]]'], capture_output=True, text=True, check=False)
    assert json.loads(done.stderr.splitlines()[-1]) == {"--help": []}


# ---- JSON and exit codes


def test_json_of_every_command_is_all_there_is_on_stdout(capfd, checkpoints, data, half, tmp_path):
    source = checkpoints("mixtral")
    recipe = {"model": str(source), "device": "cpu", "plan": {"method": "random", "keep": 0.5, "out": str(tmp_path / "r.json")}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    flags = [flag for spec in data for flag in ("-d", spec)]
    found = {}
    for line in (
        ("calibrate", source, *flags, "-o", tmp_path / "stats", *SMALL),
        ("plan", source, "-m", "reap", "-k", "0.5", "-s", tmp_path / "stats", "-o", tmp_path / "plan.json"),
        ("apply", source, tmp_path / "plan.json", "-o", tmp_path / "out"),
        ("verify", source, tmp_path / "out", "--tokens", "64", "--device", "cpu"),
        ("evaluate", tmp_path / "out", "-r", source, *flags, "--seq-len", "16", "--device", "cpu"),
        ("compress", source, "-m", "reap", "-k", "4", *flags, "-o", tmp_path / "out2", *SMALL),
        ("inspect", source),
        ("lint", half),
        ("run", tmp_path / "recipe.yaml"),
    ):
        text = passed(capfd, *line, "--json")
        found[line[0]] = strict(text)
        assert isinstance(found[line[0]], dict)
        assert found[line[0]]["format"].startswith("expertsmith.")
        assert found[line[0]]["version"] >= 1
        if line[0] in (
            "apply",
            "evaluate",
            "compress",
            "inspect",
            "lint",
            "run",
        ):  # said by the command line, not by the result itself
            assert (found[line[0]].pop("format"), found[line[0]].pop("version")) == (f"expertsmith.{line[0]}", 1)
    assert found["calibrate"]["out"] == str(tmp_path / "stats")
    assert found["calibrate"]["data"]["tokens"] == load_statistics(tmp_path / "stats").tokens
    assert found["plan"] == json.loads((tmp_path / "plan.json").read_text())
    assert found["apply"]["out"] == str(tmp_path / "out")
    assert found["apply"]["summary"]["experts"] == [24, 12]
    assert found["verify"]["passed"] is True
    assert found["verify"] == json.loads((tmp_path / "out" / "expertsmith" / "verify.json").read_text())
    assert set(found["evaluate"]) == {"model", "reference", "domains", "mean"}
    assert set(found["compress"]) == {"out", "model", "plan", "notes", "verify", "quality", "lint", "seconds", "report"}
    assert set(found["compress"]["seconds"]) == {"calibrate", "plan", "apply", "verify", "evaluate"}
    assert found["inspect"] == json.loads(json.dumps(api.inspect(str(source))))
    assert set(found["lint"]) == {"model", "findings"}
    assert set(found["run"]) == {"plan"}


def test_quiet_leaves_stderr_empty(capfd, checkpoints, data, tmp_path):
    line = ["calibrate", checkpoints("mixtral"), "-d", data[0], "-o", tmp_path / "stats", *SMALL]
    assert run(capfd, *line, "-q")[2] == ""
    out, err = run(capfd, *line)[1:]
    assert "tokens" in err
    assert "a" in out


def test_lint_exits_1_where_an_engine_would_refuse(capsys, checkpoints):
    source = checkpoints("mixtral")
    assert run(capsys, "lint", source)[0] == 0
    code, out, _ = run(capsys, "lint", source, "--engine", "transformers", "--ep", "3")
    assert code == 1
    assert "8 experts do not divide" in out
    code, out, _ = run(capsys, "lint", source, "--engine", "transformers", "--ep", "3", "--json")
    assert code == 1
    assert {finding["level"] for finding in strict(out)["findings"]} == {"error"}


def damage(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_verify_exits_1_where_the_proof_fails(capsys, checkpoints, half, tmp_path):
    shutil.copytree(half, tmp_path / "broken")
    damage(tmp_path / "broken")
    line = ["verify", checkpoints("mixtral"), tmp_path / "broken", "--tokens", "64", "--device", "cpu", "-q"]
    code, out, _ = run(capsys, *line)
    assert code == 1
    assert "FAILED" in out
    code, out, _ = run(capsys, *line, "--json")
    assert code == 1
    assert strict(out)["wrong_tensors"] == ["model.norm.weight"]


def test_jobs_that_verify_exit_1_where_the_proof_fails(capsys, monkeypatch, checkpoints, tmp_path):
    source = checkpoints("mixtral")
    write = api.apply

    def write_and_damage(model, plan, out, **options):
        notes = write(model, plan, out, **options)
        damage(Path(out))
        return notes

    for place in ("recipe", "compress"):
        monkeypatch.setattr(f"expertsmith.verbs.{place}.apply", write_and_damage)
    recipe = {
        "model": str(source), "device": "cpu", "apply": {"out": str(tmp_path / "out")}, "verify": {"tokens": 64},
        "plan": {"method": "random", "keep": 0.5, "out": str(tmp_path / "p.json")},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, out, _ = run(capsys, "run", tmp_path / "recipe.yaml", "-q")
    assert code == 1
    assert "FAILED" in out
    code, out, _ = run(
        capsys, "compress", source, "-m", "random", "-k", "4", "-o", tmp_path / "two", "--device", "cpu", "-q", "--json"
    )
    assert code == 1
    assert strict(out)["verify"]["passed"] is False


@pytest.mark.parametrize(
    "line",
    [
        ["nonsense"],
        ["--nonsense"],
        ["inspect"],
        ["inspect", "here", "there"],
        ["inspect", "here", "--nonsense"],
        ["plan", "here", "-k", "0.5"],
        ["plan", "here", "-m", "reap", "-k"],
        ["calibrate", "here", "-o", "out", "--samples", "many"],
        ["lint", "here", "--tp", "1.5"],
    ],
)
def test_a_line_that_cannot_be_parsed_exits_2(capsys, line):
    code, out, err = run(capsys, *line)
    assert code == 2
    assert out == ""
    assert "Error" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "line", [["inspect", "/nowhere/at/all"], ["inspect", "not a model"], ["run", "/nowhere.yaml"], ["lint", "/nowhere"]]
)
def test_a_mistake_exits_2_with_one_line_and_no_output(capsys, line):
    code, out, err = run(capsys, *line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        ["inspect", "/nowhere/at/all"], ["inspect", "not a model"], ["run", "/nowhere.yaml"], ["lint", "/nowhere"],
        ["methods", "reep"], ["evaluate", "here"], ["plan", "demo", "-k", "4", "-o", "/nowhere/plan.json"],
    ],
)  # fmt: skip
def test_with_json_a_mistake_is_an_object_on_stdout_too(capsys, line):
    _, out, said = run(capsys, *line)
    assert out == ""
    code, out, err = run(capsys, *line, "--json")
    assert (code, err) == (2, said)
    found = strict(out)
    assert set(found) == {"format", "version", "error", "remedy"}
    assert (found["format"], found["version"]) == ("expertsmith.error", 1)
    assert found["error"] in err
    assert (found["remedy"] or "") in err


@pytest.mark.parametrize("rank", [0, 1])
def test_verbs_of_one_process_are_refused_under_torchrun(rank, capsys, monkeypatch):
    """By one message of all ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    code, out, err = run(capsys, "inspect", "demo", "--json")
    assert code == 2
    told = (
        "inspect runs as one process, but torchrun started 2",
        "run it without torchrun, which is for calibrate, plan, verify, evaluate, compare, convert, heal, or unset WORLD_SIZE",
    )
    assert err == ("" if rank else f"error: {told[0]}; {told[1]}\n")
    assert out == "" if rank else (strict(out)["error"], strict(out)["remedy"]) == told


def test_debug_can_stand_anywhere(capsys):
    from expertsmith.errors import UserError

    for line in (["--debug", "inspect", "/nowhere"], ["inspect", "--debug", "/nowhere"], ["inspect", "/nowhere", "--debug"]):
        with pytest.raises(UserError):
            run(capsys, *line)


def test_ctrl_c_exits_130(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "inspect", dataclasses.replace(VERBS["inspect"], function=interrupted))
    code, out, err = run(capsys, "inspect", "here")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def stop_at(monkeypatch, place: str, call: int) -> None:
    """Ctrl-C in the middle of a function's nth call."""
    module, _, name = place.rpartition(".")
    target = importlib.import_module(module)
    whole, calls = getattr(target, name), iter(range(1, 10**6))

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        return whole(*args, **kwargs)

    monkeypatch.setattr(target, name, interrupted)


def told(err: str) -> list[str]:
    """The command that goes on, from the last line of what Ctrl-C says."""
    assert "Traceback" not in err
    assert "interrupted; what is finished is kept in " in err
    return shlex.split(err.splitlines()[-1].removeprefix("to go on: "))


@pytest.mark.parametrize("verb", ["calibrate", "plan", "compress", "compare", "heal"])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(capsys, monkeypatch, checkpoints, half, data, tmp_path, verb):
    source, flags = checkpoints("mixtral"), [flag for spec in data for flag in ("-d", spec)]
    layers, out = "expertsmith.calibration.stats.save_layer", tmp_path / "the result"
    line, place, kept = {
        "calibrate": ([source, *flags], layers, out),
        "plan": ([source, "-m", "reap", "-k", "4", *flags], layers, tmp_path / "the result.work"),
        "compress": ([source, "-m", "reap", "-k", "4", *flags], layers, tmp_path / "the result.work"),
        "compare": ([source, "-m", "reap", "-k", "4", *flags, "-e", data[0]], layers, out),
        "heal": ([half, "-t", source, *flags], "expertsmith.healing.work.save_file", tmp_path / "the result.work"),
    }[verb]
    line = [verb, *map(str, line), "-o", str(out), *SMALL, "-q"]
    with monkeypatch.context() as patch:
        stop_at(patch, place, 3)
        code, text, err = run(capsys, *line, "--fresh")
    assert (code, text) == (130, "")
    assert str(kept) in err
    assert kept.exists()
    assert told(err) == ["expertsmith", *line]
    assert run(capsys, *line)[0] == 0


def test_ctrl_c_says_that_nothing_is_kept(capsys, monkeypatch, checkpoints, tmp_path):
    made = api.plan(checkpoints("mixtral"), "random", 4, out=tmp_path / "plan.json")
    assert made.layers
    stop_at(monkeypatch, "expertsmith.checkpoint.writer._write_shards", 1)
    code, out, err = run(capsys, "apply", checkpoints("mixtral"), tmp_path / "plan.json", "-o", tmp_path / "out", "-q")
    assert (code, out) == (130, "")
    assert err == "interrupted; nothing was kept, and no unfinished output is left\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_ctrl_c_in_a_recipe_names_what_its_sections_left(capsys, monkeypatch, checkpoints, data, tmp_path):
    recipe = {
        "model": str(checkpoints("mixtral")), "device": "cpu",
        "calibrate": {"data": data, "out": str(tmp_path / "stats"), "seq_len": 24, "pack": False},
        "plan": {"method": "reap", "keep": 0.5, "out": str(tmp_path / "p.json")},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    stop_at(monkeypatch, "expertsmith.calibration.stats.save_layer", 2)
    code, _, err = run(capsys, "run", tmp_path / "recipe.yaml", "-q")
    assert code == 130
    assert told(err) == ["expertsmith", "run", str(tmp_path / "recipe.yaml"), "-q"]
    assert f"kept in {tmp_path / 'stats'}\n" in err


def test_comparing_without_held_out_text(capsys, checkpoints, data, tmp_path):
    code, _, err = run(
        capsys, "compare", checkpoints("mixtral"), "-m", "reap", "-k", "4", "-d", data[0], "-o", tmp_path / "o", "-q"
    )
    assert code == 2
    assert err == "error: compare judges every plan on held-out text; pass --eval-data FILE\n"
    assert not (tmp_path / "o").exists()


def test_names_with_brackets_and_long_names_are_printed_as_they_are(capsys, monkeypatch, checkpoints, tmp_path):
    """Brackets are markup to the printer, and a path cut into lines cannot be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    source = tmp_path / "mixtral[bold]" / "[/v2]"
    shutil.copytree(checkpoints("mixtral"), source)
    assert "mixtral[bold]/[/v2]" in passed(capsys, "inspect", source).replace("\n", "").replace(" ", "")
    target = tmp_path / f"{'plan' * 20}[red] [/half].json"
    assert str(target) in passed(capsys, "plan", source, "-m", "random", "-k", "4", "-o", target, "-q")
    out = tmp_path / "out[dim][/x]"
    assert str(out) in passed(capsys, "apply", source, target, "-o", out, "-q")


# ---- what there is


def test_methods_and_architectures_list_every_record(capsys):
    found = strict(passed(capsys, "methods", "--json"))
    assert [row["name"] for row in found] == list(methods())
    assert all(
        row["title"]
        and row["paper"]
        and row["doc"]
        and row["cost"]
        and row["budgets"]
        and row["gives"] in ("saliency", "order", "choice", "neurons")
        for row in found
    )
    table = passed(capsys, "methods")
    for name, record in methods().items():
        assert re.search(rf"^{name}  ", table, re.MULTILINE)
        for option, default in record.options.items():
            assert f"{option}={default}" in table
    found = strict(passed(capsys, "architectures", "--json"))
    assert [row["model_type"] for row in found] == list(families())
    assert all(row["notes"] for row in found if row["status"] != "full")
    table = passed(capsys, "architectures")
    for name in families():
        assert f" {name} " in table
    supported = sum(record.status != "refused" for record in families().values())
    assert f"{supported} families supported" in table


@pytest.mark.parametrize("name", sorted(methods()))
def test_one_method_is_shown_whole(capsys, name):
    record = methods()[name]
    text = passed(capsys, "methods", name)
    words = " ".join(text.split())
    for said in (record.title, record.paper, record.doc, record.cost, record.limits, *record.budgets):
        assert " ".join(said.split()) in words
    for option, default in record.options.items():
        assert f"-O {option}={default}" in text
    found = strict(passed(capsys, "methods", name, "--json"))
    rows = strict(passed(capsys, "methods", "--json"))
    assert found.items() >= next(row for row in rows if row["name"] == name).items()


@pytest.mark.parametrize("name", families())
def test_one_family_is_shown(capsys, name):
    record = families()[name]
    text = passed(capsys, "architectures", name)
    assert record.title in text
    assert record.notes in text
    assert ("experts per token" in text) == record.supported
    found = strict(passed(capsys, "architectures", name, "--json"))
    assert (found["model_type"], found["router"], found["shared"]) == (name, record.router, record.shared)


def test_a_misspelt_name_gets_the_nearest_one(capsys):
    code, out, err = run(capsys, "methods", "reep")
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no method 'reep'; did you mean reap")
    code, out, err = run(capsys, "architectures", "mixtrl")
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no model family 'mixtrl'; did you mean mixtral")


@pytest.mark.slow
def test_the_package_runs_as_a_module(checkpoints, tmp_path):
    def module(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "expertsmith", *map(str, arguments)], capture_output=True, text=True, check=False
        )

    assert module("--version").stdout == f"expertsmith {__version__}\n"
    done = module("inspect", checkpoints("mixtral"), "--json")
    assert done.returncode == 0
    assert strict(done.stdout)["num_experts"] == 8
    assert done.stderr == ""
    failed = module("inspect", tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")


def test_two_families_of_one_layout_are_told_apart(capsys, tmp_path):
    """phimoe shares Mixtral's names on disk; config.json decides."""
    save_tiny("phimoe", tmp_path / "phi")
    assert strict(passed(capsys, "inspect", tmp_path / "phi", "--json"))["model_type"] == "phimoe"


def test_every_verb_that_resumes_says_where_it_works():
    places = {name: [place.name for place in verb.keeps({"out": Path("o")})] for name, verb in VERBS.items() if name != "run"}
    assert {name: held for name, held in places.items() if held} == {
        "calibrate": ["o"],
        "plan": ["o.work"],
        "compress": ["o.work"],
        "compare": ["o"],
        "evaluate": ["o"],
        "heal": ["o.work"],
        "convert": ["o.work", "o.dense"],
        "analyze": ["o"],
    }
    assert VERBS["evaluate"].keeps({"out": None}) == []


def test_help_has_what_is_needed_first_and_the_rest_in_panels(capsys):
    out = passed(capsys, "compress", "--help")
    places = [out.index(f"─ {title} ─") for title in ("Arguments", "Options", "Choice of experts", "Text", "Model and machine")]
    assert places[0] < places[1] < min(places[2:])
    first = out[places[1] : min(places[2:])]
    assert all(flag in first for flag in ("--method", "--keep", "--out", "--fit", "--data", "--eval-data"))
    assert not any(flag in first for flag in ("--seq-len", "--device", "--budget", "--json", "--allow-pickle"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["plan", "demo", "--bogus"], "No such option: --bogus"),
        (["compress"], "Missing argument 'MODEL'"),
        (["nothing"], "No such command 'nothing'"),
        (["calibrate", "demo", "-d", "x", "-o", "o", "--samples", "0"], "greater than or equal to 1"),
    ],
)
def test_what_the_parser_refuses_is_json_too(capsys, line, says):
    code, out, err = run(capsys, *line, "--json")
    assert code == 2
    assert says in err
    found = strict(out)
    assert (found["format"], found["version"]) == ("expertsmith.error", 1)
    assert says in found["error"]
    assert run(capsys, *line)[:2] == (2, "")
