"""What the quantised formats share: how a format finds its weights among a checkpoint's tensors, and how it says what they are worth.

A format knows tensors, not experts: a float weight `name` stands on disk as several tensors (its *parts*: codes, scales, zero points), and
`decode` makes the float values of some of its rows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint.reader import TensorInfo

if TYPE_CHECKING:
    import torch

Read = Callable[
    [str, int, "int | None"], "torch.Tensor"
]  # (tensor name, first row, last row) → its codes, as `Checkpoint.read` gives them


@dataclass(frozen=True)
class Stored:
    """A float weight of a quantised checkpoint, and the tensors on disk that hold it."""

    name: str  # of the float weight, as an unquantised checkpoint has it
    shape: tuple[int, ...]  # of the float weight
    format: str  # `Format.name`
    parts: Mapping[str, TensorInfo]  # role in the format ("codes", "scale", "zero", …) → tensor
    settings: Mapping[str, Any] = field(default_factory=dict)  # numbers of the format: bits, block, group size, …

    def part(self, role: str, read: Read, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows `first` to `last` of one of the tensors."""
        return read(self.parts[role].name, first, last)


@dataclass(frozen=True)
class Headers:
    """What a format sees when it looks for its weights: tensor headers, and what config.json says of the quantisation."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]  # quantization_config, or what hf_quant_config.json says; empty where there is neither

    @property
    def method(self) -> str:
        """quant_method, or ""."""
        return str(self.config.get("quant_method") or "")


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way of holding float weights in fewer bits.

    `find` yields every weight of this format, and raises a UserError where the parts of one contradict each other or config.json.
    `decode` gives float32 rows `first` to `last` of the weight's first axis. `encode` is its inverse for formats whose scales follow
    from the values alone: (float32 weight, what held it before) → parts; None where quantising needs calibration data.
    """

    name: str
    title: str  # as people say it, with an example checkpoint
    reference: str  # what the decoder is tested against
    find: Callable[[Headers], Iterator[Stored]]
    decode: Callable[[Stored, Read, int, int], torch.Tensor]
    encode: Callable[[torch.Tensor, Stored], dict[str, torch.Tensor]] | None = None
    constant: tuple[str, ...] = ()  # roles that do not depend on the values: a shape, a scale of activations
