"""The experts of a plan that become constants instead of being removed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from expertsmith.errors import UserError
from expertsmith.methods.base import Array
from expertsmith.planning.job import Job
from expertsmith.planning.plan import LayerPlan, Novices, digest


def with_novices(job: Job, entries: Mapping[int, LayerPlan]) -> tuple[dict[int, LayerPlan], dict[int, Array]]:
    """The entries with what is not kept as novices, and the constants of every layer."""
    method, made, constants = job.method, dict(entries), {}
    assert method.constants is not None
    for layer, entry in entries.items():
        gone = sorted(set(range(entry.num_experts)) - set(entry.keep))
        if gone:
            every: Array = method.constants(job.statistics_of(layer), **method.values_for(method.constants, job.values))
            values = np.ascontiguousarray(every[gone], dtype="<f4")
            if not np.isfinite(values).all():
                raise UserError(
                    f"the constants of decoder layer {layer} are not finite",
                    "if activations overflowed in the calibration, calibrate with --dtype float32",
                )
            constants[layer] = values
            held = Novices(experts=gone, width=values.shape[1], sha256=digest(values))
            made[layer] = entry.model_copy(update={"novices": held})
    return made, constants
