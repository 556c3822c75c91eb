"""Healing: golden checks of the method, every family, resume, bad input, the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SUPPORTED, run_cli, save_tiny
from expertsmith import api
from expertsmith.arch import families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.inventory import take_inventory
from expertsmith.weights import layout_of

CORE = """mixtral qwen2_moe qwen3_moe olmoe deepseek_v2 deepseek_v3 glm4_moe ernie4_5_moe gpt_oss granitemoe phimoe minimax dbrx
    llama4_text longcat_flash nemotron_h gemma4_text""".split()
EVERY = pytest.mark.parametrize("model_type", SUPPORTED)
SHAPE = {"seq_len": 24, "pack": False, "batch_tokens": 72, "device": "cpu"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """Enough tokens for the tiny models: two domains of twelve sequences each."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(7)
    for domain in ("a", "b"):
        rows = [torch.randint(3, 120, (24 - 5 * (i % 3),), generator=generator).tolist() for i in range(12)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return [f"a={folder / 'a.jsonl'}", f"b={folder / 'b.jsonl'}"]


def same_tensors(a, b) -> bool:
    mine, theirs = open_checkpoint(a), open_checkpoint(b)
    assert mine.tensors.keys() == theirs.tensors.keys()
    return all(torch.equal(mine.read(name), theirs.read(name)) for name in mine.tensors)


def half_of(model, out) -> None:
    plan = api.plan(model, "random", 0.5)
    api.apply(model, plan, out)


@pytest.mark.parametrize("model_type", CORE)
def test_half(model_type, checkpoints, texts, tmp_path):
    """Half of the experts gone: every layer's held-out error falls or stays, and only down projections change."""
    half_of(checkpoints(model_type), tmp_path / "half")
    report = api.heal(tmp_path / "half", checkpoints(model_type), texts, tmp_path / "healed", **SHAPE)
    assert all(row["error_after"] <= row["error_before"] for row in report["layers"])
    assert any(row["error_after"] < 0.995 * row["error_before"] for row in report["layers"])
    for row in report["layers"]:
        assert all(b <= a * (1 + 1e-6) for a, b in zip(row["sweeps"], row["sweeps"][1:], strict=False))
    before, after = open_checkpoint(tmp_path / "half"), open_checkpoint(tmp_path / "healed")
    assert {name: (i.dtype, i.shape) for name, i in before.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in after.tensors.items()
    }
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    assert bool(changed) == report["accepted"]
    record = families()[model_type]
    layouts = {record.layout_of(record.locate(name)[1]) for name in changed}
    assert layouts <= {"down", "down_t"}


@pytest.mark.parametrize("model_type", CORE)
def test_nothing_removed_changes_nothing(model_type, checkpoints, texts, tmp_path):
    api.heal(checkpoints(model_type), checkpoints(model_type), texts[:1], tmp_path / "out", **SHAPE)
    assert same_tensors(checkpoints(model_type), tmp_path / "out")


def shaken(model, out, amount: float = 0.2) -> None:
    """The same model with noise on the down projections of its routed experts."""
    inventory = take_inventory(open_checkpoint(model))
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(5)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for claim in inventory.claims:
            if claim.routed and layout_of(claim, inventory) in ("down", "down_t") and claim.info.name in tensors:
                old = tensors[claim.info.name]
                tensors[claim.info.name] = old + amount * old.std() * torch.randn(old.shape, generator=generator)
        save_file(tensors, file, metadata={"format": "pt"})


@EVERY
def test_planted_weights_are_found(model_type, checkpoints, texts, tmp_path):
    """With all experts kept and more tokens than neurons there is an exact solution: the original's down projections."""
    shaken(checkpoints(model_type), tmp_path / "shaken")
    report = api.heal(tmp_path / "shaken", checkpoints(model_type), texts, tmp_path / "healed", options={"sweeps": 8}, **SHAPE)
    print(
        model_type,
        [round(row["error_after"] / row["error_before"], 6) for row in report["layers"]],
        report["held_out"]["after"]["mean"]["kl"] / report["held_out"]["before"]["mean"]["kl"],
    )
