"""Experts with fewer neurons (method `heapr`) in a checkpoint: what is refused, the tensors, config.json, and the masked reference of `verify`.

A neuron is a row of an expert's gate and up projections and a column of its down projection. If all experts keep the same number, config.json gets
it as the experts' width, and any engine loads the result. In many families the same number sizes the shared experts, as width * count. They
are never pruned: their count becomes the next one that holds them, and they are filled up with neurons of zeros, which change nothing.
Otherwise `engine.narrow` builds the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from expertsmith.arch import config_get, config_present, config_set, text_config
from expertsmith.arch.base import Layout, neuron_axis
from expertsmith.checkpoint.floats import bytes_of, quantisation_of, source_of
from expertsmith.checkpoint.writer import Made, OutputTensor, Piece
from expertsmith.errors import UserError
from expertsmith.experts.inventory import NEURONS_KEY, Claim, Inventory
from expertsmith.experts.weights import layout_of, part_shape
from expertsmith.planning.plan import Plan
from expertsmith.planning.sizes import shared_claims, shared_count

if TYPE_CHECKING:
    import torch

    from expertsmith.engine import LoadedModel


def check_neurons(inventory: Inventory, width: str) -> None:
    """Refuse a checkpoint whose experts cannot lose neurons.

    Args:
        width: "model", "layer" or "ragged", as in `methods.neurons.cut`.

    Raises:
        UserError: with the reason.
    """
    record, remedy = inventory.architecture, "use a method that removes experts, e.g. reap"
    claims = [claim for layer in inventory.layers for claim in inventory.expert_claims(layer)[0]]
    stacked = next((claim for claim in claims if claim.kind == "stacked"), None)
    own = "pass -O width=layer, for expertsmith's own loader"
    why = None
    if quantisation_of(inventory.checkpoint) is not None:
        why = "it is quantised, and the kept neurons of a block of codes share their scale with others"
        remedy = "write it in bfloat16 first with `expertsmith dequantise`"
    elif any(layout_of(claim, inventory) is None for claim in claims):
        why = "the layout of its experts' tensors is not known"
    elif width == "model":
        if record.sized_by_width == "more":
            why, remedy = f"{record.expert_width_key[0]} in its config.json sizes other modules too", own
    elif width == "ragged" and stacked is not None:
        why, remedy = f"{stacked.info.name} stacks the experts of a layer, so they have one width", own
    else:
        why = why_not_narrow(inventory)
        remedy = "pass -O width=model" if record.sized_by_width != "more" else remedy
    if why is not None:
        raise UserError(f"experts of {inventory.checkpoint.source} cannot lose neurons: {why}", remedy)


def width_of(plan: Plan) -> str:
    """Which of the `width`s of `methods.neurons.cut` a plan has."""
    if plan.one_width is not None:
        return "model"
    return "ragged" if any(len(set(held.counts)) > 1 for held in plan.neurons.values()) else "layer"


def why_not_narrow(inventory: Inventory) -> str | None:
    """Why `engine.narrow` cannot build a checkpoint's layers; None: it can."""
    from expertsmith.surgery.uneven import why_not_custom

    why = inventory.architecture.no_class or why_not_custom(inventory)
    if why is not None:
        return why
    from accelerate import init_empty_weights

    from expertsmith.engine.building import transformers_config
    from expertsmith.engine.layout import experts_of, is_grouped  # torch and transformers: for this only
    from expertsmith.engine.uneven import causal_lm

    auto, config = causal_lm(transformers_config(inventory.checkpoint))
    with init_empty_weights():
        module = auto.from_config(config, trust_remote_code=False)
    layer = module.get_submodule(f"{inventory.architecture.layers}.{inventory.layers[0]}")
    grouped = is_grouped(experts_of(layer, inventory.architecture))
    return None if grouped else "transformers does not describe the layout of its experts"


