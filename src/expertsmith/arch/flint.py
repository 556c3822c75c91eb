"""Flint of RecursiveSI."""

from expertsmith.arch.base import Architecture

FAMILIES = (
    Architecture(
        model_type="flint",
        title="Flint (RecursiveSI/flint)",
        notes="The shared expert is added in full, without a gate; the sigmoid router has no selection bias.",
        shared="shared_expert",
        score="sigmoid",
    ),
)
