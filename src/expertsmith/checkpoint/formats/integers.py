"""Integers of compressed-tensors: `pack-quantized` (2 to 8 bits in int32 words) and `int-quantized` (one byte each).

w = (code - zero) · scale.

Kimi-K2-Thinking and RedHatAI's W4A16 checkpoints are packed; W8A8 checkpoints have bytes. Packed codes are offset by 2^(bits - 1); zero
points of asymmetric weights are packed along the outputs in the same way. `weight_g_idx` (actorder "group"): the group of every column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint.formats.base import (
    Format,
    Headers,
    Read,
    Stored,
    blocks,
    ceil_div,
    disagree,
    groups_of,
    misfit,
    missing,
    pack,
    unpack,
)
from expertsmith.checkpoint.reader import TensorInfo
from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

PACKED = ".weight_packed"


def _find_packed(headers: Headers, symmetric: bool) -> Iterator[Stored]:
    for name, info in headers.tensors.items():
        if not name.endswith(PACKED) or info.dtype != "I32":
            continue
        stem = name.removesuffix(PACKED)
        parts = {"codes": info} | {
            role: headers.tensors[f"{stem}.{leaf}"]
            for role, leaf in (
                ("scale", "weight_scale"),
                ("zero", "weight_zero_point"),
                ("shape", "weight_shape"),
                ("order", "weight_g_idx"),
            )
            if f"{stem}.{leaf}" in headers.tensors
        }
        if ("zero" not in parts and "order" not in parts) != symmetric:
            continue
        for role, leaf in (("scale", "weight_scale"), ("shape", "weight_shape")):
            if role not in parts:
                raise missing(f"{stem}.weight", f"{stem}.{leaf}")
        said = headers.weights_of(stem)
        shape = tuple(int(n) for n in headers.read(parts["shape"].name).tolist())
        bits, dense = _packing(parts, shape, said)
        _check_zeros(parts, stem, shape, bits, said)
        settings = {"bits": bits, "group": _group(parts["scale"], stem, shape, said), "dense": dense}
        yield Stored(f"{stem}.weight", shape, "int_packed" if symmetric else "int_packed_ordered", parts, settings)


def _packing(parts: Mapping[str, TensorInfo], shape: tuple[int, ...], said: Mapping[str, Any]) -> tuple[int, bool]:
    """(bits of a code, whether codes cross the borders of words), after checking that shape, codes and config agree."""
    info, told = parts["codes"], parts["shape"].name
    if len(shape) != len(info.shape) or min(shape) < 1 or shape[:-1] != info.shape[:-1]:
        raise UserError(
            f"{told} says {list(shape)}, which contradicts {info.name} {list(info.shape)}", "the checkpoint is damaged"
        )
    bits = int(said.get("num_bits") or 4)
    dense = ceil_div(shape[-1] * bits, 32) == info.shape[-1]
    if not dense and ceil_div(shape[-1], 32 // bits) != info.shape[-1]:
        raise disagree(info.name, "bits", f"{32 * info.shape[-1] / shape[-1]:g} ({told} says {list(shape)})", bits)
    if said.get("type") not in (None, "int"):
        raise disagree(info.name, "codes of", "int", said["type"])
    if said.get("symmetric") is not None and bool(said["symmetric"]) != ("zero" not in parts):
        raise disagree(info.name, "symmetric", "zero" not in parts, said["symmetric"])
    return bits, dense


def _check_zeros(
    parts: Mapping[str, TensorInfo], stem: str, shape: tuple[int, ...], bits: int, said: Mapping[str, Any]
) -> None:
    """Check that zero points and the order of groups fit the weight."""
    if "zero" in parts:
        _group(parts["scale"], stem, shape, said)
        groups = parts["scale"].shape[-1] if len(parts["scale"].shape) > 1 else 1
        packed = [ceil_div(shape[-2] * bits, 32), groups]
        wanted = packed if parts["zero"].dtype == "I32" else [shape[-2], groups]
        if list(parts["zero"].shape[-2:]) != wanted and prod(parts["zero"].shape) != 1:
            raise misfit(parts["zero"], f"{stem}.weight", shape, wanted)
    if "order" in parts and parts["order"].shape != shape[-1:]:
        raise misfit(parts["order"], f"{stem}.weight", shape, shape[-1:])


def _group(scale: TensorInfo, stem: str, shape: tuple[int, ...], said: Mapping[str, Any]) -> int:
    """The number of columns that share a scale; -1: all of a row or of the tensor."""
    if prod(scale.shape) == 1:
        return -1
    rows, columns = shape[-2:]
    if list(scale.shape) == [*shape[:-2], rows]:
        return -1
    groups = scale.shape[-1]
    size = ceil_div(columns, groups)
    if list(scale.shape) != [*shape[:-1], groups] or ceil_div(columns, size) != groups:
        raise misfit(scale, f"{stem}.weight", shape, "one scale for each row and group of columns is expected")
    told = said.get("group_size")
    if said.get("strategy") in ("group", "tensor_group") and told and groups != groups_of(columns, int(told)):
        raise disagree(f"{stem}.weight", "group_size", size, told)
    if said.get("strategy") in ("channel", "tensor") and groups > 1:
        raise disagree(f"{stem}.weight", "group_size", size, f"strategy {said['strategy']}")
    return -1 if groups == 1 else int(told or size)


def _decode_packed(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    bits = stored.settings["bits"]
    codes = _unpacked(stored.part("codes", read, first, last), stored) - 2 ** (bits - 1)
    zero = None
    if "zero" in stored.parts:
        zero = stored.part("zero", read)
        if stored.parts["zero"].dtype == "I32":
            rows = stored.shape[-2]
            zero = unpack(zero.transpose(-1, -2), bits, rows).transpose(-1, -2) - 2 ** (bits - 1)
        zero = zero[first:last] if zero.shape[0] == stored.shape[0] else zero
    return _scaled(codes, zero, stored, read, first, last).to(dtype)


def _unpacked(words: torch.Tensor, stored: Stored) -> torch.Tensor:
    bits, columns = stored.settings["bits"], stored.shape[-1]
    if stored.settings["dense"]:
        return unpack(words, bits, columns)
    each = 32 // bits  # earlier versions left the rest of a word empty
    return unpack(words.unsqueeze(-1), bits, each).flatten(-2)[..., :columns]


def _scaled(codes: torch.Tensor, zero: torch.Tensor | None, stored: Stored, read: Read, first: int, last: int) -> torch.Tensor:
    """(code - zero) · scale in float32; zero and scale are per row and group of columns."""
    import torch

    part = stored.parts["scale"]
    whole = prod(part.shape) == 1
    scale = stored.scale("scale", read) if whole else stored.scale("scale", read, first, last)
    values = codes.float()
    if whole or scale.dim() < codes.dim():
        scale = scale.reshape(1) if whole else scale.unsqueeze(-1)
        if zero is not None:
            values -= zero.float().reshape(scale.shape)
        return values.mul_(scale)
    columns = codes.shape[-1]
    place = torch.arange(columns) // (stored.settings["group"] if stored.settings["group"] > 0 else columns)
    if "order" in stored.parts:
        order = stored.part("order", read).long()
        if int(order.min()) >= 0:  # -1: the order was not used
            place = order
        if int(order.max()) >= scale.shape[-1]:
            raise UserError(
                f"{stored.parts['order'].name} names a group that {part.name} does not have", "the checkpoint is damaged"
            )
    if zero is not None:
        values -= zero.float().expand(*zero.shape[:-1], scale.shape[-1])[..., place]
    return values.mul_(scale[..., place])


def _encode_packed(values: torch.Tensor, stored: Stored) -> dict[str, torch.Tensor]:
    """scale = max |w| of the group / (2^(bits - 1) - 1); code = w / scale, to nearest."""
    bits = stored.settings["bits"]
    codes, scale = _codes(values, stored, bits)
    codes = codes + 2 ** (bits - 1)
    if stored.settings["dense"]:
        words = pack(codes, bits)
    else:
        each = 32 // bits
        words = pack(blocks(codes, 1, each).squeeze(-3), bits).squeeze(-1)
    return {"codes": words, "scale": scale}


def _codes(values: torch.Tensor, stored: Stored, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    from expertsmith.checkpoint.reader import TORCH_DTYPES

    part = stored.parts["scale"]
    most = 2 ** (bits - 1) - 1
    columns = values.shape[-1]
    if prod(part.shape) == 1:
        if values.shape != stored.parts["codes"].shape and len(values.shape) > 2:
            raise UserError(f"{part.name} is one scale for all experts, so single experts cannot be re-quantised")
        top = values.abs().amax().reshape([1] * values.dim())
        size = columns
    else:
        size = stored.settings["group"] if stored.settings["group"] > 0 else columns
        top = blocks(values, 1, size).abs().amax((-3, -1))
    kind: torch.dtype = getattr(torch, TORCH_DTYPES[part.dtype])
    scale = (top / most).clamp_min(float(torch.finfo(kind).tiny)).to(kind)
    factor = scale.float()
    if prod(part.shape) > 1:
        factor = factor.repeat_interleave(size, -1)[..., :columns]
    codes = (values / factor).round().clamp(-most - 1, most).to(torch.int16)
    shape = list(part.shape)
    if prod(part.shape) > 1:
        shape[: values.dim() - 1] = values.shape[:-1]
    return codes, scale.reshape(shape)


def _find_bytes(headers: Headers) -> Iterator[Stored]:
    if headers.method != "compressed-tensors":
        return
    for name, info in headers.tensors.items():
        if not name.endswith(".weight") or info.dtype != "I8" or len(info.shape) < 2:
            continue
        stem = name.removesuffix(".weight")
        said = headers.weights_of(stem)
        if f"{name}_scale" not in headers.tensors:
            raise missing(name, f"{name}_scale")
        parts = {"codes": info, "scale": headers.tensors[f"{name}_scale"]}
        if f"{name}_zero_point" in headers.tensors:
            parts["zero"] = headers.tensors[f"{name}_zero_point"]
            if parts["zero"].shape != parts["scale"].shape and prod(parts["zero"].shape) != prod(parts["scale"].shape):
                raise misfit(parts["zero"], name, info.shape, parts["scale"].shape)
        if said.get("type") not in (None, "int"):
            raise disagree(name, "codes of", "int", said["type"])
        if said.get("symmetric") is not None and bool(said["symmetric"]) != ("zero" not in parts):
            raise disagree(name, "symmetric", "zero" not in parts, said["symmetric"])
        size = _group(parts["scale"], stem, info.shape, said)
        bits = int(said.get("num_bits") or 8)
        yield Stored(name, info.shape, "int_bytes", parts, {"bits": bits, "group": size})


def _decode_bytes(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    codes = stored.part("codes", read, first, last)
    zero = None
    if "zero" in stored.parts:
        zero = stored.part("zero", read)
        zero = zero[first:last] if prod(stored.parts["zero"].shape) > 1 else zero
    return _scaled(codes, zero, stored, read, first, last).to(dtype)


def _title(stored: Stored) -> str:
    bits, size = stored.settings["bits"], stored.settings["group"]
    whole = prod(stored.parts["scale"].shape) == 1
    kind = f"groups of {size}" if size > 0 else "one scale per tensor" if whole else "one scale per channel"
    more = [word for word, role in (("asymmetric", "zero"), ("columns in a custom order", "order")) if role in stored.parts]
    return ", ".join([f"INT{bits}", kind, *more])


PACKING = "`weight_packed` I32, `weight_scale`, `weight_shape`"
FORMATS = (
    Format(
        name="int_packed",
        methods=("compressed-tensors",),
        reference="compressed-tensors",
        tensors=PACKING,
        title=_title,
        find=lambda headers: _find_packed(headers, symmetric=True),
        decode=_decode_packed,
        encode=_encode_packed,
        constant=("shape",),
    ),
    Format(
        name="int_packed_ordered",
        methods=("compressed-tensors",),
        reference="compressed-tensors",
        tensors=f"{PACKING}, and `weight_zero_point` (asymmetric) or `weight_g_idx` (actorder)",
        title=_title,
        find=lambda headers: _find_packed(headers, symmetric=False),
        decode=_decode_packed,
        constant=("shape", "order"),
    ),
    Format(
        name="int_bytes",
        methods=("compressed-tensors",),
        reference="compressed-tensors",
        tensors="`weight` I8, `weight_scale`, `weight_zero_point` where asymmetric",
        title=_title,
        find=_find_bytes,
        decode=_decode_bytes,
    ),
)
