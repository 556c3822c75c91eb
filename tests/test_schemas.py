"""The schema files of docs/schemas describe what is written, and refuse what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest

from conftest import CALIBRATION
from expertsmith import api
from expertsmith.calibration.stats import load_statistics
from expertsmith.errors import UserError
from expertsmith.planning.plan import load_plan

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"


def validator(name):
    schema = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def stats(checkpoints, data, tmp_path_factory):
    return api.calibrate(checkpoints("mixtral"), data, tmp_path_factory.mktemp("schema") / "stats", **CALIBRATION)


@pytest.mark.parametrize("method", ["reap", "m_smoe", "moeits"])
def test_plans_are_as_the_schema_says(method, checkpoints, stats, tmp_path):
    api.plan(checkpoints("mixtral"), method, 0.5, stats=stats, out=tmp_path / "plan.json")
    validator("plan.v1.json").validate(json.loads((tmp_path / "plan.json").read_text()))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["version"], 2),
        (["layers"], "x"),
        (["layers", 0, "keep"], ["a"]),
        (["extra"], 1),
        (["method"], None),
        (["mtp"], "some"),
    ],
)
def test_plans_that_the_schema_refuses_are_refused(place, value, checkpoints, stats, tmp_path):
    made = api.plan(checkpoints("mixtral"), "reap", 0.5, stats=stats).to_json()
    wrong = changed(made, place, value)
    assert not validator("plan.v1.json").is_valid(wrong)
    (tmp_path / "plan.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError):
        load_plan(tmp_path / "plan.json")


def test_statistics_are_as_the_schema_says(stats):
    validator("statistics.v1.json").validate(stats.header)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["version"], 2),
        (["format"], "x"),
        (["model", "fingerprint"], 3),
        (["layers"], []),
        (["layers"], [0, 0]),
        (["layers"], [-1]),
        (["data", "tokens", "a"], 1.5),
        (["data", "packed", "a"], "no"),
        (["data", "sequence_lengths", "a"], 3),
        (["data", "sequences"], {}),
    ],
)
def test_statistics_that_the_schema_refuses_are_refused(place, value, stats, tmp_path):
    wrong = changed(stats.header, place, value)
    assert not validator("statistics.v1.json").is_valid(wrong)
    (tmp_path / "stats.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError):
        load_statistics(tmp_path)


def changed(found, place, value):
    made = copy.deepcopy(dict(found))
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return made
