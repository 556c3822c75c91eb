"""Tiny checkpoints with multi-token prediction as published: a model's last decoder layer under the names of one, with what stands before it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conftest import random_model
from expertsmith.arch import text_config
from tiny import tiny_config

AFTER_LAST = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "deepseek_v32")  # model.layers.N.eh_proj; the others mtp.fc
UNDER_MTP = ("qwen3_next", "qwen3_5_moe_text")
WITH_EXPERTS = AFTER_LAST + UNDER_MTP
LISTS = {"layer_types": "full_attention", "mlp_layer_types": "sparse"}


def longer(model_type: str) -> tuple[torch.nn.Module, int]:
    """(a tiny random model with one decoder layer more than the family's, the family's number)."""
    tiny = tiny_config(model_type)
    depth = int(tiny["num_hidden_layers"])
    lists = {key: [*tiny[key], value] for key, value in LISTS.items() if key in tiny}
    return random_model(model_type, num_hidden_layers=depth + 1, **lists), depth


def save_with_mtp(model_type: str, folder: Path, own_embedding: bool = False) -> torch.nn.Module:
    """Write the checkpoint; returns the longer model, whose last layer is the checkpoint's multi-token-prediction layer.

    Args:
        own_embedding: give it an embedding other than the model's; otherwise DeepSeek's layout has a copy, and Qwen's none.
    """
    model, depth = longer(model_type)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    last = re.compile(rf"^(?P<prefix>.*layers\.){depth}\.(?P<rest>.*)$")
    after = model_type in AFTER_LAST
    made = {}
    for name, tensor in tensors.items():
        match = last.match(name)
        made[f"mtp.layers.0.{match['rest']}" if match and not after else name] = tensor
    prefix = next(match["prefix"] for match in map(last.match, tensors) if match)
    config = json.loads((folder / "config.json").read_text())
    inner = text_config(config)
    hidden = inner["hidden_size"]
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")).clone()
    if own_embedding:
        embedding += torch.randn(embedding.shape, generator=generator)
    parts = {
        "embedding_norm": 0.5 + torch.rand(hidden, generator=generator),
        "hidden_norm": 0.5 + torch.rand(hidden, generator=generator),
        "projection": torch.randn(hidden, 2 * hidden, generator=generator) / hidden**0.5,
        "norm": 0.5 + torch.rand(hidden, generator=generator),
    }
    if after:
        names = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "projection": "eh_proj", "norm": "shared_head.norm"}
        made |= {f"{prefix}{depth}.{names[part]}.weight": tensor for part, tensor in parts.items()}
        made[f"{prefix}{depth}.embed_tokens.weight"] = embedding
        made[f"{prefix}{depth}.shared_head.head.weight"] = torch.randn(embedding.shape, generator=generator)
        inner["num_nextn_predict_layers"] = 1
    else:
        names = {
            "embedding_norm": "pre_fc_norm_embedding",
            "hidden_norm": "pre_fc_norm_hidden",
            "projection": "fc",
            "norm": "norm",
        }
        made |= {f"mtp.{names[part]}.weight": tensor for part, tensor in parts.items()}
        inner["mtp_num_hidden_layers"] = 1
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, folder / "model.safetensors", {"format": "pt"})
    inner["num_hidden_layers"] = depth
    for key in LISTS:
        if isinstance(inner.get(key), list):
            inner[key] = inner[key][:depth]
    (folder / "config.json").write_text(json.dumps(config))
    model.parts = {**parts, "embedding": embedding}
    return model
