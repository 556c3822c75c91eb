"""Finished layers of an interrupted healing, one safetensors file each, in `OUT.work/healing`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from expertsmith.errors import UserError

HEADER = "healing.json"
STATE = "training.safetensors"


class Work:
    """Healed tensors of finished layers, by checkpoint name. The folder is created with the first finished layer; a folder without one does
    not count as an interrupted healing, so a failed start blocks nothing.

    Args:
        resume: continue from the finished layers; otherwise start again.
        overwrite: start again if the folder belongs to a different healing.

    Raises:
        UserError: the folder belongs to a different healing, or holds other files.
    """

    def __init__(self, folder: Path, made_with: Mapping[str, Any], resume: bool, overwrite: bool = False) -> None:
        self.folder, self._made_with = folder, made_with
        self.writes = True  # not on ranks but the first, which get what that has opened
        if folder.exists() and any(folder.iterdir()):
            header = folder / HEADER
            if not header.is_file():
                raise UserError(f"{folder} contains files that are not an interrupted healing", "move it away")
            if not resume or not (self._layers() or (folder / STATE).is_file()):
                shutil.rmtree(folder)
            elif json.loads(header.read_text(encoding="utf-8")) != json.loads(json.dumps(made_with)):
                if not overwrite:
                    raise UserError(
                        f"{folder} holds an interrupted healing with other models, data or options",
                        "pass --fresh or --overwrite to start again, or choose another output",
                    )
                shutil.rmtree(folder)
        self._owners: dict[str, int] = {}
        self.rows: dict[int, dict[str, Any]] = {}
        for path in self._layers():
            self._find(int(path.stem.removeprefix("layer_")))

    def opened(self) -> Path:
        """Create the folder and mark it as this healing's."""
        if not (self.folder / HEADER).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / HEADER).write_text(json.dumps(self._made_with, indent=1) + "\n", encoding="utf-8")
        return self.folder

    def _layers(self) -> list[Path]:
        return sorted(self.folder.glob("layer_*.safetensors"))

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:04d}.safetensors"

    def _find(self, layer: int) -> None:
        try:
            with safe_open(self._path(layer), "pt") as file:
                self.rows[layer] = json.loads(file.metadata()["row"])
                self._owners.update({name: layer for name in file.keys() if name != "-"})  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path(layer)} cannot be read: {error}", "pass --fresh to start again") from None

    @property
    def names(self) -> list[str]:
        """Names of the healed tensors."""
        return list(self._owners)

    def read(self, name: str) -> torch.Tensor:
        """Read one healed tensor."""
        with safe_open(self._path(self._owners[name]), "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def save(self, layer: int, tensors: Mapping[str, torch.Tensor], row: Mapping[str, Any]) -> None:
        """Store a finished layer and its entry of the report; a rank that does not write keeps the entry only."""
        if not self.writes:
            self.rows[layer] = dict(row)
            return
        self.opened()
        target = self._path(layer)
        partial = target.with_suffix(".partial")
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()} or {"-": torch.zeros(1)}
        save_file(held, partial, metadata={"row": json.dumps(row)})
        partial.replace(target)
        self._find(layer)

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Read the healed tensors of a layer."""
        return {name: self.read(name) for name, owner in self._owners.items() if owner == layer}

    def save_state(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Store the state of a running training."""
        partial = self.opened() / "training.partial"
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            partial,
            {"facts": json.dumps(facts)},
        )
        partial.replace(self.folder / STATE)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What `save_state` kept, or None."""
        path = self.folder / STATE
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
