"""Common parts of the quantised formats: how a format finds its weights among a checkpoint's tensors, and how it decodes them.

A format knows tensors, not experts. A float weight `name` is stored as several tensors (its *parts*: codes, scales, zero points), and
`decode` computes the float values of some of its rows from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint.reader import TensorInfo
from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

Read = Callable[
    [str, int, "int | None"], "torch.Tensor"
]  # (tensor name, first row, last row) → its codes, as returned by `Checkpoint.read`


@dataclass(frozen=True)
class Stored:
    """A float weight of a quantised checkpoint, and the tensors on disk that hold it."""

    name: str  # of the float weight, as in an unquantised checkpoint
    shape: tuple[int, ...]  # of the float weight
    format: str  # `Format.name`
    parts: Mapping[str, TensorInfo]  # role in the format ("codes", "scale", "zero", …) → tensor
    settings: Mapping[str, Any] = field(default_factory=dict)  # numbers of the format: bits, block, group size, …

    def part(self, role: str, read: Read, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows `first` to `last` of the tensor with this role."""
        return read(self.parts[role].name, first, last)

    def scale(self, role: str, read: Read, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Scales as float32. Bytes (E8M0) are exponents: 2^(byte - 127); 255 is NaN.

        Raises:
            UserError: NaN or inf.
        """
        import torch

        values = self.part(role, read, first, last)
        if self.parts[role].dtype in ("U8", "F8_E8M0"):
            exponents = values.view(torch.uint8).to(torch.float64)
            values = torch.where(exponents == 255, torch.nan, torch.exp2(exponents - 127)).float()
        values = values.float()
        if not bool(values.isfinite().all()):
            raise UserError(f"{self.parts[role].name} has NaN or inf", "the checkpoint is damaged; download it again")
        return values


@dataclass(frozen=True)
class Headers:
    """The inputs of a format's search for its weights: tensor headers, and the quantisation settings of config.json."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]  # quantization_config, or settings from a file beside config.json; empty if there are none
    read: Callable[[str], torch.Tensor]  # a small tensor: a shape, a description

    @property
    def method(self) -> str:
        """quant_method, or ""."""
        return str(self.config.get("quant_method") or "")

    def weights_of(self, module: str) -> Mapping[str, Any]:
        """The settings in compressed-tensors' config_groups for a module's weights (num_bits, strategy, group_size, …). The first group
        that names the module counts; its format is added as "format". Empty if no group names it."""
        groups = self.config.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            targets = group.get("targets") or ["Linear"]
            if any(target == "Linear" or matches(target, module) for target in targets) and isinstance(
                group.get("weights"), Mapping
            ):
                return {**group["weights"], "format": group.get("format") or self.config.get("format")}
        return {}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to store float weights in fewer bits.

    `find` yields every weight of this format, and raises a UserError if the parts of one contradict each other or config.json.
    `decode` returns rows `first` to `last` of the weight's first axis, computed in float32 and rounded once to a dtype. `encode` is its
    inverse, if the scales follow from the values alone: (float32 weight, its old `Stored`) → parts. It is None if quantising needs
    calibration data.
    """

    name: str
    methods: tuple[str, ...]  # quant_method in config.json
    reference: str  # what the decoder is tested against
    tensors: str  # how a weight is stored on disk, for the documentation
    title: Callable[[Stored], str]  # for people: "GPTQ, 4 bits, groups of 128"
    find: Callable[[Headers], Iterator[Stored]]
    decode: Callable[[Stored, Read, int, int, torch.dtype], torch.Tensor]
    encode: Callable[[torch.Tensor, Stored], dict[str, torch.Tensor]] | None = None
    constant: tuple[str, ...] = ()  # roles that do not depend on the values: a shape, the order of columns


def matches(target: str, module: str) -> bool:
    """Whether a name in a quantisation config matches a module: by its whole name, its end, or as a regular expression after "re:"."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module or module.endswith(f".{target}")


def disagree(where: str, what: str, found: object, said: object) -> UserError:
    """The error for tensors that contradict the quantisation config."""
    return UserError(
        f"{where}: its tensors say {what} {found}, but the quantisation config says {said}",
        "config.json and weights do not match",
    )


def misfit(part: TensorInfo, weight: str, shape: Iterable[int], wanted: Iterable[int] | str) -> UserError:
    """The error for a scale, zero point or shape that does not fit its weight."""
    fits = wanted if isinstance(wanted, str) else f"{list(wanted)} is expected"
    return UserError(
        f"{part.name} has shape {list(part.shape)}, which does not fit {weight} {list(shape)}: {fits}",
        "the checkpoint is damaged",
    )


def missing(weight: str, part: str) -> UserError:
    """The error for codes without one of their other parts."""
    return UserError(f"{weight} is quantised, but {part} is missing", "download the checkpoint again")


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack codes 0 … 2^bits - 1 along the last axis of int32 words: [..., ceil(count · bits / 32)] → [..., count] int16. Codes are packed
    from the lowest bit on, without gaps, so a code may cross the border of two words."""
    import torch

    if bits in (1, 2, 4, 8):  # never across a byte
        # copy if the last axis is not dense: `contiguous` does not change the stride of an axis of length 1, but `view` needs stride 1
        data = (words.contiguous() if words.stride(-1) == 1 else words.clone(memory_format=torch.contiguous_format)).view(
            torch.uint8
        )
        if bits == 8:
            return data[..., :count].to(torch.int16)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes: torch.Tensor = (data.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(-2)[..., :count].to(torch.int16)
    data = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    place = torch.arange(count) * bits
    low = data[..., place // 32] >> (place % 32)
    high = data[..., place // 32 + 1] << (32 - place % 32)
    found: torch.Tensor = (low | high) & (2**bits - 1)
    return found.to(torch.int16)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack`: [..., count] → [..., ceil(count · bits / 32)] int32; the rest of the last word is 0."""
    import torch

    count = codes.shape[-1]
    place = torch.arange(count) * bits
    size = ceil_div(count * bits, 32)
    values = codes.to(torch.int64)
    made = torch.zeros(*codes.shape[:-1], size + 1, dtype=torch.int64)
    made.index_add_(-1, place // 32, (values << (place % 32)) & 0xFFFFFFFF)
    over = place % 32 + bits > 32
    made.index_add_(-1, place[over] // 32 + 1, values[..., over] >> (32 - place[over] % 32))
    return _as_int32(made[..., :size])


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def blocks(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[..., r, c] → [..., r / rows, rows, c / columns, columns], padded with zeros if it does not divide."""
    import torch

    filled = torch.nn.functional.pad(values, (0, -values.shape[-1] % columns, 0, -values.shape[-2] % rows))
    *lead, r, c = filled.shape
    return filled.reshape(*lead, r // rows, rows, c // columns, columns)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes → [..., 2 n] codes of 4 bits, the low one first."""
    import torch

    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes → [..., 2 n] float32 values of FP4."""
    import torch

    return torch.tensor(E2M1)[nibbles(packed.view(torch.uint8)).int()]


def to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """The nearest FP4 codes of float values (ties to the even code), two in a byte: [..., 2 n] → [..., n]."""
    import torch

    steps = torch.tensor(E2M1[:8])
    middle = (steps[1:] + steps[:-1]) / 2
    size = values.abs().contiguous()
    code = torch.bucketize(size, middle)  # a tie goes down …
    code = code + ((code % 2 == 1) & (size == middle[code.clamp(max=6)]))  # … unless the code above is the even one
    code = (code.clamp(max=7) + 8 * (values < 0)).to(torch.uint8)
    return code[..., ::2] | (code[..., 1::2] << 4)


def groups_of(columns: int, size: int) -> int:
    """Number of groups of `size` columns; one if `size` is -1."""
    return 1 if size in (-1, 0) or size >= columns else math.ceil(columns / size)
