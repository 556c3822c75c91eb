"""FP8: one byte per weight, and a scale for each block, each output channel, each expert or the whole tensor. w = code · scale.

DeepSeek-V3, Qwen3-FP8 and MiniMax-M2 have blocks of 128 × 128 (`weight_scale_inv`, which multiplies despite its name); compressed-tensors
and modelopt name the scale `weight_scale`. MXFP8 has a power of two as scale for every 32 inputs. Fused experts: with a leading axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint.formats.base import Format, Headers, Read, Stored, blocks, ceil_div, disagree, misfit
from expertsmith.checkpoint.reader import TensorInfo
from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

CODES = ("F8_E4M3", "F8_E5M2")
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are exponents
ROWS = 32  # decoded at a time, so that they stay in the cache
SUFFIXES = ("_scale_inv", "_scale")


def _find(headers: Headers) -> Iterator[Stored]:
    for name, info in headers.tensors.items():
        if info.dtype not in CODES or len(info.shape) < 2 or _is_scale(name, headers.tensors):
            continue
        found = [part for part in _scales(name) if part in headers.tensors]
        if len(found) > 1:
            raise UserError(f"{name} has two scales, {found[0]} and {found[1]}", "remove the wrong one")
        if found:
            scale = headers.tensors[found[0]]
            block = _block(info, scale, headers)
            yield Stored(name, info.shape, "fp8", {"codes": info, "scale": scale}, {"block": block})


def _scales(name: str) -> Iterator[str]:
    yield from (name + suffix for suffix in SUFFIXES)
    if name.endswith(".weight"):
        yield name.removesuffix("weight") + "scale"


def _is_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether an FP8 tensor holds the scales of another tensor (FP4 codes)."""
    bases = [name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)]
    return any(base in tensors or f"{base}_packed" in tensors for base in bases)


