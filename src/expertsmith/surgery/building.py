"""Check that transformers can build a model, before anything is written. The check runs in a separate process unless torch is already
imported, because nothing else in `apply` without merging needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory

REFUSED = 3  # exit code of that process, with the message on stdout


def check_building(inventory: Inventory, overrides: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose model cannot be built or run, if transformers has a class for it.

    Args:
        overrides: keys of the text config that the output changes; the source need not run without them.

    Raises:
        UserError: see `engine.checks.check_model`.
    """
    if inventory.architecture.no_class is not None:
        return
    if (
        "torch" not in sys.modules and sys.executable
    ):  # then `treated_as`, which reads the tensors with torch, is not in force either
        source = inventory.checkpoint
        command = [sys.executable, "-m", "expertsmith.surgery.building", str(source.path), source.source, json.dumps(overrides)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == REFUSED:
            message, remedy = json.loads(done.stdout.splitlines()[-1])
            raise UserError(message, remedy)
        if done.returncode == 0:
            return
    _check(inventory, overrides)  # the process could not start


def _check(inventory: Inventory, overrides: Mapping[str, Any]) -> None:
    from expertsmith.engine.checks import check_model

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
