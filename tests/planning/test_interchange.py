"""Choices of experts in other tools' formats, to and from plans."""

from __future__ import annotations

import json

import pytest

from conftest import run_cli, save_tiny
from expertsmith import api
from expertsmith.errors import UserError
from expertsmith.planning.interchange import FORMATS, export
from expertsmith.planning.plan import LayerPlan, Merge, Method, Plan, Source


@pytest.fixture(scope="module")
def model(checkpoints):
    return checkpoints("mixtral")  # 3 layers of 8 experts, top-2


@pytest.fixture
def plan(model):
    return api.plan(model, "random", 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_there_and_back(kind, model, plan, tmp_path):
    api.export(plan, kind, tmp_path / "choice")
    back = api.plan_from(model, tmp_path / "choice", 3 if kind == "ordered" else None, out=tmp_path / "plan.json")
    assert back.kept == plan.kept
    assert back.summary == plan.summary
    assert api.apply(model, tmp_path / "plan.json", tmp_path / "out") == []


def by_hand(layers: list[LayerPlan]) -> Plan:
    return Plan(method=Method(name="by_hand"), model=Source(model_type="mixtral", fingerprint="sha256:0"), layers=layers)


def test_what_is_written():
    """Kept experts first, each part by falling saliency; a row of the mask a layer."""
    first = LayerPlan(layer=1, num_experts=4, keep=[0, 3], saliency=[0.5, 0.1, 0.2, 0.9])
    made = by_hand([first, LayerPlan(layer=2, num_experts=4, keep=[1, 2])])
    assert [json.loads(line) for line in export(made, "ordered").splitlines()] == [{"1": [3, 0, 2, 1]}, {"2": [1, 2, 0, 3]}]
    assert json.loads(export(made, "mask")) == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert json.loads(export(made, "retained")) == {"1": [0, 3], "2": [1, 2]}


def test_what_others_write(model, tmp_path):
    """Floats in masks, module paths as layers, lists in the order of the layers, rows in any order."""
    rows = [[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]] * 3
    (tmp_path / "mask.json").write_text(json.dumps(rows))
    (tmp_path / "named.json").write_text(json.dumps({f"model.layers.{i}.block_sparse_moe": [7, 0, 2] for i in (2, 0, 1)}))
    (tmp_path / "lists.json").write_text(json.dumps([[7, 0, 2]] * 3))
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({str(i): [7, 2, 0]}) + "\n" for i in range(3)))
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({str(i): [7, 2, 0, 1, 3, 4, 5, 6]}) for i in range(3)))
    for name, keep in (
        ("mask.json", None),
        ("named.json", None),
        ("lists.json", None),
        ("short.jsonl", None),
        ("long.jsonl", "37.5%"),
    ):
        assert set(map(tuple, api.plan_from(model, tmp_path / name, keep).kept.values())) == {(0, 2, 7)}, name


GOOD = [0, 2, 7]


