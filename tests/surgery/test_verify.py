"""`verify` where rounding adds up or changes a choice of experts, and where the output is at fault."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import DEVICE, random_model
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import load_model
from expertsmith.experts.inventory import take_inventory
from expertsmith.surgery import verify as verifying
from expertsmith.surgery.mask import masked

NOISE = (
    5e-5  # relative, of what a layer passes on: less than `verify` allows, but it adds up, and some tokens choose other experts
)


@pytest.fixture(params=["mixtral", "qwen2_moe"])
def pair(request, tmp_path):
    """A model and its half."""
    model = random_model(request.param)
    model.save_pretrained(tmp_path / "source")
    api.apply(tmp_path / "source", api.plan(tmp_path / "source", "random", 0.5), tmp_path / "half")
    return tmp_path / "source", tmp_path / "half"


def changed(monkeypatch, change) -> None:
    """Call `change` on the second model that `verify` loads, the output's."""
    stock, loaded = verifying.load_model, []

    def load(*args, **kwargs):
        model = stock(*args, **kwargs)
        loaded.append(model)
        if len(loaded) == 2:
            change(model)
        return model

    monkeypatch.setattr(verifying, "load_model", load)


def rounded(model) -> None:
    generator = torch.Generator().manual_seed(0)

    def other(layer, args, output):
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        hidden = hidden * (1 + NOISE * torch.randn(hidden.shape, generator=generator).to(hidden))
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    for layer in model.layers:
        layer.register_forward_hook(other)


def test_rounding_that_changes_a_choice_is_no_fault(pair, monkeypatch, capsys):
    source, half = pair
    changed(monkeypatch, rounded)
    verdict = api.verify(source, half, tokens=2048, memory="resident", device=DEVICE)
    assert verdict.passed
    assert 0 < verdict.apart < 2048
    assert verdict.largest < 1e-4
    told = json.loads((half / "expertsmith" / "verify.json").read_text())
    assert (told["passed"], told["apart"]) == (True, verdict.apart)
    from expertsmith.views.show import show_verdict

    show_verdict(verdict)
    assert f"the outputs of {verdict.apart} of 2,048 tokens were apart" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("what", ["an expert", "the embeddings", "the head"])
def test_a_fault_in_the_output_stays_one(what, pair, monkeypatch):
    source, half = pair

    def spoil(model) -> None:
        names = {"an expert": "experts.down_proj", "the embeddings": "embed_tokens.weight", "the head": "lm_head.weight"}
        weight = [value for name, value in model.module.named_parameters() if name.endswith(names[what])][-1]
        with torch.no_grad():
            weight.mul_(1.01)

    changed(monkeypatch, spoil)
    verdict = api.verify(source, half, tokens=128, memory="resident", device=DEVICE)
    assert not verdict.passed
    assert verdict.apart == 0
    assert verdict.top1_agreement <= 1


@pytest.mark.parametrize("fed", [False, True])
def test_wrong_experts_are_seen_by_their_outputs_alone(fed, checkpoints, tmp_path):
    """Same shapes, other experts: the forwards alone have to notice it, on their own inputs and on the same."""
    source = checkpoints("qwen3_moe")
    inventory = take_inventory(open_checkpoint(source))
    made, other = (api.plan(source, "random", 4, options={"seed": seed}) for seed in (1, 2))
    api.apply(source, made, tmp_path / "out")
    models = [
        load_model(checkpoint, inventory.architecture, dtype="float32", device=DEVICE)
        for checkpoint in (inventory.checkpoint, open_checkpoint(tmp_path / "out"))
    ]
    verdict, found = verifying.Verdict(False, 1e-4, 0), verifying.Outputs()
    with masked(models[0], other.kept, 8):
        verifying._compare_forwards(*models, verifying.random_batches(128, 64), found, 1e-4, lambda n: None, fed)
    verifying._add_up(verdict, [found])
    assert verdict.largest > 1e-2