def neuron_tensor(claim: Claim, plan: Plan, inventory: Inventory) -> OutputTensor:
    """A routed weight with the kept neurons only: their bytes, in ascending order."""
    assert claim.layer is not None
    layout, kept, width = layout_of(claim, inventory), plan.kept_neurons(claim.layer), plan.neurons[claim.layer].width
    assert layout is not None
    info, count, shape = claim.info, inventory.experts_in(claim.layer), part_shape(claim)
    axis = neuron_axis(layout, len(shape))
    owners = [claim.expert] if claim.kind == "expert" else list(range(count))
    if axis is None:  # a bias of the output
        return OutputTensor(info.name, info.dtype, info.shape, (source_of(inventory.checkpoint, info),))
    pieces: list[Piece | Made] = []
    sizes = []
    for expert in owners:
        assert expert is not None
        # zero experts, whose tensors nothing reads, get the width of the others
        ids = places(layout, kept[expert] if expert < count else np.arange(plan.neurons[claim.layer].counts[0]), width)
        sizes.append(len(ids))
        nbytes = info.nbytes // info.numel * int(np.prod(shape)) // shape[axis] * len(ids)
        pieces.append(Made(nbytes, partial(_taken, claim, expert, axis, ids, inventory)))
    if claim.extra:
        raise UserError(f"{info.name} holds rows that are not experts, so its experts cannot lose neurons")
    return OutputTensor(info.name, info.dtype, _shape(claim, axis, sizes), tuple(pieces))


