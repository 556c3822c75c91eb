"""Write a quantised checkpoint as plain bfloat16, tensor by tensor, and read it back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from expertsmith.checkpoint import Checkpoint, open_checkpoint
from expertsmith.checkpoint.code import code_notes, drop_auto_map
from expertsmith.checkpoint.floats import SIDE_FILES, floats, quantisation_of, source_of
from expertsmith.checkpoint.origin import front_matter, name_of
from expertsmith.checkpoint.origin import source_of as made_from
from expertsmith.checkpoint.writer import OutputTensor, left_behind, prepare_target, write_checkpoint
from expertsmith.errors import UserError
from expertsmith.views.progress import Progress, Silent

DTYPE_KEYS = ("dtype", "torch_dtype")


def dequantise(
    checkpoint: Checkpoint, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write every quantised weight as the bfloat16 value nearest to its decoded value, all other tensors byte for byte; then read
    the result and compare every weight with a second decoding. Memory holds one tensor at a time.

    Returns sizes: tensors, weights (decoded ones), bytes [before, after]; and notes.

    Raises:
        UserError: nothing is quantised, a format that cannot be decoded, NaN or inf, a full disk, a result that is not what was written.
    """
    progress = progress or Silent()
    prepare_target(out, checkpoint.path, overwrite)
    found = quantisation_of(checkpoint)
    if found is None:
        raise UserError(f"{checkpoint.source} is not quantised", "there is nothing to do")
    view = floats(checkpoint, "BF16")
    tensors = [OutputTensor(info.name, info.dtype, info.shape, (source_of(view, info),)) for info in view.tensors.values()]
    config = copy.deepcopy(dict(view.config))
    drop_auto_map(config)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.update({key: "bfloat16" for key in DTYPE_KEYS if part.get(key) == "float16"})
    total = sum(tensor.nbytes for tensor in tensors)
    notes = code_notes(checkpoint.path, checkpoint.config, config) + left_behind(checkpoint)
    card = (
        "\n".join(front_matter(checkpoint, ["expertsmith", "dequantised"]))
        + f"\n\n# {name_of(checkpoint)} in bfloat16\n\nMade by expertsmith from `{made_from(checkpoint)}` ({found.title}): "
        f"{len(found.stored):,} weights were decoded and rounded once to bfloat16, all other tensors are byte for byte the same.\n"
        + "".join(f"\n- **Note**: {note}\n" for note in notes)
    )
    with progress.task("dequantise", total, "B") as advance:
        write_checkpoint(
            out,
            tensors,
            config,
            source=checkpoint,
            texts={"README.md": card},
            without=SIDE_FILES,
            overwrite=overwrite,
            on_tensor=_refuse_non_finite,
            progress=advance,
        )
    written = open_checkpoint(out)
    with progress.task("verify", total, "B") as advance:
        for name, info in view.tensors.items():
            if (written.tensors[name].dtype, written.tensors[name].shape) != (info.dtype, info.shape) or not torch.equal(
                written.read(name).reshape(-1).view(torch.uint8), view.read(name).reshape(-1).view(torch.uint8)
            ):
                raise UserError(f"{name} in {out} is not what was written", "the disk or its file system is damaged")
            advance(info.nbytes)
    sizes = {"tensors": len(tensors), "weights": len(found.stored), "format": found.title, "bytes": [checkpoint.nbytes, total]}
    return {**sizes, "notes": notes}


def _refuse_non_finite(tensor: OutputTensor, chunk: memoryview) -> None:
    if tensor.dtype == "BF16" and not bool(torch.frombuffer(chunk, dtype=torch.bfloat16).isfinite().all()):
        raise UserError(f"{tensor.name} has NaN or inf", "the source checkpoint is damaged: download it again")
