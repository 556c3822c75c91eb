"""Counts of config.json that are lists with one number a layer, as Hunyuan has them: equal ones are one number, others each layer's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import expertsmith
from conftest import DEVICE, logits, run_cli
from expertsmith import api
from expertsmith.arch import config_first, families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory

TYPES = ["hunyuan_v1_moe", "mixtral", "qwen3_moe"]  # the first one's config class takes a list of top_k, the others none at all


def listed(source: Path, target: Path, model_type: str, experts: Any, top_k: Any) -> Path:
    """A copy of a checkpoint with other counts in its config.json; what the family has for both is replaced."""
    shutil.copytree(source, target)
    record, config = families()[model_type], json.loads((target / "config.json").read_text())
    for keys, value in ((record.experts_key, experts), (record.top_k_key, top_k)):
        found = config_first(config, keys)
        assert found is not None
        config[found[0]] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


def counts_in(folder: Path, model_type: str) -> tuple[Any, Any]:
    record, config = families()[model_type], json.loads((folder / "config.json").read_text())
    return tuple((config_first(config, keys) or ("", None))[1] for keys in (record.experts_key, record.top_k_key))


def planned(inventory: Inventory, keep: dict[int, list[int]]) -> Any:
    plan = api.plan(inventory, "random", 1.0)
    return plan.model_copy(update={"layers": [e.model_copy(update={"keep": keep[e.layer]}) for e in plan.layers]})


@pytest.mark.parametrize("model_type", TYPES)
def test_equal_numbers_are_one(model_type: str, checkpoints: Any, tmp_path: Path, capsys: Any) -> None:
    """Everything is as with the number itself, and the result has lists too."""
    plain = Path(checkpoints(model_type))
    source = listed(plain, tmp_path / "source", model_type, [8] * 3, [2] * 3)
    inventory = take_inventory(open_checkpoint(source))
    usual = take_inventory(open_checkpoint(plain))
    assert (inventory.num_experts, inventory.top_k, inventory.overrides, inventory.chosen) == (8, 2, {}, {})
    assert (inventory.rules, inventory.active_parameters) == (usual.rules, usual.active_parameters)
    assert {**api.inspect(source), "model": ""} == {**api.inspect(plain), "model": ""}
    keep = {layer: [1, 4, 6] for layer in inventory.layers}
    api.apply(source, planned(inventory, keep), tmp_path / "out")
    api.apply(plain, planned(usual, keep), tmp_path / "usual")
    assert counts_in(tmp_path / "out", model_type) == ([3] * 3, [2] * 3)
    assert not list((tmp_path / "out").glob("*.py"))
    verdict = api.verify(source, tmp_path / "out", tokens=128, device=DEVICE)
    assert verdict.passed, verdict
    ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = expertsmith.load(tmp_path / "out")(ids).logits.float()
    assert torch.equal(found, logits(tmp_path / "usual"))
    assert run_cli(capsys, "lint", tmp_path / "out", "--engine", "transformers")[0] == 0


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("model_type", TYPES)
def test_layers_of_their_own(model_type: str, memory: str, checkpoints: Any, tmp_path: Path) -> None:
    """Other top_k and, after a plan that differs from layer to layer, other numbers of experts: a list stays a list, and says them."""
    source = listed(Path(checkpoints(model_type)), tmp_path / "source", model_type, [8] * 3, [1, 3, 2])
    inventory = take_inventory(open_checkpoint(source))
    layers = inventory.layers
    top_k = {layer: (1, 3, 2)[layer] for layer in layers}
    assert {layer: inventory.rules_of(layer).least for layer in layers} == top_k
    keep = {layer: list(range(8))[-top_k[layer] - 1 :] for layer in layers}
    out = tmp_path / "out"
    api.apply(source, planned(inventory, keep), out)
    written = take_inventory(open_checkpoint(out))
    assert written.counts == {layer: top_k[layer] + 1 for layer in layers}
    assert counts_in(out, model_type)[0] == [written.counts.get(layer, max(written.counts.values())) for layer in range(3)]
    assert counts_in(out, model_type)[1] == [1, 3, 2]
    verdict = api.verify(source, out, tokens=128, device=DEVICE, memory=memory)
    assert verdict.passed, verdict
    # a plan for the result, in which layers have numbers of their own, and its proof
    again = {layer: list(range(top_k[layer])) for layer in layers}
    api.apply(out, planned(written, again), tmp_path / "less")
    assert api.verify(out, tmp_path / "less", tokens=128, device=DEVICE, memory=memory).passed
    with pytest.raises(UserError, match=r"keeps 1 of 4 experts, but the router needs 3 \(top_k=3\)"):
        api.apply(out, planned(written, {**again, 1: [0]}), tmp_path / "refused")


def test_active_parameters_count_each_layers_own(checkpoints: Any, tmp_path: Path) -> None:
    plain = take_inventory(open_checkpoint(checkpoints("mixtral")))
    source = listed(Path(checkpoints("mixtral")), tmp_path / "source", "mixtral", 8, [1, 3, 2])
    assert take_inventory(open_checkpoint(source)).active_parameters == plain.active_parameters  # 1 + 3 + 2 = 2 + 2 + 2


@pytest.mark.parametrize(
    ("experts", "top_k", "message"),
    [
        ([8, 8], [2, 1], r"num_experts_per_tok has 2 different numbers for 3 decoder layers"),
        ([8, 8, "8"], 2, r"num_local_experts is \[8, 8, '8'\], but it must have one positive number per decoder layer"),
        ([], 2, r"num_local_experts is \[\], but"),
        (8, [2, 2, -1], r"num_experts_per_tok is \[2, 2, -1\]"),
        ([8, 8, 4], 2, r"(does not fit|lacks)"),
    ],
)
def test_bad_lists(experts: Any, top_k: Any, message: str, checkpoints: Any, tmp_path: Path) -> None:
    source = listed(Path(checkpoints("mixtral")), tmp_path / "source", "mixtral", experts, top_k)
    with pytest.raises(UserError, match=message):
        take_inventory(open_checkpoint(source))


def test_a_list_of_any_length_with_one_number(checkpoints: Any, tmp_path: Path) -> None:
    """It is written back with its length; different numbers do not fit into it."""
    source = listed(Path(checkpoints("mixtral")), tmp_path / "source", "mixtral", [8, 8], 2)
    inventory = take_inventory(open_checkpoint(source))
    api.apply(source, planned(inventory, {layer: [0, 3, 5] for layer in inventory.layers}), tmp_path / "out")
    assert counts_in(tmp_path / "out", "mixtral")[0] == [3, 3]
    with pytest.raises(UserError, match=r"a list of 2 expert counts, with no entry for layer 2"):
        api.apply(source, planned(inventory, {0: [0, 1], 1: [0, 1, 2], 2: [0, 1]}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
