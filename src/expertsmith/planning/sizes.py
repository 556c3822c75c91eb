"""Experts, parameters and bytes before and after a plan."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import ceil, prod

from expertsmith.experts.inventory import Claim, Inventory
from expertsmith.experts.weights import part_shape
from expertsmith.planning.plan import LayerPlan, Summary

SHARED = re.compile(
    r"(^|\.)shared_(experts|mlp)\."
)  # in checkpoints whose config sizes shared experts by the routed ones' width


def summary_of(entries: Iterable[LayerPlan], inventory: Inventory, mtp: str) -> Summary:
    """The total experts, parameters and bytes of a plan's layers, before and after."""
    entries = list(entries)
    had = sum(inventory.experts_in(layer) for layer in inventory.layers + inventory.mtp_layers)
    kept = sum(len(entry.keep) for entry in entries)
    before, after = inventory.size(), sized(entries, inventory, mtp == "keep")
    return Summary(experts=(had, kept), parameters=(before[0], after[0]), bytes=(before[1], after[1]))


def sized(entries: Iterable[LayerPlan], inventory: Inventory, mtp: bool) -> tuple[int, int]:
    """(parameters, bytes) of a plan's output. With novices, routers keep all rows, and the constants are added; without neurons, experts are
    smaller, and shared experts may be filled up."""
    entries = list(entries)
    novices = [entry.novices for entry in entries if entry.novices is not None]
    size = inventory.size({entry.layer: len(entry.keep) for entry in entries}, mtp=mtp, routers=not novices)
    numbers = sum(len(held.experts) * held.width for held in novices)
    less = [_removed(entry, inventory) for entry in entries if entry.neurons is not None]
    more = _filled(entries, inventory)
    return tuple(  # type: ignore[return-value]
        total + added + more[i] - sum(gone[i] for gone in less)
        for i, (total, added) in enumerate(zip(size, (numbers, 4 * numbers), strict=True))
    )


def _removed(entry: LayerPlan, inventory: Inventory) -> tuple[int, int]:
    """(parameters, bytes) that a layer's experts lose with their neurons."""
    assert entry.neurons is not None
    numel = nbytes = 0
    counts, held = entry.neurons.counts, list(enumerate(inventory.expert_claims(entry.layer)))
    zero = [claim for claim in inventory.by_layer[entry.layer] if claim.expert is not None and claim.expert >= len(counts)]
    for expert, claims in [*held, (0, zero)]:  # zero experts, whose tensors nothing reads, get the width of the others
        lost = entry.neurons.width - counts[expert]
        for claim in claims:
            layout, shape = inventory.layout(claim), part_shape(claim)
            if layout is None or (layout.startswith("down") and len(shape) == 1):
                continue
            gone = prod(shape) // entry.neurons.width * lost
            numel += gone
            nbytes += gone * claim.info.nbytes // claim.info.numel
    return numel, nbytes


def _filled(entries: list[LayerPlan], inventory: Inventory) -> tuple[int, int]:
    """(parameters, bytes) of the zeros that fill up shared experts, if all experts get one width."""
    held = [entry.neurons for entry in entries]
    widths = {(neurons.width, count) for neurons in held if neurons for count in neurons.counts}
    if len(widths) != 1 or None in held or inventory.architecture.sized_by_width != "shared":
        return 0, 0
    before, after = next(iter(widths))
    numel = nbytes = 0
    for claim in shared_claims(inventory):
        if claim.rest.removesuffix(".bias").endswith("down_proj") and len(claim.info.shape) == 1:
            continue
        had = shared_number(inventory) * before
        more = shared_count(inventory, before, after) * after - had
        numel += claim.info.numel // had * more
        nbytes += claim.info.nbytes // had * more
    return numel, nbytes


def shared_claims(inventory: Inventory) -> list[Claim]:
    """The tensors of shared experts."""
    named = (claim for claim in inventory.claims if claim.kind == "other" and claim.layer is not None)
    return [claim for claim in named if SHARED.search(claim.rest)]


def shared_number(inventory: Inventory) -> int:
    """The number of shared experts in config.json."""
    key = inventory.architecture.shared_key
    return int(inventory.config.get(key) or 0) if key else 0


def shared_count(inventory: Inventory, before: int, after: int) -> int:
    """The number of shared experts of width `after` that hold the source's, of width `before`."""
    return ceil(shared_number(inventory) * before / after)
