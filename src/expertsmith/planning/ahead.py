"""The plan of multi-token-prediction layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from expertsmith.experts.inventory import Inventory
from expertsmith.planning.job import Job, rules_of
from expertsmith.planning.kinds import entries_of
from expertsmith.planning.neurons import neurons_ahead
from expertsmith.planning.plan import LayerPlan
from expertsmith.views.progress import Progress
from expertsmith.views.show import ranges


def planned_ahead(job: Job, layers: list[int], made: Mapping[int, LayerPlan], router_groups: str) -> dict[int, LayerPlan]:
    """Plan the multi-token-prediction layers, with the number of experts that config.json will have after the decoder layers' plan `made`: by
    the job's method, or by the weights if the method cannot be used for them."""
    count = max(len(entry.keep) for entry in made.values())
    if job.method.cut:
        return _marked(neurons_ahead(job, layers, made))
    if job.method.constants:
        every = {layer: job.inventory.experts_in(layer) for layer in layers}
        return _marked({n: LayerPlan(layer=n, num_experts=count, keep=list(range(count))) for n, count in every.items()})
    if job.method.reads == "model":
        why = f"method {job.method.name} searches the decoder layers only"
    elif job.statistics is not None and not set(layers) <= set(job.statistics.layers):
        from expertsmith.engine.mtp import why_not_played

        why = why_not_played(job.inventory) or "the statistics are from an older version, which did not include it"
    elif "uniform" not in job.method.budgets:
        why = f"method {job.method.name} does not support budget uniform"
    else:
        rules = rules_of(job.inventory, router_groups, mtp=True)
        # not from the work folder, which holds the decoder layers
        inner = replace(job, layers=layers, keep=count, budget="uniform", rules=rules, work=None)
        return _marked(entries_of(inner))
    return by_weights(job.inventory, layers, count, router_groups, why, job.notes, job.progress)


def by_weights(
    inventory: Inventory,
    layers: Sequence[int],
    count: int,
    router_groups: str,
    why: str,
    notes: list[str],
    progress: Progress,
) -> dict[int, LayerPlan]:
    """Keep `count` experts of each of these multi-token-prediction layers, chosen by `aimer`; the reason `why` is added to `notes`."""
    from expertsmith.methods import find

    rules = rules_of(inventory, router_groups, mtp=True)
    method = find("aimer")
    notes.append(
        f"experts of multi-token prediction (layer{'s' * (len(layers) > 1)} {ranges(list(layers))}) were chosen by their weights alone (aimer): {why}"
    )
    return _marked(
        entries_of(Job(inventory, method, method.parse_options({}), count, "uniform", rules, progress, layers=list(layers)))
    )


def _marked(entries: Mapping[int, LayerPlan]) -> dict[int, LayerPlan]:
    return {layer: entry.model_copy(update={"mtp": True}) for layer, entry in entries.items()}
