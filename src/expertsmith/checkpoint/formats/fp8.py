"""FP8: one byte a weight and a scale for each block, each output channel or the whole tensor. w = code · scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from expertsmith.checkpoint.formats.base import Format, Headers, Read, Stored
from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

CODES = ("F8_E4M3", "F8_E5M2")


def _find(headers: Headers) -> Iterator[Stored]:
    block = headers.config.get("weight_block_size")
    for name, info in headers.tensors.items():
        scale = headers.tensors.get(f"{name}_scale_inv") or headers.tensors.get(f"{name}_scale")
        if info.dtype not in CODES or scale is None:
            continue
        *lead, rows, columns = info.shape
        shape = list(scale.shape)
        if scale.numel == 1:
            size = (rows, columns)
        elif block and shape == [*lead, -(-rows // block[0]), -(-columns // block[1])]:
            size = tuple(block)
        elif shape in ([*lead, rows, 1], [*lead, rows]):
            size = (1, columns)
        else:
            raise UserError(f"{scale.name} has shape {shape}, which does not fit {name} {list(info.shape)}")
        yield Stored(name, info.shape, "fp8", {"codes": info, "scale": scale}, {"block": size})


def _decode(stored: Stored, read: Read, first: int, last: int) -> torch.Tensor:
    lead = len(stored.shape) - 2
    rows, columns = stored.settings["block"]
    codes = stored.part("codes", read, first, last).float()
    scale = stored.part("scale", read).float()
    if scale.numel() > 1:
        scale = scale.reshape(*stored.shape[:lead], -1, -(-stored.shape[-1] // columns))
        scale = scale[first:last] if lead else scale[first // rows : -(-last // rows)]
        scale = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        skip = 0 if lead else first % rows
        scale = scale[..., skip : skip + codes.shape[-2], : stored.shape[-1]]
    return codes.mul_(scale)


def _encode(w, stored):
    import torch

    rows, columns = stored.settings["block"]
    r, c = w.shape
    R, C = -(-r // rows), -(-c // columns)
    p = torch.zeros(R * rows, C * columns)
    p[:r, :c] = w
    b = p.reshape(R, rows, C, columns)
    s = (b.abs().amax((1, 3)) / 448).clamp_min(1e-12)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[stored.parts["scale"].dtype]
    s = s.to(kind)
    q = (
        (b / s.float()[:, None, :, None])
        .clamp(-448, 448)
        .reshape(R * rows, C * columns)[:r, :c]
        .contiguous()
        .to(torch.float8_e4m3fn)
    )
    return {"codes": q, "scale": s.reshape(stored.parts["scale"].shape)}


FORMATS = (Format(name="fp8", title="FP8", reference="transformers Fp8Dequantize", find=_find, decode=_decode, encode=_encode),)
