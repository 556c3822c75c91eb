"""A float view of a quantised checkpoint: tensors with the names, shapes and values of an unquantised one.

All higher rooms read this view, to load decoder layers, score experts or heal weights. Only `apply` and
the byte comparison of `verify` read the codes themselves.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint.formats import Headers, Stored, formats
from expertsmith.checkpoint.reader import DTYPE_BITS, TORCH_DTYPES, Checkpoint, TensorInfo
from expertsmith.checkpoint.writer import Made, Piece
from expertsmith.errors import UserError, parse_json

if TYPE_CHECKING:
    import torch

CONFIG = "quantization_config"
MODELOPT = "hf_quant_config.json"  # the quantisation settings of NVIDIA's exporter
NARROW = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2")
SIDE_FILES = (
    MODELOPT,
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)  # they repeat quantization_config
AT_ONCE = 2**24  # elements decoded at a time
# scales of activations and of the key-value cache: they do not belong to weights
ACTIVATIONS = re.compile(
    r"(^|[._])(input|output|activation|act|k|v|q|kv|prob)_(global_)?scale(_inv|_ub)?$|\.(k|v|q|kv)_zero_point$|\.(input|output)_zero_point$"
)
# name endings that only quantised weights have
COMPANION = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|bitmask|row_offsets|compressed|pre_quant_scale|weight_format"
    r"|weight_(packed|scale|scale_inv|scale_2|global_scale|zero_point|shape|g_idx)|weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+))$"
    r"|(_proj|_weight|\.w[123])(_blocks|_scales|_scale|_scale_inv|_scale_2|_global_scale|_zero_point|_packed|_weight_scale|_weight_scale_2)$"
)
CODES = ("U8", "I8", "I32", "U32", "I16", "U16")  # a weight of one of these dtypes holds codes


@dataclass(frozen=True)
class Quantisation:
    """The quantised weights of a checkpoint, and their formats."""

    config: Mapping[str, Any]
    stored: Mapping[str, Stored]  # float weight → the tensors that hold it
    activations: frozenset[str]  # scales that belong to activations

    @property
    def title(self) -> str:
        """The formats, most weights first: "FP8 in blocks"."""
        counts = Counter(formats()[entry.format].title(entry) for entry in self.stored.values())
        return "; ".join(name for name, _ in counts.most_common())


@dataclass
class Floats(Checkpoint):
    """The float view. `tensors` has the decoded dtype and shape; `read` decodes."""

    raw: Checkpoint = field(kw_only=True)
    stored: Mapping[str, Stored] = field(kw_only=True)
    dtype: str = field(kw_only=True)  # of decoded weights, as safetensors names it
    zeros: frozenset[str] = field(default=frozenset(), kw_only=True)  # tensors that are in no file, see `filled`

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the quantised checkpoint: it is the same model."""
        return self.raw.fingerprint

    @property
    def converted(self) -> bool:
        """See `Checkpoint`."""
        return self.raw.converted

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """One tensor, or rows of it. A quantised weight is decoded in float32, in parts, and rounded once to `dtype`.

        Raises:
            UserError: as `Checkpoint.read`, and if a scale is NaN or inf.
        """
        import torch

        entry = self.stored.get(name)
        if name in self.zeros:
            info = self.tensors[name]
            return torch.zeros(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))[first:last]
        if entry is None:
            return self.raw.read(name, first, last)
        last = entry.shape[0] if last is None else last
        decode, kind = formats()[entry.format].decode, getattr(torch, TORCH_DTYPES[self.dtype])
        if first >= last:
            return torch.empty((0, *entry.shape[1:]), dtype=kind)
        row = max(1, self.tensors[name].numel // entry.shape[0])
        step = max(1, AT_ONCE // row) if len(entry.shape) > 2 else last - first
        if step >= last - first:
            return decode(entry, self.raw.read, first, last, kind)
        whole = torch.empty((last - first, *entry.shape[1:]), dtype=kind)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            whole[begin - first : end - first] = decode(entry, self.raw.read, begin, end, kind)
        return whole

    def parts(self, name: str) -> list[str]:
        """See `Checkpoint`: codes and scales of a quantised weight, nothing for zeros."""
        if name in self.zeros:
            return []
        entry = self.stored.get(name)
        return [name] if entry is None else [part.name for part in entry.parts.values()]

    def encoded(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode new values of a quantised weight (or of rows of it) in its own format: tensor on disk → new content,
        for the tensors that change.

        Raises:
            UserError: a format whose scales do not follow from the values alone.
        """
        entry = replace(self.stored[name], shape=tuple(values.shape))
        encode = formats()[entry.format].encode
        if encode is None:
            raise _unencodable(entry)
        return {entry.parts[role].name: codes for role, codes in encode(values.float(), entry).items()}

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The float32 values of `encoded`."""
        import torch

        entry, made = self.stored[name], self.encoded(name, values)
        parts = {
            role: replace(info, shape=tuple(made[info.name].shape)) if info.name in made else info
            for role, info in entry.parts.items()
        }

        def read(part: str, first: int = 0, last: int | None = None) -> torch.Tensor:
            if part not in made:
                return self.raw.read(part, first, last)
            return made[part] if first == 0 and last is None else made[part][first:last]

        entry = replace(entry, shape=tuple(values.shape), parts=parts)
        return formats()[entry.format].decode(entry, read, 0, values.shape[0], torch.float32)


def filled(checkpoint: Checkpoint, like: Mapping[str, str]) -> Checkpoint:
    """A checkpoint with added tensors of zeros (name → a tensor of the same shape), for weights that a class has but never uses."""
    if not like:
        return checkpoint
    if not isinstance(checkpoint, Floats):
        held = dict(checkpoint.tensors)
        checkpoint = Floats(checkpoint.path, checkpoint.config, held, checkpoint.source, raw=checkpoint, stored={}, dtype="F32")
    more = {name: replace(checkpoint.tensors[other], name=name) for name, other in like.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **more}, zeros=frozenset(more))


def refuse_unencodable(found: Quantisation, names: Collection[str]) -> None:
    """Refuse to requantise weights whose format needs calibration data for it.

    Raises:
        UserError: naming a weight and its format.
    """
    for name in names:
        entry = found.stored.get(name)
        if entry is not None and formats()[entry.format].encode is None:
            raise _unencodable(entry)


def _unencodable(entry: Stored) -> UserError:
    return UserError(
        f"{entry.name} is {formats()[entry.format].title(entry)}, which cannot be re-quantised without calibration data",
        "remove --requantise to write the result in bfloat16",
    )


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes as safetensors stores them."""
    import torch

    made: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return made


def source_of(checkpoint: Checkpoint, info: TensorInfo, start: int = 0, nbytes: int | None = None) -> Piece | Made:
    """The bytes of a tensor, or `nbytes` of them from `start` on: a range of a file, or (whole rows only) decoded when they are read."""
    nbytes = info.nbytes if nbytes is None else nbytes
    if not isinstance(checkpoint, Floats) or info.name not in checkpoint.stored:
        return Piece(info.file, info.start + start, nbytes)
    row = info.nbytes // info.shape[0]
    first, last = start // row, (start + nbytes) // row
    return Made(nbytes, lambda: bytes_of(checkpoint.read(info.name, first, last)))


def floats(checkpoint: Checkpoint, dtype: str = "F32") -> Checkpoint:
    """The float view of a checkpoint, with quantised weights as `dtype` ("F32", "BF16", "F16"); the checkpoint itself if it has none.

    Raises:
        UserError: see `quantisation_of`.
    """
    if isinstance(checkpoint, Floats):
        if checkpoint.dtype == dtype:
            return checkpoint
        checkpoint = checkpoint.raw
    found = quantisation_of(checkpoint)
    if found is None:
        return checkpoint
    held = {info.name for entry in found.stored.values() for info in entry.parts.values()}
    made: dict[str, TensorInfo] = {}
    first = {min(e.parts.values(), key=lambda i: (str(i.file), i.start)).name: e for e in found.stored.values()}
    for name, info in checkpoint.tensors.items():
        if name in first:
            entry = first[name]
            numel = replace(info, shape=entry.shape).numel
            made[entry.name] = TensorInfo(entry.name, dtype, entry.shape, info.file, info.start, numel * DTYPE_BITS[dtype] // 8)
        elif name not in held and name not in found.activations:
            made[name] = info
    config = copy.deepcopy(dict(checkpoint.config))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop(CONFIG, None)
    return Floats(checkpoint.path, config, made, checkpoint.source, raw=checkpoint, stored=found.stored, dtype=dtype)


def quantisation_of(checkpoint: Checkpoint) -> Quantisation | None:
    """The quantised weights of a checkpoint, found from its headers; None if there are none. The result is cached in the checkpoint.

    Raises:
        UserError: a quantised tensor that no format holds exactly, a scale that belongs to no weight, an unknown quant_method,
            tensors that contradict config.json, two quantisation configs.
    """
    if "_quantisation" not in checkpoint.__dict__:
        checkpoint.__dict__["_quantisation"] = _find(checkpoint)
    found: Quantisation | None = checkpoint.__dict__["_quantisation"]
    return found


def _find(checkpoint: Checkpoint) -> Quantisation | None:
    config = quantisation_config(checkpoint)
    _refuse_unknown(config, checkpoint.source)
    headers = Headers(checkpoint.tensors, config, checkpoint.read)
    stored: dict[str, Stored] = {}
    held: set[str] = set()
    for entry in formats().values():
        for weight in entry.find(headers):
            if headers.method not in entry.methods:
                raise UserError(
                    f"{weight.name} is {entry.title(weight)}, but {checkpoint.source}/config.json says quant_method {headers.method!r}",
                    "config.json and weights do not match",
                )
            names = {info.name for info in weight.parts.values()}
            twice = weight.name in stored or (weight.name in checkpoint.tensors and weight.name not in names)
            if twice or names & held:
                raise UserError(f"{weight.name} is in {checkpoint.source} twice", "remove the wrong one")
            held |= names
            stored[weight.name] = weight
    left = [info for name, info in checkpoint.tensors.items() if name not in held]
    activations = frozenset(info.name for info in left if stored and ACTIVATIONS.search(info.name))
    for info in left:
        if info.name not in activations:
            _refuse_left(info, bool(stored or config))
    if config and not stored:
        raise UserError(
            f"{checkpoint.source}/config.json says quant_method {headers.method!r}, but no tensor is quantised",
            "if the weights are plain floats, remove quantization_config from config.json",
        )
    return Quantisation(config, stored, activations) if stored else None


def _refuse_unknown(config: Mapping[str, Any], source: str) -> None:
    """Refuse a quantisation without a decoder, or one that does more than store weights."""
    method = str(config.get("quant_method") or "")
    known = sorted({name for entry in formats().values() for name in entry.methods if name})
    if config and method not in known:
        raise UserError(
            f"{source}/config.json: quant_method {method!r} cannot be decoded"
            if method
            else f"{source}/config.json: quantization_config has no quant_method",
            f"supported: {', '.join(known)}",
        )
    for key in ("sparsity_config", "transform_config"):
        part = config.get(key)
        if (
            isinstance(part, Mapping)
            and part
            and part.get("format") != "dense"
            and (key != "transform_config" or part.get("config_groups"))
        ):
            raise UserError(
                f"{source}/config.json: the quantisation has a {key}, which changes weights in an unsupported way",
                "use a checkpoint without it",
            )


def _refuse_left(info: TensorInfo, quantised: bool) -> None:
    """Refuse a tensor that looks like a part of a quantised weight but belongs to none."""
    weight = re.search(r"(\.weight|_proj|_weight|\.w[123])$", info.name) is not None and len(info.shape) > 1
    if info.dtype in NARROW or (info.dtype in CODES and weight):
        raise UserError(
            f"{info.name} is {info.dtype}, but it has no scales and no decoder",
            "its scales are missing, or the format is not supported: run `expertsmith inspect`",
        )
    if quantised and COMPANION.search(info.name):
        raise UserError(
            f"{info.name} belongs to a quantised weight that cannot be decoded",
            "a tensor is missing, or the format is not supported",
        )


def quantisation_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The quantisation settings from config.json, or else from a file next to it; empty if there are none.

    Raises:
        UserError: config.json has two different ones.
    """
    if isinstance(checkpoint, Floats):
        return {}
    outer, inner = checkpoint.config.get(CONFIG), None
    text = checkpoint.config.get("text_config")
    if isinstance(text, Mapping):
        inner = text.get(CONFIG)
    if outer and inner and outer != inner:
        raise UserError(
            f"{checkpoint.source}/config.json has two different quantization_configs, one at the top and one in text_config",
            "remove the one that does not match the tensors",
        )
    found = outer or inner
    if not found:
        found = _beside(checkpoint.path)
    if found and not isinstance(found, Mapping):
        raise UserError(f"{checkpoint.source}/config.json: quantization_config is not an object")
    return found or {}


def _beside(path: Path) -> Mapping[str, Any]:
    """The quantisation settings from a file next to config.json, written by modelopt or by early GPTQ and AWQ tools; empty without one."""
    for name in SIDE_FILES:
        if not (path / name).is_file():
            continue
        found = parse_json((path / name).read_bytes(), str(path / name))
        if not isinstance(found, Mapping):
            raise UserError(f"{path / name} is not a JSON object")
        if name == MODELOPT:
            return {"quant_method": "modelopt", **found.get("quantization", {})}
        if name == "quantize_config.json" and "bits" in found:
            return {"quant_method": "gptq", **found}
        if name == "quant_config.json" and "w_bit" in found:
            return {"quant_method": "awq", "bits": found["w_bit"], "group_size": found.get("q_group_size"), **found}
        if "quant_method" in found:
            return dict(found)
    return {}
