"""What is asked for of a choice of experts, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.experts.rules import Rules, keep_count, parse_keep

if TYPE_CHECKING:
    from expertsmith.methods.base import Budget as BudgetName
    from expertsmith.methods.base import Method


def request(
    inventory: Inventory,
    method: str,
    keep: float | int | str | None,
    budget: str | None,
    options: Mapping[str, Any] | None,
    router_groups: str,
) -> tuple[Method, dict[str, Any], float | int | None, BudgetName, dict[int, Rules], dict[str, Any] | None]:
    """Everything that was asked for, checked before anything is computed. The last are the options of a searched budget, None with another."""
    from expertsmith import methods as registered
    from expertsmith.planning import budgets
    from expertsmith.planning.job import choose_budget, rules_of
    from expertsmith.surgery.neurons import check_neurons
    from expertsmith.surgery.novices import check_novices
    from expertsmith.surgery.uneven import refuse_padded

    chosen = registered.find(method)
    own, searching = budgets.parse_options(budget, options or {})
    values = chosen.parse_options(own)
    share = None if keep is None else parse_keep(keep)
    refuse_padded(inventory)
    chosen_budget = choose_budget(chosen, budget, share)
    if chosen.constants:
        check_novices(inventory)
        if router_groups == "flatten":
            raise UserError(f"method {method} leaves the router unchanged, so its groups stay", "leave --router-groups out")
    if chosen.cut:
        if not isinstance(share, float):
            raise UserError(f"method {method} keeps a share of every expert's neurons, not {share} experts", "e.g. --keep 0.75")
        check_neurons(inventory, values["width"])
        if router_groups == "flatten":
            raise UserError(f"method {method} leaves the router unchanged, so its groups stay", "leave --router-groups out")
    rules = rules_of(inventory, "flatten" if chosen.constants else router_groups)
    if share is not None and not chosen.cut:
        where = inventory.checkpoint.source
        for layer, entry in rules.items():
            keep_count(share, entry, where if len(set(rules.values())) == 1 else f"decoder layer {layer} of {where}")
    return chosen, values, share, chosen_budget, rules, searching


def check_progressive(
    progressive: bool, method: Method, keep: object, budget: str | None, router_groups: str, stats: object = None
) -> None:
    """Refuse --progressive where statistics are given, or where a choice cannot be made layer by layer.

    Raises:
        UserError: with the reason.
    """
    from expertsmith.planning.progressive import check

    if progressive and stats is not None:
        raise UserError(
            "--progressive has no effect with --stats: it is how statistics are taken", "pass it to `expertsmith calibrate`"
        )
    if progressive:
        check(method, keep, budget, router_groups)


def calibration_for(method: Method, keep: float | int | None, values: Mapping[str, Any], progressive: bool) -> dict[str, Any]:
    """The options of `calibrate` for a method: what it needs, and what progressive statistics follow."""
    needs = {"all_outputs": method.all_outputs, "output_moments": method.output_moments, "neurons": method.neurons}
    follows = {"progressive": True, "method": method.name, "keep": keep, "options": dict(values)}
    return {**needs, **(follows if progressive else {})}