def _block(info: TensorInfo, scale: TensorInfo, headers: Headers) -> tuple[int, int]:
    """The block (rows, columns) that shares a scale.

    Raises:
        UserError: the shape of the scale does not fit the weight, or contradicts the quantisation config.
    """
    *lead, rows, columns = info.shape
    shape = list(scale.shape)
    if len(shape) == len(lead) + 4 and shape[-3] == shape[-1] == 1:  # modelopt keeps the block axes, with length 1
        shape = [*lead, shape[-4], shape[-2]]
    said = _said(info.name, headers)
    wanted = said.get("block")
    if wanted and shape == [*lead, ceil_div(rows, wanted[0]), ceil_div(columns, wanted[1])]:
        return int(wanted[0]), int(wanted[1])
    if prod(shape) == 1 or (lead and shape in (lead, [*lead, 1], [*lead, 1, 1])):
        kind, block = "tensor", (rows, columns)
    elif shape in ([*lead, rows], [*lead, rows, 1]):
        kind, block = "channel", (1, columns)
    else:
        kind = "block"
        if shape == [*lead, rows, columns // 32] and columns % 32 == 0 and scale.dtype in POWERS:
            block = (1, 32)
        elif wanted or len(shape) != len(lead) + 2 or rows % shape[-2] or columns % shape[-1] or shape[:-2] != lead:
            grid = f"one scale for {'blocks of ' + ' × '.join(map(str, wanted)) if wanted else 'each block'} is expected"
            raise misfit(scale, info.name, info.shape, grid)
        else:
            block = (rows // shape[-2], columns // shape[-1])
    if said.get("kind") not in (None, kind) and prod(shape) > 1:
        raise disagree(info.name, "one scale per", kind, f"one per {said['kind']}")
    return block


def _said(name: str, headers: Headers) -> dict[str, Any]:
    """The settings of the quantisation config for a weight: "kind" (tensor, channel, block) and "block"."""
    block = headers.config.get("weight_block_size")
    if block:
        return {"block": block}  # mixed checkpoints hold channel and tensor scales beside it
    weights = headers.weights_of(name.removesuffix(".weight"))
    if not weights:
        return {}
    if weights.get("type") not in (None, "float") or weights.get("num_bits") not in (None, 8):
        raise disagree(name, "8 bits of", "float", f"{weights.get('num_bits')} of {weights.get('type')}")
    structure = weights.get("block_structure")
    if isinstance(structure, str):
        structure = [int(part) for part in structure.lower().split("x")]
    size = weights.get("group_size")
    if weights.get("strategy") == "group" and size:
        structure = [1, size]
    kind = weights.get("strategy")
    return {"kind": "block" if kind == "group" else kind, "block": structure}


def _decode(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    codes = stored.part("codes", read, first, last)
    if len(stored.shape) == 2:
        scale = stored.scale("scale", read).reshape(_grid(stored)[-2:])
        return _scaled(codes, scale, stored, first, dtype)
    grid = _grid(stored)
    whole = prod(stored.parts["scale"].shape) == 1
    scales = stored.scale("scale", read) if whole else stored.scale("scale", read, first, last)
    scales = scales.expand(last - first, 1, 1) if whole else scales.reshape(last - first, *grid[1:])
    made = torch.empty(codes.shape, dtype=dtype)
    flat = made.reshape(-1, *stored.shape[-2:])
    for part, code, scale in zip(
        flat, codes.reshape(flat.shape), scales.reshape(-1, *scales.shape[-2:]).expand(len(flat), -1, -1), strict=True
    ):
        part.copy_(_scaled(code, scale, stored, 0, dtype))
    return made


def _grid(stored: Stored) -> tuple[int, ...]:
    rows, columns = stored.settings["block"]
    if prod(stored.parts["scale"].shape) == 1:
        return (*([1] * (len(stored.shape) - 2)), 1, 1)
    return (*stored.shape[:-2], ceil_div(stored.shape[-2], rows), ceil_div(stored.shape[-1], columns))


def _scaled(codes: torch.Tensor, scale: torch.Tensor, stored: Stored, first: int, dtype: torch.dtype) -> torch.Tensor:
    """code · scale of a matrix [rows, columns] that starts at row `first` of the weight; `scale` [grid rows, grid columns] float32."""
    import torch

    info = stored.parts["codes"]
    block, columns = stored.settings["block"]
    quick = info.dtype == "F8_E4M3" and float(scale.abs().max()) < 128
    if quick:
        # An E4M3 code shifted by four bits is the bfloat16 number code · 2^-120: no table, no conversion; the scale takes the factor 2^120.
        scale = scale * 2.0**120
        raw = codes.view(torch.int8)
        if int(codes.view(torch.uint8).bitwise_and(0x7F).amax()) == 0x7F:
            raise UserError(f"{info.name} has NaN", "the checkpoint is damaged; download it again")
    elif not bool(codes.float().isfinite().all()):
        raise UserError(f"{info.name} has NaN or inf", "the checkpoint is damaged; download it again")
    wide = scale if scale.shape[-1] == 1 else None
    made = torch.empty(codes.shape, dtype=dtype)
    for begin in range(0, len(codes), ROWS):
        end = min(begin + ROWS, len(codes))
        place = [(first + begin) // block, (first + end - 1) // block]
        rows = slice(place[0], place[0] + 1)
        if place[0] != place[1]:
            rows = torch.arange(first + begin, first + end) // block  # type: ignore[assignment]
        factor = wide[rows] if wide is not None else scale[rows].repeat_interleave(columns, 1)[:, : codes.shape[1]]
        part = codes[begin:end]
        if quick:
            part = raw[begin:end].to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-30721).view(torch.bfloat16)
        if dtype == torch.float32:
            made[begin:end].copy_(part).mul_(factor)
        else:
            made[begin:end].copy_(part.float().mul_(factor))
    return made


def _encode(values: torch.Tensor, stored: Stored) -> dict[str, torch.Tensor]:
    """scale = max |w| of the block / 448 (E5M2: 57344), rounded to the scale's dtype (powers of two: up); code = w / scale, to nearest."""
    import torch

    from expertsmith.checkpoint.reader import TORCH_DTYPES

    info, part = stored.parts["codes"], stored.parts["scale"]
    rows, columns = stored.settings["block"]
    if prod(part.shape) == 1:  # one scale for the whole tensor, whatever its shape
        if values.shape != info.shape:
            raise UserError(
                f"{info.name} has one scale for all experts, so single experts cannot be re-quantised",
                "remove --requantise",
            )
        top = values.abs().amax().reshape([1] * values.dim())
    else:
        top = blocks(values, rows, columns).abs().amax((-3, -1))
    scale = (top / LARGEST[info.dtype]).clamp_min(2.0**-100)
    kind: torch.dtype = getattr(torch, TORCH_DTYPES[part.dtype])
    if part.dtype in POWERS:
        exponent = torch.ceil(torch.log2(scale.double())).clamp(-127, 127)
        held = (exponent + 127).to(torch.uint8)
        scale = torch.exp2(exponent).float()
        stored_scale = held if part.dtype == "U8" else held.view(torch.float8_e8m0fnu)
    else:
        stored_scale = scale.clamp_min(float(torch.finfo(kind).tiny)).to(kind)
        scale = stored_scale.float()
    factor = scale
    if prod(part.shape) > 1:
        factor = scale.repeat_interleave(rows, -2)[..., : values.shape[-2], :]
        factor = factor.repeat_interleave(columns, -1)[..., : values.shape[-1]]
    codes = (values / factor).clamp(-LARGEST[info.dtype], LARGEST[info.dtype]).to(getattr(torch, TORCH_DTYPES[info.dtype]))
    shape = list(part.shape)
    if len(stored.shape) > 2 and prod(part.shape) > 1:
        shape[0] = values.shape[0]
    return {"codes": codes, "scale": stored_scale.reshape(shape)}


def _title(stored: Stored) -> str:
    rows, columns = stored.settings["block"]
    if (rows, columns) == (1, 32) and stored.parts["scale"].dtype in POWERS:
        return "MXFP8"
    kind = f"blocks of {rows} × {columns}"
    if (rows, columns) == tuple(stored.shape[-2:]):
        kind = "one scale per tensor"
    elif rows == 1 and columns >= stored.shape[-1]:
        kind = "one scale per channel"
    return f"FP8, {kind}"


FORMATS = (
    Format(
        name="fp8",
        methods=("fp8", "compressed-tensors", "modelopt", "fbgemm_fp8", "mxfp8", ""),
        reference="transformers Fp8Dequantize, compressed-tensors",
        tensors="`weight` F8_E4M3, `weight_scale_inv` or `weight_scale` (F32, BF16, E8M0): blocks, channels, tensors; fused experts too",
        title=_title,
        find=_find,
        decode=_decode,
        encode=_encode,
    ),
)