def places(layout: Layout, kept: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    """The indices of kept neurons along their axis: twice in a tensor that holds gate and up."""
    if layout.startswith("gate_up"):
        return np.concatenate((kept, kept + width))
    if layout.startswith("alternating"):
        return np.stack((2 * kept, 2 * kept + 1), -1).reshape(-1)
    return kept


def _shape(claim: Claim, axis: int, sizes: Sequence[int]) -> tuple[int, ...]:
    shape = list(claim.info.shape)
    if claim.kind == "expert":
        shape[axis] = sizes[0]
    elif claim.rows > 1 and axis == 0:  # experts and neurons on one axis
        shape[claim.row_axis] = sum(sizes)
    else:
        shape[claim.row_axis + 1 + axis - (claim.rows > 1)] = sizes[0]
    return tuple(shape)


def _taken(claim: Claim, expert: int, axis: int, ids: np.ndarray[Any, Any], inventory: Inventory) -> memoryview:
    import torch

    part = inventory.rows(claim, expert).reshape(part_shape(claim))
    return bytes_of(part.index_select(axis, torch.from_numpy(ids.astype(np.int64))))


def filled_shared(tensors: Sequence[OutputTensor], plan: Plan, inventory: Inventory) -> list[OutputTensor]:
    """The tensors, those of shared experts filled up if config.json sizes them by the width of the routed experts."""
    if plan.one_width is None or inventory.architecture.sized_by_width != "shared":
        return list(tensors)
    before = next(iter(plan.neurons.values())).width
    shared = {claim.info.name: claim for claim in shared_claims(inventory)}
    return [
        _filled(tensor, shared[tensor.name], before, plan, inventory) if tensor.name in shared else tensor for tensor in tensors
    ]


def _filled(tensor: OutputTensor, claim: Claim, width: int, plan: Plan, inventory: Inventory) -> OutputTensor:
    """A shared expert's tensor with neurons of zeros at its end, as many as config.json says.

    Args:
        width: neurons that the source's routed experts have.
    """
    assert plan.one_width is not None
    axis = shared_axis(claim, inventory)
    if axis is None:
        return tensor
    had, shape = tensor.shape[axis], list(tensor.shape)
    shape[axis] = shared_count(inventory, width, plan.one_width) * plan.one_width
    if shape[axis] == had:
        return tensor
    extra = tensor.nbytes // had * (shape[axis] - had)
    if axis == 0:
        return OutputTensor(tensor.name, tensor.dtype, tuple(shape), (*tensor.pieces, Made(extra, partial(bytes, extra))))
    made = Made(tensor.nbytes + extra, partial(_widened, claim, shape[axis], inventory))
    return OutputTensor(tensor.name, tensor.dtype, tuple(shape), (made,))


def shared_axis(claim: Claim, inventory: Inventory) -> int | None:
    """The axis of a shared expert's tensor that runs over its neurons; None for the bias of its down projection.

    Raises:
        UserError: a tensor of another kind.
    """
    name = claim.rest.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if name not in ("gate_proj", "linear_gate", "up_proj", "down_proj"):
        raise UserError(
            f"{claim.info.name}: the layout of this tensor of a shared expert is not known, so it cannot be filled up",
            "pass -O width=layer, for expertsmith's own loader",
        )
    if name == "down_proj":
        return 1 if len(claim.info.shape) == 2 else None
    return 0


def _widened(claim: Claim, width: int, inventory: Inventory) -> memoryview:
    import torch

    held = inventory.checkpoint.read(claim.info.name)
    wide = torch.zeros(held.shape[0], width, dtype=held.dtype)
    wide[:, : held.shape[1]] = held
    return bytes_of(wide)


def write_widths(config: dict[str, Any], plan: Plan, inventory: Inventory) -> None:
    """Put the experts' new width into a config.json that was copied from the source, and the count of shared experts that fits it; if experts
    have different widths, list them for `engine.narrow`."""
    inner: dict[str, Any] = text_config(config)  # type: ignore[assignment]
    width, record = plan.one_width, inventory.architecture
    if width is None:
        from expertsmith.engine.building import transformers_config  # torch and transformers: for this only
        from expertsmith.engine.uneven import auto_map

        inner[NEURONS_KEY] = {
            str(layer): held.counts if len(set(held.counts)) > 1 else held.counts[0] for layer, held in plan.neurons.items()
        }
        config["auto_map"] = auto_map(transformers_config(inventory.checkpoint))
        return
    before = next(iter(plan.neurons.values())).width
    for key in tuple(config_present(inner, record.expert_width_key)) or record.expert_width_key[:1]:
        held = config_get(inner, key)
        config_set(inner, key, [width if number == before else number for number in held] if isinstance(held, list) else width)
    if record.sized_by_width == "shared" and record.shared_key and shared_claims(inventory):
        config_set(inner, record.shared_key, shared_count(inventory, before, width))


@contextmanager
def silenced(model: LoadedModel, plan: Plan) -> Iterator[None]:
    """Within the context, neurons that the plan does not keep have no effect: their columns of the down projections are zeros. In stream mode a
    layer is edited whenever it is loaded."""
    layers = [layer for layer in plan.neurons if layer < len(model.layers)]  # without multi-token prediction
    with ExitStack() as stack:
        if model.memory == "stream" and layers:
            held = model._experts
            model.whole()
            stack.callback(setattr, model, "_experts", held)
            stack.callback(lambda: model.__dict__.pop("bring", None))
            model.bring = partial(_bring, model.bring, model, plan, layers)  # type: ignore[method-assign]
        else:
            for layer in layers:
                stack.callback(_silence(model, plan, layer))
        yield


def _bring(bring: Callable[[int], None], model: LoadedModel, plan: Plan, layers: list[int], index: int) -> None:
    bring(index)
    if index in layers:
        _silence(model, plan, index)


def _silence(model: LoadedModel, plan: Plan, layer: int) -> Callable[[], None]:
    import torch

    from expertsmith.engine.layout import expert_count, experts_of, in_memory

    assert model.architecture is not None
    experts, width = experts_of(model.layers[layer], model.architecture), plan.neurons[layer].width
    saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for expert, ids in enumerate(plan.kept_neurons(layer)):
            down = in_memory(experts, model.architecture, expert, expert_count(experts))["down", True]
            gone = torch.ones(width, dtype=torch.bool)
            gone[torch.from_numpy(np.array(ids, dtype=np.int64))] = False
            at = gone.nonzero()[:, 0].to(down.device)
            saved.append((down, at, down[:, at].clone()))
            down[:, at] = 0
    return partial(_restore, saved)


def _restore(saved: list[tuple[Any, Any, Any]]) -> None:
    import torch

    with torch.no_grad():
        for down, at, values in saved:
            down[:, at] = values
