"""Experts are read straight into the parameter that holds them."""

from __future__ import annotations

import pytest
import torch

from conftest import save_tiny
from expertsmith.arch import families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.reader import Checkpoint
from expertsmith.engine import load_model, loading
from expertsmith.engine.fusing import Stack, in_place
from expertsmith.errors import UserError


def streamed(folder, family, **more):
    return load_model(open_checkpoint(folder), families()[family], memory="stream", **more)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_layer_has_the_bits_that_transformers_gives_it(tmp_path, monkeypatch, family, dtype):
    """Twelve experts: expert 10 comes after expert 9."""
    key = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts"}[family]
    folder = save_tiny(family, tmp_path / "model", **{key: 12})
    taken = []
    fill = Stack.to
    monkeypatch.setattr(Stack, "to", lambda self, *args, **more: taken.append(fill(self, *args, **more)) or taken[-1])
    placed = streamed(folder, family, dtype=dtype)
    placed.bring(1)
    assert sorted(stack.shape[0] for stack in taken) == [12, 12]  # gate and up, down
    monkeypatch.setattr(loading, "in_place", lambda naming, state, *more: state)
    plain = streamed(folder, family, dtype=dtype)
    plain.bring(1)
    theirs = dict(plain.layers[1].named_parameters())
    for name, parameter in placed.layers[1].named_parameters():
        assert parameter.dtype == theirs[name].dtype
        assert torch.equal(parameter, theirs[name]), name


def test_every_tensor_of_a_layer_is_read_once(tmp_path, monkeypatch):
    model = streamed(save_tiny("mixtral", tmp_path / "model"), "mixtral")
    read, names = Checkpoint.read, []
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *rows: names.append(name) or read(self, name, *rows))
    model.bring(0)
    assert sorted(names) == sorted(name for name in model.checkpoint.tensors if ".layers.0." in name)


@pytest.mark.parametrize("damage", ["missing", "one column", "a row less"])
def test_what_does_not_fit_is_left_to_transformers(tmp_path, damage):
    """`copy_` would stretch a single column over all."""
    model = streamed(save_tiny("mixtral", tmp_path / "model"), "mixtral")
    names = [name for name in model.checkpoint.tensors if ".layers.0." in name and ".experts." in name]
    shapes = {name: model.checkpoint.tensors[name].shape for name in names}
    state = {name: object() for name in names}
    assert all(isinstance(entry, Stack) for entry in in_place(model._match.naming, state, shapes).values())
    bad = next(name for name in names if "experts.2.w2" in name)
    if damage == "missing":
        del state[bad]
    else:
        rows, columns = shapes[bad]
        shapes[bad] = (rows, 1) if damage == "one column" else (rows - 1, columns)
    found = in_place(model._match.naming, state, shapes)
    left = {name for name in names if ".w2." in name} & state.keys()
    assert {name for name, entry in found.items() if not isinstance(entry, Stack)} == left
    assert len(found) == len(left) + 1


def test_a_missing_expert_is_told(tmp_path):
    model = streamed(save_tiny("mixtral", tmp_path / "model"), "mixtral")
    model._match.groups[1].remove(next(name for name in model._match.groups[1] if "experts.1.w1" in name))
    with pytest.raises(UserError, match="in decoder layer 1 could not be converted"):
        model.bring(1)
