"""Convert healed weights between a layer in memory and the checkpoint's own names and dtypes, and write the healed checkpoint, in which
everything else keeps its bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from expertsmith.arch.base import neuron_axis, roles_of, split
from expertsmith.checkpoint.floats import SIDE_FILES, Floats, bytes_of, source_of
from expertsmith.checkpoint.reader import TORCH_DTYPES
from expertsmith.checkpoint.writer import Made, OutputTensor, write_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import NEURONS_KEY, Claim, Inventory, ragged_layers
from expertsmith.experts.weights import FLOATS, is_matrix, layout_of
from expertsmith.healing.experts import LayerExperts
from expertsmith.surgery.merge import router_tensor
from expertsmith.surgery.uneven import code_for
from expertsmith.views.progress import Progress

ROUTER = "router"


def check_floats(inventory: Inventory) -> None:
    """Refuse checkpoints whose experts are neither floats nor decode to floats.

    Raises:
        UserError: such a tensor, or a tensor with an unknown layout.
    """
    for claim in inventory.floats.claims:
        if claim.routed and claim.info.dtype not in FLOATS:
            raise UserError(
                f"{claim.info.name} is {claim.info.dtype}: experts in it cannot be healed", "please report this checkpoint"
            )
        if claim.routed and layout_of(claim, inventory) is None:
            raise UserError(
                f"{claim.info.name}: it is not known which projection of an expert this is", "please report this checkpoint"
            )


def trainable_router(claim: Claim, inventory: Inventory) -> bool:
    """Whether a tensor holds router weights that gradients reach; a bias that only acts on the selection is not one."""
    record = inventory.architecture
    block = f"{record.block}." if record.block else ""
    selection = [(block + path).rpartition(".")[2] for path in record.selection_bias]
    leaf = claim.rest.rpartition(".")[2]
    return claim.kind == "stacked" and not claim.routed and claim.info.dtype in FLOATS and leaf not in selection


def _concerned(claim: Claim, inventory: Inventory, roles: Collection[str]) -> bool:
    """Whether a tensor holds weights of any of `roles`."""
    if claim.kind not in ("expert", "stacked"):
        return False
    if not claim.routed:
        return ROUTER in roles and trainable_router(claim, inventory)
    layout = layout_of(claim, inventory)
    assert layout is not None
    return not set(roles_of(layout)).isdisjoint(roles)


def _pieces(
    layer: LayerExperts, inventory: Inventory, claim: Claim, tensor: torch.Tensor, roles: Collection[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield views of all weights of `roles`: into `tensor` (shaped as in the checkpoint), into memory, and the zeros that follow in memory if
    the experts of a layer have different widths (`engine.narrow`)."""
    if not claim.routed:
        memory = router_tensor(layer.block, claim, layer.record)
        yield tensor, memory, memory[:0]
        return
    layout = layout_of(claim, inventory)
    assert layout is not None
    ragged = claim.layer in ragged_layers(inventory.config)
    experts = range(layer.count) if claim.kind == "stacked" else [claim.expert]
    for expert in experts:
        if expert is None or expert >= layer.count:
            continue
        part = tensor
        if claim.kind == "stacked":
            part = tensor[expert * claim.rows : (expert + 1) * claim.rows]
            part = part[0] if claim.rows == 1 and part.dim() > 1 else part
        views = layer.views(expert)
        for role, view in split(layout, part).items():
            if role in roles:
                memory = views[role, is_matrix(claim)]
                axis = neuron_axis("down" if role == "down" else "up", view.dim()) if ragged else None
                yield view, *((memory, memory[:0]) if axis is None else memory.tensor_split([view.shape[axis]], axis))


