"""The verbs as Python functions: what Tab shows, single values where lists are wanted, results under the names of the JSON."""

from __future__ import annotations

import ast
import math
import re
import rlcompleter
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Unpack

import pytest

import expertsmith
from conftest import CALIBRATION
from expertsmith import api
from expertsmith.errors import UserError
from expertsmith.verbs.definition import VERBS, Opt, filled
from expertsmith.verbs.options import Opened


def test_tab_shows_every_verb():
    completer = rlcompleter.Completer({"expertsmith": expertsmith})
    shown = {re.sub(r"\(.*", "", name) for name in completer.attr_matches("expertsmith.")}
    wanted = {*expertsmith.__all__} - {"__version__"}
    assert {f"expertsmith.{name}" for name in wanted} <= shown
    assert wanted <= {*dir(expertsmith)}
    assert wanted | {"methods", "recipes"} == {*api.__all__}  # those two are also rooms of the package
    assert all(callable(getattr(expertsmith, name)) for name in wanted)


def test_editors_see_what_python_sees():
    """They read the source and run nothing: the names that are imported for them are those of __all__."""
    tree = ast.parse(Path(expertsmith.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "expertsmith.api"
        for alias in node.names
    }
    assert seen == {*expertsmith.__all__} - {"__version__"}


def test_the_names_cost_no_import():
    code = "import sys, expertsmith; dir(expertsmith); print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'typer', 'expertsmith.api'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- lists


@pytest.mark.parametrize(
    ("given", "list_of"),
    [("a.jsonl", ["a.jsonl"]), (Path("x"), ["x"]), (["a", "b"], ["a", "b"]), (("a",), ["a"]), ([Path("x")], ["x"]), (None, []), ("", [""])],
)  # fmt: skip
def test_a_single_value_is_a_list_of_one(given, list_of):
    @filled
    def verb(
        model: str, first: Annotated[Sequence[str], Opt("")], second: Sequence[str] = (), **given: Unpack[Opened]
    ) -> object:
        return first, second

    assert verb("m", given) == (list_of, [])
    assert verb("m", first=(), second=given) == ([], list_of)


def test_numbers_and_pairs():
    @filled
    def verb(keep: Sequence[float | int | str], options: Mapping[str, object] | None = None) -> object:
        return keep, options

    assert verb(0.5) == ([0.5], None)
    assert verb([0.5, 4], "seed=1") == ([0.5, 4], {"seed": "1"})
    assert verb(4, ["a=1", "b=x=y"]) == ([4], {"a": "1", "b": "x=y"})
    assert verb("50%", {"a": 1}) == (["50%"], {"a": 1})
    for options in ("seed", "=1", 7, [None]):
        with pytest.raises(UserError):
            verb(4, options)


@pytest.mark.parametrize("wrong", [7, 0.5, [None], [["a"]], [b"a"]])
def test_what_is_no_text_is_refused(checkpoints, tmp_path, wrong):
    with pytest.raises(UserError, match=r"data has .*, but a list of texts is wanted"):
        api.calibrate(checkpoints("mixtral"), wrong, tmp_path / "out")


def test_every_verb_with_a_list_takes_one(monkeypatch):
    """No verb is made in another way."""
    for name, verb in VERBS.items():
        assert hasattr(verb.function, "__wrapped__"), name


def test_of_the_verbs_themselves(checkpoints, data, tmp_path):
    model, options = checkpoints("mixtral"), {**CALIBRATION, "memory": "resident"}
    one = api.calibrate(model, data[0], tmp_path / "one", **options)
    assert one.tokens == api.calibrate(model, [data[0]], tmp_path / "list", **options).tokens
    made = api.plan(model, "reap", 4, stats=tmp_path / "one", domains="a")
    assert made.calibration.tokens.keys() == {"a"}
    found = api.compare(model, "frequency", 4, data[0], data[0], tmp_path / "compared", **options)
    assert {row["method"] for group in found["groups"] for row in group["rows"]} >= {"frequency"}


# ---- results


def test_quality_has_the_numbers_of_its_json(checkpoints, data, tmp_path):
    model = checkpoints("mixtral")
    api.apply(model, api.plan(model, "random", 4), tmp_path / "half")
    judged = {"seq_len": 16, "device": "cpu"}
    quality = api.evaluate(tmp_path / "half", data, reference=model, **judged)
    for name, row in quality.to_json()["domains"].items():
        assert {key: getattr(quality.domains[name], key) for key in row} == row
        assert quality.domains[name].agree == row["top1_agreement"]
        assert 0 < row["loss"] < 10
        assert 0 <= row["top1_agreement"] <= 1
        assert quality.domains[name].loss_sum == pytest.approx(row["loss"] * row["tokens"])
    alone = api.evaluate(tmp_path / "half", data, **judged)
    for name, row in alone.to_json()["domains"].items():
        assert row.keys() == {"tokens", "loss", "loss_se", "perplexity"}
        assert getattr(alone.domains[name], "loss") == row["loss"]  # noqa: B009
        assert all(math.isnan(getattr(alone.domains[name], key)) for key in ("kl", "agree", "esap", "reference_loss"))