@pytest.mark.parametrize(
    ("text", "keep", "message"),
    [
        ('{"0": [0, 2], "1": [0, 2]}', None, "lacks layer 2"),
        ('{"0": [0, 2], "1": [0, 2], "2": [0, 2], "3": [0, 2]}', None, "names layer 3"),
        ('{"0": [0, 8], "1": [0, 2], "2": [0, 2]}', None, "layer 0 names expert 8, but the ids run from 0 to 7"),
        ('{"0": [0, 2], "1": [2, 2], "2": [0, 2]}', None, "layer 1 names expert 2 twice"),
        ('{"0": [0, 2], "1": [2], "2": [0, 2]}', None, "layer 1 would keep 1 of 8 experts"),
        ('{"0": [0, 2], "1": "all", "2": [0, 2]}', None, "layer 1 is not a list"),
        ('{"first": [0, 2]}', None, "'first' is not a layer"),
        ("[[0, 2], [0, 2]]", None, "2 rows, but"),
        ("[1, 2, 3]", None, "neither a list of lists"),
        ("[[0,0,0,0,0,0,0,0],[1,1,0,0,0,0,0,0],[1,1,0,0,0,0,0,0]]", None, "keeps no expert"),
        ("[[1,1,0,0,0,0,0],[1,1,0,0,0,0,0],[1,1,0,0,0,0,0]]", None, "names expert 1 twice"),
        ('{"0": [0, 2]}\n{"1": [0, 2]', None, "is not JSON"),
        ('{"0": [0, 2]}\n{"0": [0, 2]}', None, "layer 0 twice"),
        ('{"0": [0, 2]}\n[1]', None, "a line must be layer"),
        ("\n".join(json.dumps({str(i): list(range(8))}) for i in range(3)), None, "pass --keep to set how many are kept"),
        ("\n".join(json.dumps({str(i): [0, 1, 2]}) for i in range(3)), 4, "lists 3 experts, but 4 are to be kept"),
        ('{"0": [0, 2], "1": [0, 2], "2": [0, 2]}', 2, "leave --keep out"),
        ('{"format": "expertsmith.plan"}', None, "is a plan already"),
    ],
)
def test_files_that_do_not_fit(text, keep, message, model, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError) as error:
        api.plan_from(model, tmp_path / "file", keep)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Three layers of two experts, of which a token uses one."""
    return save_tiny("mixtral", tmp_path_factory.mktemp("pairs") / "model", num_local_experts=2, num_experts_per_tok=1)


@pytest.mark.parametrize("rows", [[[0, 1]] * 3, [[1, 0], [0, 1], [0, 1]]])
def test_rows_that_are_masks_and_ids_are_refused(rows, pairs, tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(rows))
    with pytest.raises(
        UserError, match=r"masks or lists of expert ids: layer 0 has \[., .\] of 2 experts, and no other layer decides"
    ):
        api.plan_from(pairs, tmp_path / "file.json")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("[[true, false], [false, true], [false, true]]", [[0], [1], [1]]),  # the remedy
        ("[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]", [[0], [1], [0]]),
        ("[[0, 1], [1, 1], [1, 0]]", [[1], [0, 1], [0]]),  # the second is no list of ids
        ("[[0, 1], [1], [1, 0]]", [[0, 1], [1], [0, 1]]),  # the second is no mask
    ],
)
def test_another_layer_decides(text, kept, pairs, tmp_path):
    (tmp_path / "file.json").write_text(text)
    assert list(api.plan_from(pairs, tmp_path / "file.json").kept.values()) == kept


def test_missing_files(model, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        api.plan_from(model, tmp_path / "nothing.json")
    with pytest.raises(UserError, match="not a text file"):
        api.plan_from(model, tmp_path)


def test_unequal_expert_groups(checkpoints, tmp_path):
    """Layers whose router has expert_groups have to lose the same number from each."""
    (tmp_path / "file").write_text(json.dumps({"1": [0, 1, 2, 4], "2": [0, 1, 4, 5]}))
    with pytest.raises(UserError, match="expert_groups"):
        api.plan_from(checkpoints("deepseek_v3"), tmp_path / "file")
    assert api.plan_from(checkpoints("deepseek_v3"), tmp_path / "file", router_groups="flatten").router_groups == "flatten"


def test_what_a_format_cannot_hold():
    merge = Merge(into=0, **{"from": [0, 1]}, weights=[0.5, 0.5])
    made = by_hand([LayerPlan(layer=0, num_experts=4, keep=[0, 2], merge=[merge])])
    with pytest.raises(UserError, match="merges experts"):
        export(made, "mask")
    with pytest.raises(UserError, match="did you mean mask"):
        export(made, "masks")


def test_commands(model, plan, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    plan.save(tmp_path / "plan.json")
    code, _, err = run_cli(capsys, "export", tmp_path / "plan.json", "-f", "ordered", "-o", tmp_path / "list.jsonl")
    assert code == 0, err
    code, out, err = run_cli(
        capsys, "plan", model, "--from", tmp_path / "list.jsonl", "-k", 3, "-o", tmp_path / "again.json", "--json"
    )
    assert code == 0, err
    assert [row["keep"] for row in json.loads(out)["layers"]] == list(plan.kept.values())
    for arguments in ([], ["-m", "random", "--from", tmp_path / "list.jsonl"]):
        code, _, err = run_cli(capsys, "plan", model, *arguments, "-k", 3)
        assert code == 2
        assert "--method NAME or --from FILE" in err
