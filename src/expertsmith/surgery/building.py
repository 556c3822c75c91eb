"""Whether transformers can build a model, asked before anything is written. In a process of its own, unless torch is here already: nothing else
that `apply` does without merging needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory

REFUSED = 3  # exit code of that process, with the words on stdout


def check_building(inventory: Inventory, overrides: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose model cannot be built or run, where transformers has a class for it.

    Args:
        overrides: keys of the text config that the output has changed, so that the source need not run without.

    Raises:
        UserError: see `engine.loading.check_model`.
    """
    if inventory.architecture.no_class is not None:
        return
    if (
        "torch" not in sys.modules and sys.executable
    ):  # then nothing of `treated_as` is in force either, which looks at the tensors with torch
        source = inventory.checkpoint
        command = [sys.executable, "-m", "expertsmith.surgery.building", str(source.path), source.source, json.dumps(overrides)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == REFUSED:
            message, remedy = json.loads(done.stdout.splitlines()[-1])
            raise UserError(message, remedy)
        if done.returncode == 0:
            return
    _check(inventory, overrides)  # a process that could not begin has not answered


def _check(inventory: Inventory, overrides: Mapping[str, Any]) -> None:
    from expertsmith.engine.loading import check_model

    check_model(inventory.checkpoint, inventory.architecture, overrides)


def _main(path: str, source: str, overrides: str) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.source = source
    try:
        _check(take_inventory(checkpoint), json.loads(overrides))
    except UserError as error:
        print(json.dumps([error.message, error.remedy]))
        raise SystemExit(REFUSED) from None


if __name__ == "__main__":
    _main(*sys.argv[1:])
