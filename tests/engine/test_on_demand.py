"""Experts that are read when tokens are sent to them: the same numbers as with whole layers in memory."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import CALIBRATION, COMPOSITES, DEVICE, SUPPORTED
from expertsmith import api
from expertsmith.arch import families
from expertsmith.calibration.stats import layer_path, load_statistics
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import load_model, loading, on_demand
from expertsmith.engine.layout import experts_of, is_grouped
from expertsmith.experts.inventory import take_inventory


@pytest.mark.parametrize("model_type", [*SUPPORTED, *COMPOSITES])
def test_statistics_and_proof_are_those_of_whole_layers(model_type, checkpoints, data, tmp_path, monkeypatch):
    source, record = checkpoints(model_type), families()[model_type]
    options = {**CALIBRATION, "output_sum": True, "all_outputs": True}
    whole = api.calibrate(source, data, tmp_path / "whole", memory="stream", **options)
    monkeypatch.setattr(loading, "SHARE_OF_A_LAYER", 0.0)
    monkeypatch.setattr(on_demand, "AT_ONCE", 1)  # one expert at a time
    filled: list[range] = []
    fill = on_demand.Source.fill
    monkeypatch.setattr(
        on_demand.Source, "fill", lambda self, part, experts: (filled.append(experts), fill(self, part, experts))[1]
    )
    api.calibrate(source, data, tmp_path / "parts", memory="stream", **options)
    model = load_model(open_checkpoint(source), record, memory="stream")
    if is_grouped(experts_of(model.layers[model.moe_layers[0]], record)):
        assert filled
        assert all(len(experts) == 1 for experts in filled)
    else:
        assert not filled  # a layout that transformers does not describe: whole layers
    for layer in load_statistics(tmp_path / "whole").layers:
        one, other = (load_file(layer_path(tmp_path / name, layer)) for name in ("whole", "parts"))
        assert set(one) == set(other)
        for name, value in one.items():  # vectorised activations round the last elements of a tensor in another way
            assert np.abs(value - other[name]).max() <= 1e-6 * np.abs(value).max(), name
    made = api.plan(source, "ean", 0.5, stats=whole)
    api.apply(source, made, tmp_path / "out")
    verdict = api.verify(source, tmp_path / "out", tokens=64, memory="stream", device=DEVICE)
    assert verdict.passed
    assert verdict.largest < 2e-5


def test_merging_needs_whole_layers(checkpoints, data, tmp_path, monkeypatch):
    """`merged` changes weights in memory, so the layers are read whole from then on."""
    source = checkpoints("qwen3_moe")
    made = api.plan(source, "m_smoe", 0.5, data=data, out=tmp_path / "plan.json", **CALIBRATION)
    api.apply(source, made, tmp_path / "out")
    monkeypatch.setattr(loading, "SHARE_OF_A_LAYER", 0.0)
    assert api.verify(source, tmp_path / "out", tokens=64, memory="stream", device=DEVICE).passed


def test_only_experts_with_tokens_are_read(checkpoints, data, tmp_path, monkeypatch):
    import torch

    source = checkpoints("mixtral")
    inventory = take_inventory(open_checkpoint(source))
    monkeypatch.setattr(loading, "SHARE_OF_A_LAYER", 0.0)
    model = load_model(inventory.checkpoint, inventory.architecture, memory="stream")
    model.bring(0)
    experts = experts_of(model.layers[0], inventory.architecture)
    held = [list(ids) for ids, _ in on_demand.parts(experts, torch.tensor([1, 1, 6]))]
    assert held == [[1, 2, 3, 4, 5, 6]]  # they fit together
    monkeypatch.setattr(on_demand, "AT_ONCE", 1)
    assert [list(ids) for ids, _ in on_demand.parts(experts, torch.tensor([1, 1, 6]))] == [[1], [6]]
