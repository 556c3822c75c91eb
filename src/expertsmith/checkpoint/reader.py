"""Open a checkpoint directory: config, tensor headers, single tensors. Nothing is executed; an index may not name files outside.

Tensors are read with plain positioned reads into new buffers, not through a memory map: a process holds only what it requested,
and a memory limit counts exactly that.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files as packaged
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint import hub
from expertsmith.checkpoint.hub import DEMO, INDEX, OWN_LAYOUT, SINGLE
from expertsmith.errors import UserError, parse_json

if TYPE_CHECKING:
    import torch

DEPTH = re.compile(
    r"(num_|n_)?(hidden_|nextn_predict_|mtp_num_hidden_|encoder_|decoder_|mtp_)?layers?|depth|num_mtp_modules|num_layers"
)
WIDTH = re.compile(r"(\w+_)?(head_dim|hidden_size|intermediate_size|vocab_size|attention_heads|key_value_heads|lora_rank)")
OWN_PAGES = 2**16  # bytes
MAX_HEADER = 100 * 2**20  # the safetensors format's own limit

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes are. `start` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class Checkpoint:
    """A directory in Hugging Face layout. `tensors` is in the order of files, then of bytes."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    source: str  # what the user typed
    _keep_alive: Any = field(default=None, repr=False)

    @property
    def converted(self) -> bool:
        """Whether the tensors are a temporary copy of pickled ones."""
        return self._keep_alive is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def numel(self) -> int:
        """Number of elements of all tensors."""
        return sum(info.numel for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config, every header entry and 64 bytes from the start, middle and end of every tensor.

        Headers alone do not distinguish a fine-tuned model from its base; hashing every byte would require reading all weights.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file, infos in self._by_file():
            with open(file, "rb") as stream:
                for info in infos:
                    digest.update(f"{info.name}\0{info.dtype}\0{info.shape}\0".encode())
                    for offset in (0, info.nbytes // 2, max(0, info.nbytes - 64)):
                        stream.seek(info.start + offset)
                        digest.update(stream.read(min(64, info.nbytes - offset)))
        return f"sha256:{digest.hexdigest()}"

    def _by_file(self) -> Iterator[tuple[Path, list[TensorInfo]]]:
        files: dict[Path, list[TensorInfo]] = {}
        for name in sorted(self.tensors):
            files.setdefault(self.tensors[name].file, []).append(self.tensors[name])
        for file in sorted(files):
            yield file, files[file]

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """One tensor in its own dtype, or its rows `first` to `last` (exclusive) along the first axis.

        Raises:
            UserError: no such tensor, or a dtype that torch does not have.
        """
        import torch

        info = self.tensors.get(name)
        if info is None:
            raise UserError(f"{self.path} has no tensor {name!r}")
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise UserError(f"{name}: torch has no dtype for safetensors {info.dtype}")
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if first or last is not None:
            rows = shape[0]
            last = rows if last is None else last
            row = nbytes // rows
            shape, start, nbytes = (last - first, *shape[1:]), start + first * row, (last - first) * row
        if not nbytes:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        return torch.frombuffer(self._bytes(info, start, nbytes), dtype=getattr(torch, dtype)).reshape(shape)

    def _bytes(self, info: TensorInfo, start: int, nbytes: int) -> Any:
        buffer = fresh(nbytes)
        fill(memoryview(buffer), info, start)
        return buffer

    def parts(self, name: str) -> list[str]:
        """The tensors on disk that a tensor is made from: itself, unless the checkpoint is a view of another."""
        return [name]


def fill(view: memoryview, info: TensorInfo, start: int) -> None:
    """Fill a buffer with the bytes of a tensor's file from byte `start` on.

    Raises:
        UserError: the file ends before.
    """
    with open(info.file, "rb", buffering=0) as stream:
        stream.seek(start)
        while view:
            count = stream.readinto(view)
            if not count:
                raise UserError(f"{info.file.name} ended in the middle of {info.name}", "download the shard again")
            view = view[count:]


def fresh(nbytes: int) -> bytearray | mmap.mmap:
    """New memory for one tensor; a large one gets its own pages. These return to the system when the tensor is freed, while a heap with
    longer-lived blocks in between would keep its largest size. They are also aligned, so no copy is needed for alignment."""
    if nbytes < OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return bytearray(nbytes)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def open_checkpoint(
    source: str | Path, *, headers_only: bool = False, allow_pickle: bool = False, revision: str | None = None
) -> Checkpoint:
    """Open a local directory, a hub id, or "demo", the packaged model.

    Args:
        source: directory, "demo", or `owner/name` or `owner/name@REVISION` on the hub (then downloaded to the Hugging Face cache; with
            `headers_only` only the config and the tensor headers are fetched).
        revision: branch, tag or commit on the hub.
        allow_pickle: convert a pickle-only checkpoint through `torch.load(weights_only=True)`; otherwise it is refused.

    Raises:
        UserError: anything wrong with the directory, with the file and the rule.
    """
    source = hub.pinned(source, revision)
    path = Path(source)
    if path.is_file():
        raise UserError(
            f"{path} is a file, not a checkpoint directory", "give the folder that holds config.json and the .safetensors files"
        )
    if str(source) == DEMO and not path.is_dir():
        path = Path(str(packaged("expertsmith"))) / "demo" / "model"
    if not path.is_dir():
        if not hub.is_hub_name(str(source)):
            raise UserError(f"directory not found: {source}")
        if headers_only:
            path, metadata = hub.headers(str(source))
            if metadata is not None:
                return _from_metadata(path, metadata, str(source))
        else:
            path = hub.download(str(source))
    config = _read_json(path / "config.json")
    files = _weight_files(path)
    keep_alive = None
    if not files:
        keep_alive = _convert_pickles(_pickles(path, allow_pickle))
        files = _weight_files(Path(keep_alive.name))
    tensors = _tensors_of(files)
    if not tensors:
        raise UserError(f"{path}: the .safetensors files have no tensors")
    _refuse_endless(config, tensors, str(path / "config.json"))
    return Checkpoint(path, config, tensors, str(source), keep_alive)


def _refuse_endless(config: Any, tensors: Mapping[str, TensorInfo], where: str, above: str = "") -> None:
    """Refuse numbers that would make building the model take hours or all memory. A model has at most as many layers as tensors, and no
    width is larger than the largest tensor."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        _refuse_endless(value, tensors, where, f"{above}{key}.")
        if not isinstance(value, (int, float)):
            continue
        if DEPTH.fullmatch(key) and value > len(tensors):
            held = f"{len(tensors)} tensors in all"
        elif WIDTH.fullmatch(key) and value > max(info.numel for info in tensors.values()) * 8:  # codes may be packed
            held = "no tensor that large"
        else:
            continue
        raise UserError(
            f"{where}: {above}{key} is {value}, but the checkpoint has {held}", "config.json and weights do not match"
        )


def _pickles(path: Path, allowed: bool) -> list[Path]:
    found = sorted(file for pattern in PICKLES for file in path.glob(pattern))
    if not found:
        raise UserError(f"{path} has no .safetensors files")
    if not allowed:
        raise UserError(
            f"{path} has only pickle files ({found[0].name}), which can run code when they are loaded",
            "convert it to safetensors, or pass --allow-pickle (then read with weights_only)",
        )
    return found


def _tensors_of(files: Mapping[Path, Collection[str]]) -> dict[str, TensorInfo]:
    """The tensors of all files. If the index lists names for a file, only these: transformers does not load others either."""
    tensors: dict[str, TensorInfo] = {}
    for file, expected in files.items():
        found = read_header(file)
        missing = [name for name in expected if name not in found]
        if missing:
            raise UserError(f"{file.name} lacks tensor {missing[0]!r}, which the index lists there", "download the shard again")
        for name, info in found.items():
            if expected and name not in expected:
                continue
            if name in tensors:
                raise UserError(f"tensor {name!r} is in both {tensors[name].file.name} and {file.name}")
            tensors[name] = info
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The header of one .safetensors file, checked against the file's size.

    Raises:
        UserError: file missing or truncated, header not JSON, offsets that overlap, leave gaps, exceed the file or contradict
            shape and dtype.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > MAX_HEADER or 8 + length > size:
                raise UserError(
                    f"{file.name}: the header claims {length} bytes, but the file has {size}",
                    "the shard is truncated or not safetensors",
                )
            raw = stream.read(length)
    except FileNotFoundError:
        raise UserError(f"shard {file.name} is missing from {file.parent}", "download it again") from None
    header = parse_json(raw, f"{file.name}: the header", "the shard is damaged or not safetensors")
    return parse_header(header, 8 + length, size, file)


def parse_header(header: Any, base: int, size: int, file: Path) -> dict[str, TensorInfo]:  # noqa: C901  (a check a rule of the format)
    """The tensors of a decoded header; their data begins at byte `base` of a file of `size` bytes."""
    if not isinstance(header, dict):
        raise UserError(f"{file.name}: the header is not a table of tensors", "the shard is damaged or not safetensors")
    tensors: list[TensorInfo] = []
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise UserError(f"{file.name}: the header's __metadata__ is not a table of texts", "the shard is damaged")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not isinstance(dtype, str) or not all(type(number) is int for number in (*shape, begin, end)):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{file.name}: the header entry of {name!r} is incomplete", "the shard is damaged") from None
        if dtype not in DTYPE_BITS:
            raise UserError(f"{file.name}: {name} has the unknown dtype {dtype!r}")
        expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
        if min(shape, default=0) < 0 or not 0 <= begin <= end or end - begin != expected:
            raise UserError(
                f"{file.name}: {name} has shape {list(shape)} of {dtype} = {expected} bytes, but its offsets span {end - begin}",
                "the header is wrong or the shard is damaged",
            )
        if base + end > size:
            raise UserError(
                f"{file.name}: {name} ends at byte {base + end}, but the file has only {size}",
                "the shard is truncated: download it again",
            )
        tensors.append(TensorInfo(name, dtype, shape, file, base + begin, end - begin))
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    position = base
    for info in tensors:
        if info.start != position:
            raise UserError(
                f"{file.name}: the bytes of {info.name} begin at {info.start} where {position} is expected",
                "the header has overlaps or gaps",
            )
        position += info.nbytes
    if position != size:
        raise UserError(
            f"{file.name}: the tensors end at byte {position}, but the file has {size}",
            "the header is wrong or the shard is damaged",
        )
    return {info.name: info for info in tensors}


def _weight_files(path: Path) -> dict[Path, set[str]]:
    """Shard → tensor names that the index lists for it (empty without an index: all tensors count)."""
    index = path / INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise UserError(f"{index} has no weight_map")
        files: dict[Path, set[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise UserError(
                    f"{index.name} puts {name!r} in {shard!r}, which is outside the checkpoint directory",
                    "an index may only name files in its own folder",
                )
            files.setdefault(path / shard, set()).add(name)
        return dict(sorted(files.items()))
    if (path / SINGLE).is_file():
        return {path / SINGLE: set()}
    files_here = sorted(path.glob("*.safetensors"))
    usual = [file for file in files_here if not file.name.startswith(OWN_LAYOUT)]
    if files_here and not usual:
        raise UserError(
            f"{path} has only {files_here[0].name}: weights in Mistral's layout, not Hugging Face's",
            "give a checkpoint with model.safetensors files",
        )
    return {file: set() for file in usual}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes(), str(path), nan=False)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}", "give the directory of a Hugging Face checkpoint") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object")
    return data


def _convert_pickles(pickles: list[Path]) -> tempfile.TemporaryDirectory[str]:
    """Rewrite pickled shards as safetensors in a temporary folder that lives as long as the checkpoint object."""
    import pickle

    import torch
    from safetensors.torch import save_file

    folder = tempfile.TemporaryDirectory(prefix="expertsmith-")
    for number, file in enumerate(pickles):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError) as error:
            raise UserError(f"{file.name} cannot be read with weights_only: {str(error).splitlines()[0]}") from None
        tensors = {name: value.contiguous().clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
        save_file(tensors, os.path.join(folder.name, f"part-{number:05d}.safetensors"))
    return folder


def _from_metadata(folder: Path, metadata: Mapping[str, Any], source: str) -> Checkpoint:
    """Config and headers of a hub repository, without its weights."""
    tensors = {
        name: TensorInfo(
            name,
            str(entry.dtype),
            tuple(entry.shape),
            Path(shard),
            entry.data_offsets[0],
            entry.data_offsets[1] - entry.data_offsets[0],
        )
        for shard, part in metadata.items()
        for name, entry in part.tensors.items()
    }
    return Checkpoint(folder, _read_json(folder / "config.json"), tensors, source)
