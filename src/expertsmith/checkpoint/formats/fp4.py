"""FP4 (E2M1): two codes per byte, the low one first, and a scale for each small group.

NVFP4: groups of 16 with an FP8 scale each, and one float32 scale for the tensor. That scale divides in compressed-tensors
(`weight_global_scale`) and multiplies in modelopt (`weight_scale_2`). MXFP4: groups of 32 with a power of two as scale; gpt-oss stores it
as X_blocks and X_scales, and its float weight X is transposed: [experts, inputs, outputs].
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from expertsmith.checkpoint.formats.base import Format, Headers, Read, Stored, disagree, e2m1, misfit, missing, to_e2m1
from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

POWERS = ("U8", "F8_E8M0")
BYTES = ("U8", "I8", "F4")


def _find_nv(headers: Headers) -> Iterator[Stored]:
    for name, info in headers.tensors.items():
        packed = name.endswith(".weight_packed")
        if info.dtype != "U8" or len(info.shape) < 2 or not (packed or name.endswith(".weight")):
            continue
        weight = name.removesuffix("_packed")
        scale = headers.tensors.get(f"{weight}_scale")
        if scale is None or scale.dtype != "F8_E4M3":
            continue
        top = f"{weight}_global_scale" if packed else f"{weight}_scale_2"
        if top not in headers.tensors:
            raise missing(weight, top)
        if f"{weight}_zero_point" in headers.tensors:
            raise UserError(f"{weight} is NVFP4 with zero points, which is not a known format", "please report this checkpoint")
        *lead, half = info.shape
        shape = (*lead, 2 * half)
        if list(scale.shape) != [*lead, half // 8] or half % 8:
            raise misfit(scale, weight, shape, f"{[*lead, half // 8]} is expected, one scale for 16 inputs")
        whole = headers.tensors[top]
        if prod(whole.shape) not in (1, prod(shape[:-2])):
            raise misfit(whole, weight, shape, "one number is expected")
        _agree(weight, 16, headers)
        yield Stored(weight, shape, "nvfp4", {"codes": info, "scale": scale, "top": whole}, {"divides": packed})


def _agree(weight: str, size: int, headers: Headers) -> None:
    said = headers.weights_of(weight.removesuffix(".weight"))
    told = said.get("num_bits", 4), said.get("type") or "float", said.get("group_size") or size
    if told != (4, "float", size):
        raise disagree(weight, "4 bits of float in groups of", size, f"{told[0]} bits of {told[1]} in groups of {told[2]}")


def _decode_nv(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    top = stored.scale("top", read)
    if not bool(top.all()):
        raise UserError(f"{stored.parts['top'].name} is 0", "the checkpoint is damaged; download it again")
    scale = stored.scale("scale", read, first, last)
    if prod(top.shape) > 1:
        top = top.reshape(-1)[first:last].reshape(-1, *[1] * (scale.dim() - 1))
    scale = scale / top if stored.settings["divides"] else scale * top
    values = e2m1(stored.part("codes", read, first, last))
    return values.mul_(scale.repeat_interleave(16, -1)).to(dtype)


def _find_mx(headers: Headers) -> Iterator[Stored]:
    for name, info in headers.tensors.items():
        if info.dtype not in BYTES or len(info.shape) < 2:
            continue
        if name.endswith("_blocks"):
            yield _blocks(name, headers)
            continue
        weight = name.removesuffix("_packed")
        if not (name.endswith((".weight_packed", ".weight")) or "expert" in name):
            continue
        stem = weight.removesuffix(".weight")
        found = [n for n in (f"{weight}_scale", f"{weight}_scale_inv", f"{stem}.scale") if n in headers.tensors]
        scale = headers.tensors[found[0]] if found else None
        *lead, half = info.shape
        if scale is None or scale.dtype not in POWERS or list(scale.shape) != [*lead, half // 16] or half % 16:
            continue
        if f"{weight}_zero_point" in headers.tensors:
            raise UserError(f"{weight} is MXFP4 with zero points, which is not a known format", "please report this checkpoint")
        _agree(weight, 32, headers)
        yield Stored(weight, (*lead, 2 * half), "mxfp4", {"codes": info, "scale": scale}, {"transposed": False})


def _blocks(name: str, headers: Headers) -> Stored:
    weight, info = name.removesuffix("_blocks"), headers.tensors[name]
    if f"{weight}_scales" not in headers.tensors:
        raise missing(weight, f"{weight}_scales")
    scale = headers.tensors[f"{weight}_scales"]
    if len(info.shape) < 4 or info.shape[-1] != 16 or info.dtype != "U8":
        raise UserError(f"{name} has shape {list(info.shape)}: blocks of 16 bytes are expected", "the checkpoint is damaged")
    *lead, outputs, blocks, _ = info.shape
    if list(scale.shape) != [*lead, outputs, blocks] or scale.dtype not in POWERS:
        raise misfit(scale, weight, (*lead, 32 * blocks, outputs), [*lead, outputs, blocks])
    return Stored(weight, (*lead, 32 * blocks, outputs), "mxfp4", {"codes": info, "scale": scale}, {"transposed": True})


def _decode_mx(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """code · 2^(scale - 127)."""
    import torch

    codes = stored.part("codes", read, first, last)
    scale = stored.scale("scale", read, first, last)
    values = e2m1(codes.view(torch.uint8) if codes.dtype != torch.uint8 else codes)
    if stored.settings["transposed"]:
        return values.mul_(scale.unsqueeze(-1)).flatten(-2).transpose(-1, -2).to(dtype).contiguous()
    return values.mul_(scale.repeat_interleave(32, -1)).to(dtype)


def _encode_mx(values: torch.Tensor, stored: Stored) -> dict[str, torch.Tensor]:
    """scale = 2^(floor(log2 max |w|) - 2) over 32 inputs (OCP Microscaling 1.0, section 6.3; 6 = 1.5 · 2^2 is the largest code);
    nearest code."""
    import torch

    w = values.transpose(-1, -2) if stored.settings["transposed"] else values
    grouped = w.reshape(*w.shape[:-1], -1, 32)
    top = grouped.abs().amax(-1)
    exponent = torch.where(top > 0, torch.frexp(top)[1].float() - 3, torch.zeros_like(top)).clamp(-127, 127)
    codes = to_e2m1(grouped / torch.exp2(exponent.double()).float().unsqueeze(-1))
    scale = (exponent + 127).to(torch.uint8)
    kind = stored.parts["scale"].dtype
    held = scale if kind == "U8" else scale.view(torch.float8_e8m0fnu)
    if stored.settings["transposed"]:
        return {"codes": codes, "scale": held}
    flat = codes.flatten(-2)
    return {"codes": flat.view(torch.int8) if stored.parts["codes"].dtype == "I8" else flat, "scale": held}


FORMATS = (
    Format(
        name="nvfp4",
        methods=("compressed-tensors", "modelopt", "modelopt_fp4", "nvfp4"),
        reference="compressed-tensors; modelopt's by its formula in float64",
        tensors="`weight_packed` or `weight` U8, `weight_scale` F8_E4M3, `weight_global_scale` or `weight_scale_2` F32",
        title=lambda stored: "NVFP4",
        find=_find_nv,
        decode=_decode_nv,
    ),
    Format(
        name="mxfp4",
        methods=("mxfp4", "compressed-tensors", "fp8"),
        reference="transformers convert_moe_packed_tensors, compressed-tensors",
        tensors="`X_blocks`, `X_scales` U8 (gpt-oss), or `weight_packed` with an E8M0 `weight_scale`",
        title=lambda stored: "MXFP4",
        find=_find_mx,
        decode=_decode_mx,
        encode=_encode_mx,
    ),
)
