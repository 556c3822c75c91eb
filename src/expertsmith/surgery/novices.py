"""Experts as constants (method `mone`) in a checkpoint: what is refused, the tensors, config.json, and the masked reference of `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from expertsmith.arch import text_config
from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.floats import quantisation_of
from expertsmith.checkpoint.writer import Made, OutputTensor
from expertsmith.errors import UserError
from expertsmith.experts.inventory import NOVICES_KEY, Inventory
from expertsmith.planning.plan import Plan
from expertsmith.surgery.uneven import why_not_custom

if TYPE_CHECKING:
    import torch

    from expertsmith.engine import LoadedModel


def check_novices(inventory: Inventory) -> None:
    """Refuse a checkpoint whose experts cannot be constants.

    Raises:
        UserError: with the reason.
    """
    record = inventory.architecture
    why = record.no_class or why_not_custom(inventory)
    if record.call == "dense_inputs":
        why = "its router scales the experts' inputs, so a constant output has no routing weight"
    elif any(entry.extra for entry in record.stacked) or record.unrouted_zero:
        why = "its router has classes that are not experts"
    elif quantisation_of(inventory.checkpoint) is not None:
        why = "it is quantised; write it in bfloat16 first with `expertsmith dequantise`"
    if why is not None:
        raise UserError(
            f"experts of {inventory.checkpoint.source} cannot become constants: {why}", "use another method, e.g. reap"
        )


def write_novices(config: dict[str, Any], plan: Plan, inventory: Inventory) -> None:
    """List the constants of a plan in a config.json that was copied from the source; `auto_map` names the class of `code_for`."""
    from expertsmith.engine.building import transformers_config  # torch and transformers: for this only
    from expertsmith.engine.uneven import auto_map

    inner: dict[str, Any] = text_config(config)  # type: ignore[assignment]
    kept = plan.kept
    inner[NOVICES_KEY] = {
        str(layer): {"kept": kept[layer], "novices": entry.experts, "width": entry.width}
        for layer, entry in plan.novices.items()
    }
    config["auto_map"] = auto_map(transformers_config(inventory.checkpoint))


def tensor_names(plan: Plan, inventory: Inventory) -> dict[int, str]:
    """Decoder layer → name of the tensor with its constants."""
    record, found = inventory.architecture, {}
    for layer in plan.novices:
        claim = next(claim for claim in inventory.by_layer[layer] if claim.routed)
        base = claim.info.name.removesuffix(claim.rest)
        found[layer] = base + ".".join(filter(None, (record.block, record.experts, "novices")))
    return found


def novice_tensors(plan: Plan, inventory: Inventory) -> list[OutputTensor]:
    """The constants of every layer that has any, float32 [novices, width]."""
    made = []
    for layer, name in tensor_names(plan, inventory).items():
        values = np.ascontiguousarray(plan.constants(layer), dtype="<f4")
        made.append(OutputTensor(name, "F32", values.shape, (Made(values.nbytes, partial(values.tobytes)),)))
    return made


def with_constants_of(plan: Plan, inventory: Inventory, output: Checkpoint) -> tuple[Plan, list[str]]:
    """(the plan with its constants, names of tensors that are not as planned): if they are not next to the plan, from its output, where the
    plan's checksums prove them."""
    names = tensor_names(plan, inventory)
    if all(layer in plan.held_constants for layer in names):
        return plan, []
    found, wrong = {}, []
    for layer, name in names.items():
        stored = output.tensors.get(name)
        values = output.read(name).numpy() if stored is not None and stored.dtype == "F32" else None
        if values is not None and plan.novices[layer].holds(values):
            found[layer] = values
        else:
            wrong.append(name)
    return (plan, wrong) if wrong else (plan.with_constants(found, str(output.path)), [])


@contextmanager
def replaced(model: LoadedModel, plan: Plan) -> Iterator[None]:
    """Within the context, the plan's experts return their constants; nothing else changes. All experts run, those with weight 0."""
    import torch

    from expertsmith.engine.layout import experts_of

    assert model.architecture is not None
    with ExitStack() as stack:
        for layer, entry in plan.novices.items():
            table = torch.zeros(len(entry.experts) + len(plan.kept[layer]), entry.width)
            table[entry.experts] = torch.from_numpy(np.array(plan.constants(layer)))
            chosen = torch.zeros(len(table), dtype=torch.bool)
            chosen[entry.experts] = True
            experts: Any = experts_of(model.layers[layer], model.architecture)
            experts.forward = _replaced(experts, table, chosen)
            stack.callback(experts.__dict__.pop, "forward", None)
        yield


def _replaced(experts: Any, table: torch.Tensor, chosen: torch.Tensor) -> Any:
    from expertsmith.engine.layout import routing_of

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        selected, weights = routing_of(args, kwargs)
        constant = chosen.to(selected.device)[selected].reshape(weights.shape)
        others = weights.masked_fill(constant, 0)
        out: torch.Tensor = type(experts).forward(
            experts,
            hidden_states,
            *(others if value is weights else value for value in args),
            **{name: others if value is weights else value for name, value in kwargs.items()},
        )
        shares = (weights * constant).reshape(-1, weights.shape[-1], 1).float()
        values = table.to(selected.device)[selected].reshape(-1, weights.shape[-1], table.shape[-1])
        return out + (shares * values).sum(1).reshape(out.shape).to(out.dtype)

    return forward
