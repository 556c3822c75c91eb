"""Experts, parameters and bytes before and after a plan."""

from __future__ import annotations

from collections.abc import Iterable

from expertsmith.experts.inventory import Inventory
from expertsmith.planning.plan import LayerPlan, Summary


def summary_of(entries: Iterable[LayerPlan], inventory: Inventory, mtp: str) -> Summary:
    """The total experts, parameters and bytes of a plan's layers, before and after."""
    entries = list(entries)
    had = sum(inventory.experts_in(layer) for layer in inventory.layers + inventory.mtp_layers)
    kept = sum(len(entry.keep) for entry in entries)
    before, after = inventory.size(), sized(entries, inventory, mtp == "keep")
    return Summary(experts=(had, kept), parameters=(before[0], after[0]), bytes=(before[1], after[1]))


def sized(entries: Iterable[LayerPlan], inventory: Inventory, mtp: bool) -> tuple[int, int]:
    """(parameters, bytes) of a plan's output. With novices, routers keep all rows, and the constants are added."""
    entries = list(entries)
    novices = [entry.novices for entry in entries if entry.novices is not None]
    size = inventory.size({entry.layer: len(entry.keep) for entry in entries}, mtp=mtp, routers=not novices)
    numbers = sum(len(held.experts) * held.width for held in novices)
    return size[0] + numbers, size[1] + 4 * numbers
