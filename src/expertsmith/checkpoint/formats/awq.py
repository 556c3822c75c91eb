"""AWQ, version gemm: 4-bit codes, eight outputs per word in the order 0, 2, 4, 6, 1, 3, 5, 7. w = (code - zero) · scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from expertsmith.checkpoint.formats.base import Format, Headers, Read, Stored, disagree, groups_of, misfit, missing
from expertsmith.checkpoint.formats.gptq import settings_of
from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of outputs 0 … 7 in a word


def _find(headers: Headers) -> Iterator[Stored]:  # noqa: C901  (a check a tensor of the format)
    packing = headers.config.get("packing_format")
    if headers.method != "awq" and not (headers.method == "auto-round" and packing in ("auto_round:auto_awq", "auto_awq")):
        return
    version = str(headers.config.get("version") or "gemm").lower()
    if headers.method == "awq" and version != "gemm":
        raise UserError(f"AWQ of version {version!r} packs its codes differently", "only version gemm can be decoded")
    for name, info in headers.tensors.items():
        if not name.endswith(".qweight") or info.dtype != "I32":
            continue
        stem = name.removesuffix(".qweight")
        said = settings_of(headers.config, stem)
        bits, size = said.get("bits", 4), int(said.get("group_size") or -1)
        if bits != 4:
            raise UserError(f"{name}: the quantisation config says {bits!r} bits", "AWQ has 4")
        parts = {"codes": info}
        for role, leaf in (("scale", "scales"), ("zero", "qzeros")):
            if f"{stem}.{leaf}" not in headers.tensors:
                raise missing(f"{stem}.weight", f"{stem}.{leaf}")
            parts[role] = headers.tensors[f"{stem}.{leaf}"]
        inputs, outputs = info.shape[0], 8 * info.shape[1]
        groups = groups_of(inputs, size)
        if parts["scale"].shape != (groups, outputs):
            if parts["scale"].shape[-1:] == (outputs,):
                raise disagree(
                    name, "groups", parts["scale"].shape[0], f"group_size {size}, which is {groups} for {inputs} inputs"
                )
            raise misfit(parts["scale"], f"{stem}.weight", (outputs, inputs), (groups, outputs))
        if parts["zero"].shape != (groups, outputs // 8):
            raise misfit(parts["zero"], f"{stem}.weight", (outputs, inputs), (groups, outputs // 8))
        yield Stored(f"{stem}.weight", (outputs, inputs), "awq", parts, {"bits": 4, "group": size})


def _decode(stored: Stored, read: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    inputs = stored.shape[1]
    words = slice(first // 8, -(-last // 8))
    rows = slice(first - 8 * words.start, last - 8 * words.start)
    codes = _unpacked(stored.part("codes", read)[:, words])[:, rows]  # [inputs, outputs]
    zero = _unpacked(stored.part("zero", read)[:, words])[:, rows]
    scale = stored.scale("scale", read)[:, first:last]
    place = torch.arange(inputs) // (stored.settings["group"] if stored.settings["group"] > 0 else inputs)
    return (codes.float() - zero.float()[place]).mul_(scale[place]).T.to(dtype).contiguous()


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    import torch

    return ((words.unsqueeze(-1) >> torch.tensor(SHIFTS, dtype=torch.int32)) & 0xF).flatten(-2)


FORMATS = (
    Format(
        name="awq",
        methods=("awq", "auto-round"),
        reference="its formula in float64",
        tensors="`qweight`, `qzeros` I32, `scales` F16; 4 bits, version gemm",
        title=lambda stored: (
            "AWQ, 4 bits, "
            + (f"groups of {stored.settings['group']}" if stored.settings["group"] > 0 else "one scale per channel")
        ),
        find=_find,
        decode=_decode,
    ),
)
