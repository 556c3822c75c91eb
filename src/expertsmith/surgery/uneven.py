"""Different numbers of experts per layer in a stock checkpoint: config.json and the module next to it, or layers padded with dead experts.

`write_counts` + `code_for`: config.json keeps the largest number under its usual key and gives every layer its own in
`per_layer_config`, and `modeling_expertsmith.py` lets plain transformers build that (`engine.uneven`). `pad`: every layer is padded to
the largest number with experts of zeros that can never be selected, so the stock class and any engine load it; this saves no memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from expertsmith.arch import config_first, config_get, config_present, config_set, text_config
from expertsmith.checkpoint.writer import Made, OutputTensor, Piece
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Claim, Inventory
from expertsmith.surgery.skip import is_padded

ATTENTION_KEY = "expertsmith_attention"  # as in engine.heads, which needs torch
NEVER = -1e30  # a logit with softmax 0; the dtype's largest finite magnitude if that is smaller
FLAG = "allow_global_per_layer_attribute_access"  # transformers: the number in config.json may be read even if layers differ
FLOATS = {"F64": ("<d", 8, 1.7e308), "F32": ("<f", 4, 3.4e38), "F16": ("<e", 2, 65504.0), "BF16": ("<f", 2, 3.3e38)}


def check_uneven(inventory: Inventory) -> None:
    """Refuse a family whose layers cannot hold different numbers of experts, and a composite that only runs as a whole.

    Raises:
        UserError: with the reason.
    """
    why = inventory.architecture.uneven if is_listed(inventory) else why_not_custom(inventory)
    if why is not None:
        raise UserError(
            f"the layers of a {inventory.architecture.model_type} model cannot have different numbers of experts: {why}",
            "keep the same number in every layer: --uniform",
        )


def why_not_custom(inventory: Inventory) -> str | None:
    """Why the class of `engine.uneven.custom_class` cannot run a checkpoint's family, or a composite that only runs as a whole; None: it
    can."""
    why = inventory.architecture.uneven
    if why is None and inventory.config != inventory.checkpoint.config:
        from expertsmith.engine.building import transformers_config  # torch and transformers: for this only
        from expertsmith.engine.uneven import runs_as_a_whole

        if runs_as_a_whole(transformers_config(inventory.checkpoint)):
            why = "transformers runs this checkpoint's language model only as part of the whole model"
    return why


def refuse_padded(inventory: Inventory) -> None:
    """Refuse a checkpoint with dead experts, because a plan would count them as usable.

    Raises:
        UserError: a checkpoint that was filled up with `pad`.
    """
    if is_padded(inventory.checkpoint.config):
        raise UserError(
            f"layers of {inventory.checkpoint.source} are padded with dead experts, which a plan must not keep",
            "use the original checkpoint, or one written without --pad",
        )


def write_counts(config: dict[str, Any], counts: Mapping[int, int], inventory: Inventory) -> None:
    """Put the numbers of experts (decoder layer → number) into a config.json that was copied from the source.

    The family's own key gets the largest; a list with one number a layer remains a list, and nothing else is needed. If layers differ
    without such a list, `per_layer_config` has every layer's number under the key that transformers' config class stores, and `auto_map`
    names the class of `code_for`. If they do not differ, both are removed (unless they serve another purpose).

    Raises:
        UserError: layers differ and the family does not support that, or transformers does not support the source's config.json.
    """
    inner: dict[str, Any] = text_config(config)  # type: ignore[assignment]
    record, most = inventory.architecture, max(counts.values())
    for key in config_present(inner, record.experts_key + record.extra_config_keys):
        before = config_get(inner, key)
        config_set(inner, key, _listed(before, counts, most) if isinstance(before, list) else most)
    held = "per_layer_config" in inner
    layers = {int(layer): dict(keys) for layer, keys in (inner.pop("per_layer_config", None) or {}).items()}
    for keys in layers.values():
        for key in record.experts_key:
            keys.pop(key.partition(".")[0], None)
    if inventory.uneven:
        inner.pop(FLAG, None)
        if ATTENTION_KEY not in inner:
            config.pop("auto_map", None)
    if len(set(counts.values())) > 1 and not is_listed(inventory):
        from expertsmith.engine.building import transformers_config  # torch and transformers: for this only
        from expertsmith.engine.uneven import auto_map

        check_uneven(inventory)
        theirs = transformers_config(inventory.checkpoint)
        key = next(config_present(inner, record.experts_key))
        key = type(theirs.get_text_config()).attribute_map.get(key, key)
        for layer, count in counts.items():
            config_set(layers.setdefault(layer, {}), key, count)
        inner[FLAG] = True
        config["auto_map"] = auto_map(theirs)
    if any(layers.values()) or (held and not inventory.uneven):  # Gemma 4 treats an empty one differently from none
        inner["per_layer_config"] = {str(layer): keys for layer, keys in sorted(layers.items()) if keys}


def is_listed(inventory: Inventory) -> bool:
    """Whether config.json gives the number of experts as a list, one a decoder layer."""
    found = config_first(inventory.config, inventory.architecture.experts_key)
    return found is not None and isinstance(found[1], list)


def _listed(before: list[int], counts: Mapping[int, int], most: int) -> list[int]:
    """A list of counts with new ones; a layer without experts keeps its number, up to the largest.

    Raises:
        UserError: layers differ, and the list does not have one entry a layer.
    """
    if len(before) > max(counts):
        return [counts.get(layer, min(number, most)) for layer, number in enumerate(before)]
    if len(set(counts.values())) > 1:
        raise UserError(
            f"config.json has a list of {len(before)} expert counts, with no entry for layer {max(counts)}",
            "keep the same number in every layer: --uniform",
        )
    return [most] * len(before)


def code_for(counts: Mapping[int, int], inventory: Inventory, novices: bool = False, narrow: bool = False) -> dict[str, str]:
    """File name → text of the module that plain transformers needs if layers differ, attention was pruned, experts are constants
    (`novices`) or have fewer neurons than config.json says (`narrow`); otherwise empty."""
    uneven = len(set(counts.values())) > 1 and not is_listed(inventory)
    if not uneven and not novices and not narrow and ATTENTION_KEY not in inventory.config:
        return {}
    from expertsmith.engine.building import transformers_config
    from expertsmith.engine.uneven import SHIM, shim_of

    return {SHIM: shim_of(transformers_config(inventory.checkpoint), uneven, novices, narrow)}


def check_padding(inventory: Inventory, counts: Mapping[int, int], groups: int) -> None:
    """Refuse to fill up layers if dead experts would change the routing.

    Args:
        groups: expert_groups of the output.

    Raises:
        UserError: routing weights that are a softmax over all experts, expert_groups, no bias that could hide an expert.
    """
    record = inventory.architecture
    place = f"layers of {inventory.checkpoint.source} cannot be padded with dead experts"
    remedy = "keep the same number in every layer (--uniform), or remove --pad"
    if groups > 1:
        raise UserError(f"{place}: its router scores {groups} expert_groups, which dead experts would change", remedy)
    if record.selection_bias and record.score == "softmax":
        raise UserError(f"{place}: its routing weights are a softmax over all experts, dead ones included", remedy)
    for layer, count in counts.items():
        biases = [claim for claim in inventory.by_layer[layer] if _is_bias(claim, inventory)]
        if count < max(counts.values()) and not biases:
            raise UserError(
                f"{place}: the router of decoder layer {layer} has no bias to keep dead experts from being selected", remedy
            )
        for claim in biases:
            if claim.info.dtype not in FLOATS:
                raise UserError(f"{place}: {claim.info.name} is {claim.info.dtype}, which cannot hold -inf", remedy)


def routing_biases(inventory: Inventory) -> frozenset[str]:
    """Names of the tensors that may hold -inf: selection biases, in which it marks an expert that is never selected."""
    if not inventory.architecture.selection_bias:
        return frozenset()
    return frozenset(claim.info.name for claim in inventory.claims if _is_bias(claim, inventory))


def _is_bias(claim: Claim, inventory: Inventory) -> bool:
    """Whether a tensor holds one number an expert that is added to the router's logits or to its scores for the selection."""
    record = inventory.architecture
    if claim.entry is None or claim.entry.role != "router" or claim.layer is None:
        return False
    if not (record.selection_bias or record.logit_bias):
        return False
    each = prod(claim.info.shape) == inventory.experts_in(claim.layer) + claim.extra
    return each and "bias" in claim.entry.name.rpartition(".")[2]


