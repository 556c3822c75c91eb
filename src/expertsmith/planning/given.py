"""Statistics that a plan starts from: of this model, of these domains, with what the method needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expertsmith.calibration.stats import Statistics, load_statistics
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.methods.base import Method


def statistics_for(inventory: Inventory, method: Method, given: Statistics | str | Path, domains: Sequence[str]) -> Statistics:
    """The statistics of these domains for a method.

    Raises:
        UserError: they are of another model or other layers, or lack something that the method needs.
    """
    statistics = matching_statistics(inventory, given, domains, mtp=True)
    entry = next(iter(statistics.layers.values()))
    if method.all_outputs and not all("all_output_sum" in held for held in entry.domains.values()):
        raise UserError(
            f"method {method.name} needs every expert's output on all tokens, which these statistics do not have",
            "calibrate again with --all-outputs",
        )
    if method.output_moments and not all("output_sq_sum" in held for held in entry.domains.values()):
        raise UserError(
            f"method {method.name} needs the variance of every expert's output, which these statistics do not have",
            "calibrate again with --output-moments",
        )
    if method.neurons and not all(
        "neuron_sq_sum" in statistics.layers[n].domains[d] for n in inventory.layers for d in statistics.layers[n].domains
    ):
        raise UserError(
            f"method {method.name} needs the gradients of neurons, which these statistics do not have",
            "calibrate again with --neurons",
        )
    return statistics


def matching_statistics(
    inventory: Inventory, given: Statistics | str | Path, domains: Sequence[str] = (), *, mtp: bool = False
) -> Statistics:
    """Statistics of this checkpoint, of these domains (none: all); with `mtp` also those of multi-token-prediction layers, if there are any.

    Raises:
        UserError: they are of another model or other layers.
    """
    statistics = (given if isinstance(given, Statistics) else load_statistics(given)).select(domains)
    if statistics.header["model"]["fingerprint"] != inventory.checkpoint.fingerprint:
        raise UserError(f"the statistics are from another model than {inventory.checkpoint.source}", "calibrate this model")
    if [layer for layer in statistics.layers if layer not in inventory.mtp_layers] != inventory.layers:
        raise UserError("the statistics do not cover the same layers as the checkpoint", "calibrate again")
    if mtp:
        return statistics
    return Statistics(statistics.header, {layer: statistics.layers[layer] for layer in inventory.layers})
