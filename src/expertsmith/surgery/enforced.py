"""A plan in force on a loaded model: what `verify` holds a written checkpoint to, and what progressive statistics are taken on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from expertsmith.calibration.runner import Follow
from expertsmith.engine import LoadedModel
from expertsmith.experts.inventory import Inventory
from expertsmith.planning import progressive
from expertsmith.planning.build import plan_of_layer
from expertsmith.planning.job import Job
from expertsmith.planning.plan import Plan
from expertsmith.surgery.apply import written
from expertsmith.surgery.mask import masked
from expertsmith.surgery.merge import merged
from expertsmith.surgery.neurons import silenced
from expertsmith.surgery.novices import replaced


@contextmanager
def enforced(model: LoadedModel, plan: Plan, inventory: Inventory) -> Iterator[None]:
    """Within the context, the model runs as the plan says: merged experts have their merged weights, rounded as `inventory` stores them,
    routers choose among the kept experts only, experts that become constants return them, and neurons that go are 0."""
    counts = {entry.layer: entry.num_experts for entry in plan.layers}
    with merged(model, plan, inventory), masked(model, plan.masks, counts), replaced(model, plan), silenced(model, plan):
        yield


def follow(job: Job, model: LoadedModel) -> Follow:
    """What progressive statistics follow: the job's choice, which has to be checked (`planning.progressive.check`). Merged experts are those
    that `apply` writes without --requantise."""
    if job.method.gives == "choice":  # merges: a layer's experts have to be in memory together
        model.whole()
    made: dict[bool, Inventory] = {}  # by whether experts are merged

    def enforce(loaded: LoadedModel, plan: Plan) -> AbstractContextManager[None]:
        if plan.merges not in made:
            made[plan.merges] = written(plan, job.inventory, requantise=False)
        return enforced(loaded, plan, made[plan.merges])

    return Follow(progressive.record(job.method.name, job.values, job.keep), partial(plan_of_layer, job), enforce)