def pad(tensors: Iterable[OutputTensor], counts: Mapping[int, int], inventory: Inventory) -> list[OutputTensor]:
    """Fill every layer up to the largest number of `counts` with dead experts, whose weights and router rows are zeros and whose bias is
    -inf (a selection bias) or -1e30 (one that is added to the logits).

    `tensors` is the result of `surgery.apply.output_tensors` for `counts`. Check the plan with `check_padding` first.
    """
    most, record = max(counts.values()), inventory.architecture
    claims = {claim.info.name: claim for claim in inventory.claims}
    filled, dead = [], []
    for tensor in tensors:
        layer, rest = record.locate(tensor.name) or (-1, "")
        lacking = most - counts.get(layer, most)
        owner = record.expert_of(rest)
        if owner is not None and owner[0] == 0:
            dead += [_zeros(tensor, rest, expert, record.expert_prefix) for expert in range(most - lacking, most)]
        claim = claims.get(tensor.name)
        if lacking and claim is not None and claim.kind == "stacked":
            tensor = _longer(tensor, claim, most - lacking, lacking, inventory)
        filled.append(tensor)
    return filled + dead


def _zeros(tensor: OutputTensor, rest: str, expert: int, prefixes: Sequence[str]) -> OutputTensor:
    """A tensor of expert 0 as zeros, under the name of another expert."""
    prefix = next(prefix for prefix in prefixes if rest.startswith(prefix.format(expert=0)))
    name = tensor.name.removesuffix(rest) + prefix.format(expert=expert) + rest.removeprefix(prefix.format(expert=0))
    return OutputTensor(name, tensor.dtype, tensor.shape, (Made(tensor.nbytes, partial(bytes, tensor.nbytes)),))


