"""A plan's costly measurements: results of the weights, and the folder that keeps them for an interrupted run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertsmith.calibration import stats as storage
from expertsmith.errors import UserError
from expertsmith.methods.base import Array
from expertsmith.methods.information import Counting
from expertsmith.planning.job import Job
from expertsmith.ranks import current

MEASURED = "expertsmith.measured"


def measured(job: Job) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yield (layer, result of the method's `measure` on its weights); layers in the work folder are read from there."""
    from expertsmith.experts.weights import Projections

    assert job.method.measure is not None
    measure = job.method.measure
    options = {name: job.values[name] for name in job.method.measure_options}
    folder, how = job.work, counting(job.device)

    def known() -> dict[int, dict[str, Array]]:
        if folder is None:
            return {}
        prepare_folder(folder, job, {"method": job.method.name, "options": options})
        there = [layer for layer in job.layers if storage.layer_path(folder, layer).exists()]
        return {layer: dict(storage.load_layer(folder, layer).domains["weights"]) for layer in there}

    found = current().leading(known)
    with job.progress.task("measure", len(job.layers), "layers") as advance:
        told: set[int] = set(found)  # layers that this rank has measured, or knew
        advance(len(found))

        def make(layer: int) -> dict[str, Array]:
            told.add(layer)
            facts = replace(job.facts(layer), advance=advance, counting=how)
            return measure(Projections(job.inventory, layer), facts, **options)

        todo = current().over([layer for layer in job.layers if layer not in found], make)
        for layer in job.layers:
            if layer not in found:
                _, found[layer] = next(todo)
                if folder is not None and current().first:
                    storage.save_layer(folder, layer, {"weights": found[layer]})
                if layer not in told:
                    advance(1)
            yield layer, found.pop(layer)


def counting(device: str) -> Counting:
    """How pairs of weights are counted: on a device other than the CPU, if there is one."""
    from expertsmith.engine.devices import choose_device

    where = choose_device(device)
    if where.type == "cpu":
        return Counting()
    from expertsmith.planning.pairs import counting_on

    return counting_on(where)


def prepare_folder(folder: Path, job: Job, made_with: Mapping[str, Any]) -> None:
    """Prepare the work folder for this model and these options; results of another model or of other options are removed."""
    header = {"format": MEASURED, "version": 1, "model": job.inventory.checkpoint.fingerprint, **made_with}
    header = json.loads(json.dumps(header))
    mark = folder / "measured.json"
    if folder.exists() and any(folder.iterdir()):
        try:
            old = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise UserError(f"{folder} contains files that are not measured weights", "choose another output name") from None
        if old == header and job.resume:
            job.progress.note(f"using earlier measurements in {folder}")
            return
        if old != header:
            job.progress.note(f"{folder} is from another model or other options, so it is measured again")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
