"""Healing by gradients, within a layer and through the whole model, and the rule that says how much a layer is trained."""

from __future__ import annotations

import json

import pytest

from conftest import DEVICE, run_cli
from expertsmith import api
from expertsmith.arch import families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.healing.options import parse_healer
from to_heal import CORE, SHAPE, differing, same_tensors

# ---- gradients


@pytest.mark.parametrize("model_type", CORE[:6])
def test_layer_local_in_families(model_type, checkpoints, brief, tmp_path):
    """It starts from least squares and is never worse; gate, up and router change too."""
    api.apply(checkpoints(model_type), api.plan(checkpoints(model_type), "random", 0.5), tmp_path / "half")
    options = {"steps": 12, "step_tokens": 100, "learning_rate": 0.003}
    report = api.heal(
        tmp_path / "half", checkpoints(model_type), brief, tmp_path / "healed", method="layer_local", options=options, **SHAPE
    )
    rows = report["layers"]
    assert all(row["error_after"] <= row["error_least_squares"] <= row["error_before"] for row in rows)
    assert any(row["error_after"] < 0.999 * row["error_least_squares"] for row in rows)
    record = families()[model_type]
    inventory = take_inventory(open_checkpoint(tmp_path / "half"))
    roles = {claim.info.name: claim for claim in inventory.claims}
    changed = differing(tmp_path / "half", tmp_path / "healed")
    assert all(roles[name].kind in ("expert", "stacked") for name in changed)
    assert any(not roles[name].routed for name in changed)
    assert any((record.layout_of(roles[name].rest) or "down") not in ("down", "down_t") for name in changed)


@pytest.mark.parametrize("model_type", CORE)
def test_router_changes_router_rows_only(model_type, checkpoints, brief, tmp_path):
    """Experts stay byte for byte, and so do biases that act on the selection only."""
    api.apply(checkpoints(model_type), api.plan(checkpoints(model_type), "random", 0.5), tmp_path / "half")
    options = {"step_tokens": 100, "learning_rate": 0.01, "epochs": 3}
    report = api.heal(
        tmp_path / "half", checkpoints(model_type), brief, tmp_path / "healed", method="router", options=options, **SHAPE
    )
    inventory = take_inventory(open_checkpoint(tmp_path / "half"))
    roles = {claim.info.name: claim for claim in inventory.claims}
    changed = differing(tmp_path / "half", tmp_path / "healed")
    assert changed or report["training"]["best_step"] == 0
    assert all(roles[name].kind == "stacked" and not roles[name].routed for name in changed)
    assert not any("correction_bias" in name for name in changed)
    assert report["held_out"]["after"]["mean"]["kl"] <= report["held_out"]["before"]["mean"]["kl"]


def test_router_learns(half, checkpoints, brief, tmp_path):
    report = api.heal(
        half,
        checkpoints("mixtral"),
        brief,
        tmp_path / "healed",
        method="router",
        options={"step_tokens": 100, "epochs": 6},
        **SHAPE,
    )
    assert set(report["training"]["trials"]) == {"0.01", "0.001", "0.0001"}
    curve = [loss for _, loss in report["training"]["held_out_loss"]]
    assert min(curve) < 0.995 * curve[0]
    assert report["training"]["tokens_seen"] > 0


