"""GPTQ, and AutoRound's packing of it: codes are packed along the inputs, zero points along the outputs.

w = (code - zero) · scale of group g_idx.

Version 1 stores zero points minus one; `checkpoint_format: gptq_v2` stores them unchanged. `dynamic` (GPTQModel) and `extra_config`
(AutoRound) give single modules other bits or groups, or exclude them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint.formats.base import (
    Format,
    Headers,
    Read,
    Stored,
    ceil_div,
    disagree,
    groups_of,
    misfit,
    missing,
    unpack,
)
from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4, 8)
PACKINGS = ("auto_round:auto_gptq", "auto_gptq")


def _find(headers: Headers) -> Iterator[Stored]:  # noqa: C901  (a check a tensor of the format)
    if not _is_gptq(headers):
        return
    for name, info in headers.tensors.items():
        if not name.endswith(".qweight") or info.dtype != "I32":
            continue
        stem = name.removesuffix(".qweight")
        said = settings_of(headers.config, stem)
        parts = {"codes": info}
        for role, leaf in (("scale", "scales"), ("zero", "qzeros")):
            if f"{stem}.{leaf}" not in headers.tensors:
                raise missing(f"{stem}.weight", f"{stem}.{leaf}")
            parts[role] = headers.tensors[f"{stem}.{leaf}"]
        if f"{stem}.g_idx" in headers.tensors:
            parts["order"] = headers.tensors[f"{stem}.g_idx"]
        bits = said.get("bits")
        if bits not in BITS:
            raise UserError(f"{name}: the quantisation config says {bits!r} bits", f"GPTQ has {', '.join(map(str, BITS))}")
        inputs = parts["order"].shape[0] if "order" in parts else info.shape[0] * 32 // bits
        if ceil_div(inputs * bits, 32) != info.shape[0]:
            raise disagree(name, "bits", f"{32 * info.shape[0] / inputs:g}", bits)
        outputs, size = info.shape[1], int(said.get("group_size") or -1)
        groups = groups_of(inputs, size)
        if parts["scale"].shape != (groups, outputs):
            if parts["scale"].shape[-1:] == (outputs,):
                raise disagree(
                    name, "groups", parts["scale"].shape[0], f"group_size {size}, which is {groups} for {inputs} inputs"
                )
            raise misfit(parts["scale"], f"{stem}.weight", (outputs, inputs), (groups, outputs))
        if parts["zero"].shape != (groups, ceil_div(outputs * bits, 32)):
            raise misfit(parts["zero"], f"{stem}.weight", (outputs, inputs), (groups, ceil_div(outputs * bits, 32)))
        version = 2 if said.get("checkpoint_format") == "gptq_v2" else 1
        settings = {"bits": bits, "group": size, "zero": 2 - version, "ordered": bool(said.get("desc_act"))}
        yield Stored(f"{stem}.weight", (outputs, inputs), "gptq", parts, settings)


def _is_gptq(headers: Headers) -> bool:
    if headers.method == "auto-round":
        packing = str(headers.config.get("packing_format") or "auto_round:auto_gptq")
        if packing not in (*PACKINGS, "auto_round:auto_awq", "auto_awq"):
            raise UserError(
                f"AutoRound's packing_format {packing!r} is not supported",
                f"supported: {', '.join(PACKINGS)} and auto_round:auto_awq",
            )
        return packing in PACKINGS
    if headers.method == "gptq":
        kind = headers.config.get("checkpoint_format") or "gptq"
        if kind not in ("gptq", "gptq_v2"):
            raise UserError(f"GPTQ's checkpoint_format {kind!r} is not supported", "supported: gptq and gptq_v2")
        return True
    return False


def settings_of(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The settings of a GPTQ or AutoRound config for a module, with the module's own settings applied."""
    said = dict(config)
    for pattern, change in (config.get("dynamic") or {}).items():
        wanted = pattern.removeprefix("+:")
        if not pattern.startswith("-:") and re.match(wanted, module):
            said.update(change or {})
            break
    for name, change in (config.get("extra_config") or {}).items():
        if name == module or (set(name) & set("*\\[(|^$") and re.fullmatch(name, module)):
            said.update(change or {})
    return said


def _decode(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    bits, (outputs, inputs) = stored.settings["bits"], stored.shape
    codes = unpack(stored.part("codes", read)[:, first:last].T, bits, inputs)  # [outputs, inputs]
    scale = stored.scale("scale", read)
    zero = unpack(stored.part("zero", read), bits, outputs) + stored.settings["zero"]
    place = torch.arange(inputs) // (stored.settings["group"] if stored.settings["group"] > 0 else inputs)
    if "order" in stored.parts:
        order = stored.part("order", read).long()
        if int(order.min()) < 0 or int(order.max()) >= len(scale):
            raise UserError(f"{stored.parts['order'].name} refers to a group that does not exist", "the checkpoint is damaged")
        if not stored.settings["ordered"] and not torch.equal(order, place):
            raise disagree(stored.parts["order"].name, "columns are", "in a custom order", "desc_act false")
        place = order
    part = slice(first, last)
    values = codes.float() - zero[:, part].T.float()[:, place]
    made: torch.Tensor = values.mul_(scale[:, part].T[:, place]).to(dtype)
    return made


def _title(stored: Stored) -> str:
    size = stored.settings["group"]
    return f"GPTQ, {stored.settings['bits']} bits, " + (f"groups of {size}" if size > 0 else "one scale per channel")


FORMATS = (
    Format(
        name="gptq",
        methods=("gptq", "auto-round"),
        reference="its formula in float64",
        tensors="`qweight`, `qzeros` I32, `scales` F16, `g_idx`; 2, 3, 4, 8 bits, v1 and v2; AutoRound in auto_gptq packing",
        title=_title,
        find=_find,
        decode=_decode,
        constant=("order",),
    ),
)
