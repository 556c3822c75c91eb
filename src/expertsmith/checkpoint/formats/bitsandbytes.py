"""bitsandbytes: 4 bits (NF4, FP4, also with quantised scales) and LLM.int8, decoded by the library itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint.formats.base import Format, Headers, Read, Stored, ceil_div, misfit, missing
from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

STATE = ".quant_state.bitsandbytes__"
INSTALL = 'pip install "expertsmith[bnb]"'


def _find_four(headers: Headers) -> Iterator[Stored]:
    if headers.method == "bitsandbytes":
        yield from (_four_bits(name, headers) for name in headers.tensors if STATE in name)


def _find_eight(headers: Headers) -> Iterator[Stored]:
    for name, info in headers.tensors.items():
        if headers.method != "bitsandbytes" or info.dtype != "I8" or not name.endswith(".weight"):
            continue
        scale = name.removesuffix("weight") + "SCB"
        if scale not in headers.tensors:
            raise missing(name, scale)
        parts = {"codes": info, "scale": headers.tensors[scale]}
        if parts["scale"].shape != info.shape[:1]:
            raise misfit(parts["scale"], name, info.shape, info.shape[:1])
        if f"{name}_format" in headers.tensors:
            parts["layout"] = headers.tensors[f"{name}_format"]
        yield Stored(name, info.shape, "bitsandbytes_int8", parts)


def _four_bits(state: str, headers: Headers) -> Stored:
    weight = state.partition(STATE)[0]
    if weight not in headers.tensors:
        raise missing(weight, weight)
    parts = {"codes": headers.tensors[weight], "state": headers.tensors[state]}
    for leaf in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        if f"{weight}.{leaf}" in headers.tensors:
            parts[leaf] = headers.tensors[f"{weight}.{leaf}"]
    try:
        described: dict[str, Any] = json.loads(bytes(headers.read(state).tolist()).decode("utf-8"))
        shape = tuple(int(n) for n in described["shape"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{state} is not a description of a quantised weight", "the checkpoint is damaged; download it again"
        ) from None
    nested = "nested_blocksize" in described or ("absmax" in parts and parts["absmax"].dtype == "U8")
    for leaf in ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ())):
        if leaf not in parts:
            raise missing(weight, f"{weight}.{leaf}")
    size = prod(shape)
    if (size + 1) // 2 != parts["codes"].nbytes:
        raise UserError(
            f"{state} says {list(shape)}, which does not fit {weight} of {parts['codes'].nbytes} bytes",
            "the checkpoint is damaged",
        )
    blocks = ceil_div(size, int(described.get("blocksize") or 64))
    counts = {
        "absmax": blocks,
        "nested_absmax": ceil_div(blocks, int(described.get("nested_blocksize") or 256)),
        "quant_map": 16,
    }
    for leaf, count in counts.items():
        if leaf in parts and parts[leaf].numel != count:
            raise misfit(parts[leaf], weight, shape, [count])
    return Stored(weight, shape, "bitsandbytes_4bit", parts, {"state": state, "type": described.get("quant_type", "nf4")})


def _library() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "this checkpoint was quantised by bitsandbytes, which only its own library can decode, but it is not installed",
            INSTALL,
        )
    import bitsandbytes

    return bitsandbytes.functional


def _decode_four(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    functional = _library()
    for role, info in stored.parts.items():
        if info.dtype in ("F32", "F16", "BF16"):
            stored.scale(role, read)  # refuses NaN and inf
    prefix = f"{stored.name}."
    held = {info.name.removeprefix(prefix): stored.part(role, read) for role, info in stored.parts.items() if role != "codes"}
    state = functional.QuantState.from_dict(
        {f"weight.{name}": value for name, value in held.items()}, device=torch.device("cpu")
    )
    state.dtype = torch.float32
    values: torch.Tensor = functional.dequantize_4bit(stored.part("codes", read), state)
    return values.reshape(stored.shape)[first:last].to(dtype)


def _decode_eight(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """code · scale / 127, with one scale per row."""
    functional = _library()
    if "layout" in stored.parts and int(stored.part("layout", read).reshape(-1)[0]) != 0:
        raise UserError(f"{stored.name} is stored in a GPU layout", "only row-major LLM.int8 weights can be decoded")
    codes = stored.part("codes", read, first, last)
    values: torch.Tensor = functional.int8_vectorwise_dequant(codes, stored.scale("scale", read, first, last))
    return values.to(dtype)


FORMATS = (
    Format(
        name="bitsandbytes_4bit",
        methods=("bitsandbytes",),
        reference="the library, which decodes it",
        tensors="`weight` U8, `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`",
        title=lambda stored: f"bitsandbytes, {str(stored.settings['type']).upper()}",
        find=_find_four,
        decode=_decode_four,
    ),
    Format(
        name="bitsandbytes_int8",
        methods=("bitsandbytes",),
        reference="the library, which decodes it",
        tensors="`weight` I8, `SCB`",
        title=lambda stored: "bitsandbytes, INT8",
        find=_find_eight,
        decode=_decode_eight,
    ),
)
