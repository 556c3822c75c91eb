"""`inspect`: what a checkpoint is."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Unpack

from expertsmith.arch import config_get
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import NEURONS_KEY, Inventory, take_inventory
from expertsmith.experts.rules import keep_count
from expertsmith.planning.fit import cache_account
from expertsmith.verbs.definition import LOOK, verb
from expertsmith.verbs.options import Named, Opening
from expertsmith.views import show

RATIOS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


def _changed(inventory: Inventory) -> str:
    """What an earlier surgery left, which config.json alone would not tell a reader."""
    if inventory.config.get(NEURONS_KEY):
        return "Its experts have lost neurons, in different numbers, so nothing can be pruned from this checkpoint."
    count = sum(inventory.novices.values())
    return f"{count} further experts are constants, so nothing can be pruned from this checkpoint." if count else ""


@verb(LOOK, show=lambda facts, given: show.show_inspection(facts), headers_only=True)
def inspect(model: Named, **given: Unpack[Opening]) -> dict[str, Any]:
    """Show what a checkpoint is and how much memory it needs at each keep ratio, from config and headers only.

    Raises:
        UserError: not a checkpoint of a supported MoE family, or a damaged one.
    """
    inventory = take_inventory(
        open_checkpoint(model, headers_only=True, allow_pickle=given["allow_pickle"]), undecodable=True, novices=True
    )
    record, rules = inventory.architecture, inventory.rules
    quantisation, weights = _quantisation(inventory)
    parameters, nbytes = weights.size()[0], inventory.size()[1]
    cache = cache_account(inventory)
    decoded = quantisation is None or quantisation["cannot_be_decoded"] is None
    ratios: list[dict[str, float | None]] = []
    for ratio in () if _changed(inventory) else RATIOS:
        with suppress(UserError):  # a ratio below what the router needs is left out
            counts = {layer: keep_count(ratio, inventory.rules_of(layer)) for layer in inventory.layers}
            counts |= dict.fromkeys(inventory.mtp_layers, max(counts.values()))
            after = weights.size(counts)[0], inventory.size(counts)[1]
            if after[1] != nbytes and not any(row["bytes"] == after[1] for row in ratios):
                ratios.append(
                    {
                        "keep": ratio,
                        "experts": max(counts.values()),
                        "fewest_experts": min(counts.values()),
                        "parameters": after[0],
                        "bytes": after[1],
                        "bytes_ratio": after[1] / nbytes,
                        "bytes_with_kv_cache": after[1] + cache["bytes"] if "bytes" in cache else None,
                    }
                )
    groups = None if rules.groups == 1 else {"groups": rules.groups, "top_groups": rules.top_groups}
    return {
        "model": str(model),
        "family": record.title,
        "model_type": record.model_type,
        "status": record.status,
        "notes": " ".join(filter(None, (record.notes, _changed(inventory)))),
        "layers": inventory.num_layers,
        "moe_layers": inventory.layers,
        "multi_token_prediction": _mtp(inventory),
        "num_experts": inventory.num_experts,
        "experts_by_layer": inventory.counts,
        "top_k": inventory.top_k,
        "shared_experts": _shared(inventory),
        "router": {"score": record.score, "selection_bias": bool(record.selection_bias), "expert_groups": groups},
        "least_experts": rules.least,
        "parameters": {
            "total": parameters,
            "active": weights.active_parameters,
            "routed_experts": weights.routed_parameters,
        },
        "quantisation": quantisation,
        "bytes": nbytes,
        "bytes_bfloat16": 2 * parameters if decoded else None,
        "kv_cache": cache,
        "tensors": len(inventory.checkpoint.tensors),
        "keep_ratios": ratios,
    }


def _mtp(inventory: Inventory) -> dict[str, Any] | None:
    """Multi-token prediction: its layers with experts, and its bytes; None where there is none."""
    held = [claim for claim in inventory.claims if claim.mtp]
    if not held:
        return None
    return {"moe_layers": inventory.mtp_layers, "bytes": sum(claim.info.nbytes for claim in held)}


def _quantisation(inventory: Inventory) -> tuple[dict[str, str | None] | None, Inventory]:
    """(formats and, where they are not all known, why; None for an unquantised checkpoint), and the inventory that counts weights: of the
    float weights, or of what stands there where it cannot be decoded."""
    from expertsmith.checkpoint.floats import quantisation_config, quantisation_of

    try:
        found = quantisation_of(inventory.checkpoint)
    except UserError as error:
        method = quantisation_config(inventory.checkpoint).get("quant_method")
        return {"formats": f"quant_method {method}" if method else "unknown", "cannot_be_decoded": str(error)}, inventory
    if found is None:
        return None, inventory
    return {"formats": found.title, "cannot_be_decoded": None}, inventory.floats


def _shared(inventory: Inventory) -> int | None:
    """Shared experts: their number where the config counts them, else 1 where the family has one."""
    record = inventory.architecture
    if record.shared_key:
        value = config_get(inventory.config, record.shared_key)
        if isinstance(value, list):  # one number a layer
            value = max((number for number in value if isinstance(number, int)), default=0)
        return int(value) if isinstance(value, int) else 0
    return 1 if record.shared else 0
