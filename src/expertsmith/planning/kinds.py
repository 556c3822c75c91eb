"""The layers of a plan by what its method gives."""

from __future__ import annotations

from expertsmith.planning.choices import by_choice, by_search
from expertsmith.planning.job import Job
from expertsmith.planning.neurons import by_neurons
from expertsmith.planning.orders import by_order
from expertsmith.planning.plan import LayerPlan
from expertsmith.planning.saliencies import by_saliency


def entries_of(job: Job) -> dict[int, LayerPlan]:
    """The plan of each of the job's layers."""
    if job.method.gives == "saliency":
        return by_saliency(job)
    if job.method.gives == "neurons":
        return by_neurons(job)
    if job.method.gives == "order":
        return by_order(job)
    return by_search(job) if job.method.reads == "model" else by_choice(job)