@torch.no_grad()
def to_checkpoint(layer: LayerExperts, inventory: Inventory, index: int, roles: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors of decoder layer `index` that differ from the checkpoint, rounded once to its dtypes."""
    changed = {}
    for claim in inventory.by_layer[index]:
        if _concerned(claim, inventory, roles):
            old = inventory.checkpoint.read(claim.info.name)
            tensor = old.clone()
            for view, memory, _ in _pieces(layer, inventory, claim, tensor, roles):
                view.copy_(memory)
            if not torch.equal(tensor, old):
                changed[claim.info.name] = tensor
    return changed


@torch.no_grad()
def into_memory(
    layer: LayerExperts, inventory: Inventory, index: int, tensors: Mapping[str, torch.Tensor], roles: Collection[str]
) -> None:
    """Set the layer in memory to the values of `tensors`; all other weights get the source's values."""
    for claim in inventory.by_layer[index]:
        if _concerned(claim, inventory, roles):
            name = claim.info.name
            tensor = tensors[name] if name in tensors else inventory.checkpoint.read(name)
            for view, memory, zeros in _pieces(layer, inventory, claim, tensor, roles):
                memory.copy_(view)
                zeros.zero_()  # training may have moved them


def write_healed(
    out: Path,
    inventory: Inventory,
    changed: Collection[str],
    read: Callable[[str], torch.Tensor],
    texts: Mapping[str, str],
    *,
    requantise: bool = False,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Write the checkpoint of `inventory` with new values in some tensors: same names, dtypes, shapes and shards. The float view of a quantised
    checkpoint is written as floats, or with `requantise` in the format of that checkpoint.

    Args:
        changed: names of the healed tensors; the others keep the source's bytes.
        read: returns a healed tensor by name.
        texts: further files (relative path → content).
    """
    source, view = inventory.checkpoint, inventory.checkpoint
    pieces: dict[str, Callable[[], memoryview]] = {}
    for name in changed:
        if requantise and isinstance(view, Floats) and name in view.stored:
            for info in view.stored[name].parts.values():
                pieces[info.name] = partial(_codes, view, read, name, info.name)
        else:
            pieces[name] = partial(_bytes, read, name, view.tensors[name].dtype)
    if requantise and isinstance(view, Floats):
        source = view.raw
    decoded = isinstance(source, Floats)
    tensors = []
    for info in source.tensors.values():
        piece = Made(info.nbytes, pieces[info.name]) if info.name in pieces else source_of(source, info)
        tensors.append(OutputTensor(info.name, info.dtype, info.shape, (piece,)))
    files = None if decoded else {info.name: info.file.name for info in source.tensors.values()}
    narrow, novices = bool(inventory.config.get(NEURONS_KEY)), bool(inventory.novices)
    counts = {layer: count + inventory.novices.get(layer, 0) for layer, count in inventory.counts.items()}
    code = code_for(counts, inventory, novices, narrow) if inventory.uneven or narrow or novices else {}
    with progress.task("write", sum(tensor.nbytes for tensor in tensors), "B") as advance:
        write_checkpoint(
            out,
            tensors,
            source.config,
            source=source,
            texts={**code, **texts},
            overwrite=overwrite,
            shard_of=files,
            without=SIDE_FILES if decoded else (),
            progress=advance,
        )


def _codes(view: Floats, read: Callable[[str], torch.Tensor], name: str, part: str) -> memoryview:
    """The new value of one of the tensors that hold a quantised weight; a tensor that does not depend on the values is unchanged."""
    made = view.encoded(name, _finite(read, name))
    return bytes_of(made[part] if part in made else view.raw.read(part))


def _finite(read: Callable[[str], torch.Tensor], name: str, kind: torch.dtype = torch.float32) -> torch.Tensor:
    values = read(name).to(kind)
    if not bool(values.isfinite().all()):
        raise UserError(f"the healed {name} has NaN or inf", "the values overflow in the checkpoint's dtype")
    return values


def _bytes(read: Callable[[str], torch.Tensor], name: str, dtype: str) -> memoryview:
    return bytes_of(_finite(read, name, getattr(torch, TORCH_DTYPES[dtype])))