def _longer(tensor: OutputTensor, claim: Claim, count: int, lacking: int, inventory: Inventory) -> OutputTensor:
    """Insert rows for `lacking` experts between the `count` experts' rows and any extra rows."""
    row = tensor.nbytes // (count * claim.rows + claim.extra)
    if _is_bias(claim, inventory):
        value = float("-inf") if inventory.architecture.selection_bias else NEVER
        rows = _encoded(value, tensor.dtype) * lacking
        fill = Made(len(rows), lambda: rows)
    else:
        fill = Made(lacking * claim.rows * row, partial(bytes, lacking * claim.rows * row))
    before, after = _split(tensor.pieces, count * claim.rows * row)
    shape = list(tensor.shape)
    shape[claim.row_axis] += lacking * claim.rows
    return OutputTensor(tensor.name, tensor.dtype, tuple(shape), (*before, fill, *after))


def _encoded(value: float, dtype: str) -> bytes:
    code, size, largest = FLOATS[dtype]
    finite = value == float("-inf") or value >= -largest
    return struct.pack(code, value if finite else -largest)[-size:]  # bfloat16 is the upper half of float32


def _split(pieces: Sequence[Piece | Made], at: int) -> tuple[list[Piece | Made], list[Piece | Made]]:
    """The pieces before and after byte `at` of their concatenation."""
    before: list[Piece | Made] = []
    after: list[Piece | Made] = []
    for piece in pieces:
        head = min(max(at, 0), piece.nbytes)
        if head:
            before.append(_part(piece, 0, head))
        if head < piece.nbytes:
            after.append(_part(piece, head, piece.nbytes))
        at -= piece.nbytes
    return before, after


def _part(piece: Piece | Made, first: int, last: int) -> Piece | Made:
    if isinstance(piece, Piece):
        return Piece(piece.file, piece.start + first, last - first)
    return Made(last - first, lambda: memoryview(piece.make()).cast("B")[first:last])
