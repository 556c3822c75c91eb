"""How many experts a plan keeps in a checkpoint's layers, and whether it keeps multi-token prediction."""

from __future__ import annotations

from expertsmith.experts.inventory import Inventory
from expertsmith.planning.plan import Plan
from expertsmith.planning.sizes import sized


def counts_of(plan: Plan) -> dict[int, int]:
    """Layer → number of kept experts."""
    return {entry.layer: len(entry.keep) for entry in plan.layers}


def router_counts(plan: Plan) -> dict[int, int]:
    """Decoder layer → number of experts that its router selects from: with novices all, else the kept ones."""
    return {entry.layer: len(plan.masks[entry.layer]) for entry in plan.layers if not entry.mtp}


def trunk_counts(plan: Plan) -> dict[int, int]:
    """`counts_of` the decoder layers, without multi-token prediction."""
    return {entry.layer: len(entry.keep) for entry in plan.layers if not entry.mtp}


def changes(plan: Plan, inventory: Inventory) -> bool:
    """Whether any expert is dropped. Those that become constants are not."""
    return not plan.novices and any(count != inventory.experts_in(layer) for layer, count in counts_of(plan).items())


def drops_mtp(plan: Plan, inventory: Inventory) -> bool:
    """Whether the source has multi-token prediction and the output does not."""
    return inventory.has_mtp and (plan.mtp == "drop" or (plan.mtp is None and changes(plan, inventory)))


def size_after(plan: Plan, inventory: Inventory) -> tuple[int, int]:
    """(parameters, bytes) of the output."""
    return sized(plan.layers, inventory, mtp=not drops_mtp(plan, inventory))
