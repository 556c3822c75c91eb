"""The outputs of the last finished layer on disk, from which an interrupted calibration resumes.

One folder `.states-LLL` in the statistics folder, with one file per batch. It is written at most every half minute, so short runs write
nothing and long runs lose little. It is removed when the calibration is complete.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

EVERY_SECONDS = 30.0
PREFIX = ".states-"


class Spill:
    """Write the outputs of a decoder layer, batch by batch, if the last write was at least `EVERY_SECONDS` ago."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.folder, self.enabled = folder, enabled
        self._last = time.monotonic()
        self._writing: int | None = None

    def layer_begins(self, layer: int) -> None:
        """Decide whether this layer's outputs are written."""
        due = self.enabled and time.monotonic() - self._last >= EVERY_SECONDS
        self._writing = layer if due else None
        if due:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()

    def batch_leaves(self, layer: int, number: int, output: Any, complete: bool) -> None:
        """Write one batch's output if this layer is written. If the output is not `complete` (later layers need more than it) or not made
        of tensors, stop spilling and remove all states."""
        if self._writing != layer and complete:
            return
        tensors = pack(output) if complete else None
        if tensors is None:
            self.enabled, self._writing = False, None
            clear(self.folder)
            return
        try:
            save_file(tensors, self._partial / f"batch_{number:06d}.safetensors")
        except (OSError, SafetensorError):  # a full disk must not end the run: without states, resuming runs the layers again
            self.enabled, self._writing = False, None
            clear(self.folder)

    def layer_ends(self, layer: int) -> None:
        """Replace older states by this layer's; its statistics are saved."""
        if self._writing != layer:
            return
        old = newest(self.folder)
        self._partial.rename(self.folder / f"{PREFIX}{layer:03d}")
        if old is not None:
            shutil.rmtree(self.folder / f"{PREFIX}{old:03d}")
        self._last, self._writing = time.monotonic(), None

    @property
    def _partial(self) -> Path:
        return self.folder / f"{PREFIX}partial"


def newest(folder: Path) -> int | None:
    """The decoder layer whose outputs are on disk, or None."""
    found = [int(path.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}[0-9]*")]
    return max(found, default=None)


def read(folder: Path, layer: int, number: int, device: torch.device) -> Any:
    """The output of decoder layer `layer` for a batch."""
    return unpack(load_file(folder / f"{PREFIX}{layer:03d}" / f"batch_{number:06d}.safetensors"), device)


def clear(folder: Path) -> None:
    """Remove all states."""
    for path in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(path)


def pack(output: Any) -> dict[str, torch.Tensor] | None:
    """A tensor, or a tuple of tensors and None, as named tensors; None if it is anything else."""
    parts = output if isinstance(output, tuple) else (output,)
    if not all(part is None or isinstance(part, torch.Tensor) for part in parts):
        return None
    shape = torch.tensor([len(parts) if isinstance(output, tuple) else 0])
    return {"length": shape} | {str(i): part.detach().cpu().contiguous() for i, part in enumerate(parts) if part is not None}


def unpack(tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
    """The inverse of `pack`."""
    length = int(tensors["length"])
    parts = [tensors[str(i)].to(device) if str(i) in tensors else None for i in range(max(1, length))]
    return tuple(parts) if length else parts[0]
