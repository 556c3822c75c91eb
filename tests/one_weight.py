"""A checkpoint of one quantised weight, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.floats import Floats, floats
from quantise import KINDS

NAME = "layer.up_proj"


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(folder: Path, parts: dict[str, torch.Tensor], config: dict, files: dict | None = None, name: str = NAME):
    """A checkpoint of one quantised weight."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"quantization_config": dict(config)} if config else {}
    (folder / "config.json").write_text(json.dumps({"model_type": "any", **said}))
    for file, content in (files or {}).items():
        (folder / file).write_text(json.dumps(content))
    save_file({name + leaf: part.contiguous() for leaf, part in parts.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def view(folder: Path, kind: str, w: torch.Tensor) -> tuple[Floats, str, dict[str, torch.Tensor]]:
    """(float view, name of the weight, what stands on disk) of a weight in a format."""
    made = KINDS[kind]
    parts = made.encode(w) if w.dim() == 2 else made.fused(w)
    checkpoint = store(folder, parts, made.config, made.files)
    found = floats(checkpoint)
    assert isinstance(found, Floats)
    (name,) = found.stored
    assert found.tensors[name].shape == tuple(w.shape)
    assert found.tensors[name].nbytes == 4 * w.numel()
    return found, name, parts


def shape_of(kind: str) -> tuple[int, ...]:
    if kind in ("fp8_fused", "fp8_fused_tensor"):
        return (6, 24, 40)
    return (6, 64, 48) if kind == "mxfp4" else (64, 96)