def test_the_distillation_loss_is_that_of_the_whole_vocabulary(half, checkpoints, brief, tmp_path):
    """The loss in parts, at the start, is the KL that evaluation measures in one go."""
    report = api.heal(
        half,
        checkpoints("mixtral"),
        brief,
        tmp_path / "healed",
        method="router",
        options={"learning_rate": 1e-9, "step_tokens": 400},
        **SHAPE,
    )
    rows = report["held_out"]["before"]["domains"].values()
    kl = sum(row["kl"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert report["training"]["held_out_loss"][0][1] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe"])
def test_lora_is_merged(model_type, checkpoints, brief, tmp_path):
    pytest.importorskip("peft")
    api.apply(checkpoints(model_type), api.plan(checkpoints(model_type), "random", 0.5), tmp_path / "half")
    options = {"step_tokens": 100, "epochs": 4, "rank": 4, "targets": "attention,experts,router"}
    report = api.heal(
        tmp_path / "half", checkpoints(model_type), brief, tmp_path / "healed", method="lora", options=options, **SHAPE
    )
    assert report["held_out"]["after"]["mean"]["kl"] < report["held_out"]["before"]["mean"]["kl"]
    changed = differing(tmp_path / "half", tmp_path / "healed")
    inventory = take_inventory(open_checkpoint(tmp_path / "half"))
    roles = {claim.info.name: claim for claim in inventory.claims}
    assert {roles[name].kind for name in changed} >= {"stacked", "other"}
    quality = api.evaluate(tmp_path / "healed", brief, reference=checkpoints(model_type), device=DEVICE, seq_len=24).to_json()
    before = api.evaluate(tmp_path / "half", brief, reference=checkpoints(model_type), device=DEVICE, seq_len=24).to_json()
    assert quality["mean"]["kl"] < before["mean"]["kl"]


def test_lora_on_experts_that_peft_cannot_reach(checkpoints, brief, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="leave experts out"):
        api.heal(checkpoints("dbrx"), checkpoints("dbrx"), brief, tmp_path / "out", method="lora", **SHAPE)


def test_the_preset_of_moeits():
    """Values of the published recipe; what is given beside the preset wins."""
    chosen = parse_healer("lora", {"preset": "moeits", "rank": 8})
    assert (chosen.rank, chosen.alpha, chosen.dropout, chosen.learning_rate, chosen.warmup) == (8, 16, 0.1, 2e-4, 0.05)
    assert (chosen.kl, chosen.text, chosen.neftune, chosen.cosine, chosen.weight_decay) == (0, 1, 5, True, 0.05)


def test_the_preset_runs(half, checkpoints, brief, tmp_path):
    pytest.importorskip("peft")
    options = {"preset": "moeits", "rank": 2, "step_tokens": 200, "learning_rate": 0.003}
    report = api.heal(half, checkpoints("mixtral"), brief, tmp_path / "healed", method="lora", options=options, **SHAPE)
    curve = [loss for _, loss in report["training"]["held_out_loss"]]
    assert curve[0] == pytest.approx(_text_loss(report["held_out"]["before"]), rel=1e-4)


def _text_loss(quality: dict) -> float:
    rows = quality["domains"].values()
    return sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)


# ---- the rule


def test_heal_says_what_the_rule_chose(half, checkpoints, brief, tmp_path, capsys):
    """In the terminal, in heal.json and on the card."""
    common = ["heal", half, "-t", checkpoints("mixtral"), "-m", "layer_local", "--seq-len", 24, "--no-pack", "--device", DEVICE]
    code, out, err = run_cli(capsys, *common, "-d", brief[0], "-O", "steps=3", "-o", tmp_path / "given")
    assert code == 0, err
    report = json.loads((tmp_path / "given/expertsmith/heal.json").read_text())
    (sentence,) = report["rule"]
    assert sentence.startswith("decoder layers 0, 1, 2: 9,344 weights of router and experts, ")
    assert sentence.endswith("(steps given)")
    assert ": 3 steps of " in sentence
    assert sentence in " ".join(out.split())
    assert f"- **Trained**: {sentence}" in (tmp_path / "given/README.md").read_text()
    much = report["layers"][0]["refined"]["amount"]
    assert (much["steps"], much["given"]) == (3, ["steps"])
    assert much["step_tokens"] == sum(report["data"]["tokens"].values()) - report["data"]["held_out_tokens"]  # fewer than 2048


def test_with_too_few_tokens_nothing_but_down_projections_is_trained(half, checkpoints, tmp_path):
    """16 tokens for 2304 weights an expert; the result is that of least squares."""
    (tmp_path / "few.jsonl").write_text(
        "".join(json.dumps({"input_ids": list(range(4 * i, 4 * i + 8))}) + "\n" for i in range(4))
    )
    made = {}
    for method in ("least_squares", "layer_local"):
        data = [f"a={tmp_path / 'few.jsonl'}"]
        made[method] = api.heal(half, checkpoints("mixtral"), data, tmp_path / method, method=method, **SHAPE)
    (sentence,) = made["layer_local"]["rule"]
    assert "fewer than 1: only down projections are trained, in closed form" in sentence
    assert same_tensors(tmp_path / "least_squares", tmp_path / "layer_local")
    assert "changed the down projections" in (tmp_path / "layer_local/README.md").read_text()


def test_a_smaller_rate_where_the_first_lowers_no_error(half, checkpoints, brief, tmp_path, monkeypatch):
    """Steps of ten times the weights' size do harm."""
    from expertsmith.healing import refine

    monkeypatch.setattr(refine, "RATES", (10.0, 0.01))
    options = {"steps": 10, "step_tokens": 64}
    report = api.heal(half, checkpoints("mixtral"), brief, tmp_path / "out", method="layer_local", options=options, **SHAPE)
    for row in report["layers"]:
        assert row["refined"]["learning_rate"] == 0.01
        assert row["refined"]["error_after"] <= row["refined"]["error_before"]
    assert any(row["refined"]["best_step"] for row in report["layers"])
