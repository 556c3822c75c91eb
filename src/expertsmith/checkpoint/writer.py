"""Write a checkpoint as shards of limited size, from byte ranges of other files, which are never decoded, and from computed bytes.

Everything is written in `OUT.work`, next to the target, and renamed when complete; config.json is written last, so the output of an
interrupted run does not load.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from expertsmith.checkpoint.code import code_files
from expertsmith.checkpoint.hub import INDEX, SINGLE
from expertsmith.checkpoint.reader import Checkpoint
from expertsmith.checkpoint.work import work_beside
from expertsmith.errors import UserError

CHUNK = 2**20  # small enough to stay in a core's cache while it is read, checked and written
PLACED = hasattr(os, "pwrite")  # Windows has no positioned writes, so one thread writes there
THREADS = 4 if PLACED else 1  # for copying; more would only wait for memory
MAX_SHARD = 5 * 10**9  # as in transformers
LEFT_BEHIND = (  # lower-case name patterns of files that describe the source but not the result
    # weights of any form, and their indices
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.msgpack", "*.h5"),
    *("*.npz", "*.pkl", "*.pickle", "*.tflite", "*.mlmodel", "*.nemo", "*.zip", "*.tar", "*.gz", "consolidated*", "params.json", "adapter_*"),
    # measurements, and settings of training or quantisation
    *("*result*", "*benchmark*", "*eval*.json", "*eval*.yaml", "*.csv", "*.tsv", "*.jsonl", "*.parquet", "*.log", "*.tfevents*", "trainer_*"),
    *("training_*", "recipe.yaml", "recipe.yml", "*imatrix*", "*.dat", "checksum*", "*.sha256", "*.md5"),
    # text, pictures and programs about it
    *("readme*", "*.md", "*.rst", "*.pdf", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.html", "*.py", "*.ipynb", "*.sh"),
)  # fmt: skip
LICENCES = ("licen[cs]e*", "notice*", "copying*", "use_policy*", "acceptable_use*", "third_party*")  # always copied
TEMPLATES = "additional_chat_templates"  # the only folder that is copied


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of bytes of a file."""

    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Made:
    """Bytes that are not in a file: `make` computes all `nbytes` of them each time they are written or compared."""

    nbytes: int
    make: Callable[[], bytes | memoryview]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to write: the concatenation of `pieces`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece | Made, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)


def prepare_target(out: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse a target that exists (unless `overwrite`), and one that is the source, contains it or lies in it."""
    if source is not None and source.exists():
        resolved, origin = out.resolve(), source.resolve()
        if resolved == origin or resolved in origin.parents or origin in resolved.parents:
            raise UserError(f"the output {out} and the source {source} overlap", "choose another output directory")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already", "choose another output directory or pass --overwrite")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", "choose another output directory")


def write_checkpoint(
    out: Path,
    tensors: Sequence[OutputTensor],
    config: Mapping[str, Any],
    *,
    source: Checkpoint,
    texts: Mapping[str, str | bytes],
    overwrite: bool = False,
    max_shard: int = MAX_SHARD,
    shard_of: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    on_tensor: Callable[[OutputTensor, memoryview], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write shards, index, config, the source's tokenizer and generation files, the code files that `auto_map` entries name, and `texts`
    (relative path → content).

    Args:
        shard_of: tensor → name of its file; if None, files are filled up to `max_shard` bytes.
        without: files of the source that are not copied.
        on_tensor: called with every chunk of bytes before it is written; may raise to stop. Several threads copy chunks from files, so
            calls may overlap.
        progress: called with the number of bytes just written, by one thread at a time.

    Raises:
        UserError: the target exists or overlaps the source, or the disk is full; then nothing is left behind.
    """
    prepare_target(out, source.path, overwrite)
    above = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise UserError(f"the checkpoint needs {total / 1e9:.2f} GB, but {out.parent} has {free / 1e9:.2f} GB free")
    try:
        with work_beside(out, "writing", scratch=True) as partial:
            partial.mkdir()
            _write_shards(partial, _named_shards(tensors, max_shard, shard_of), on_tensor, progress)
            for file in (*companions(source.path), *(source.path / name for name in code_files(source.path, config))):
                if file.name in without:
                    continue
                target = partial / file.relative_to(source.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
            for name, text in texts.items():
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(text.encode() if isinstance(text, str) else text)
            (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            swap(partial, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"the disk of {out.parent} is full, or a size limit was reached ({error.strerror}): the checkpoint needs {total / 1e9:.2f} GB",
                "no partial output was left",
            ) from None
        raise
    finally:
        if not out.exists():
            with suppress(OSError):  # another process has written something there
                for folder in above:
                    folder.rmdir()


def companions(path: Path) -> list[Path]:
    """The files that are copied with a checkpoint unchanged: tokenizer, processors, generation config, chat templates, licences. Not copied
    are weights, code, files that describe the source only (`LEFT_BEHIND`), hidden files, and folders except that of further chat
    templates."""
    here = [file for file in _visible(path) if _travels(file.name)]
    return here + sorted((path / TEMPLATES).glob("*.jinja"))


def left_behind(source: Checkpoint) -> list[str]:
    """A note for the user on the files that are not copied, if there are any. Other notes cover weights and code files."""
    own = {info.file.name for info in source.tensors.values()}
    names = [file.name for file in _visible(source.path) if not _travels(file.name) and file.name not in own]
    told = [name for name in names if name not in ("config.json", "README.md", INDEX) and not name.endswith(".py")]
    return [f"files that describe the source only were not copied: {', '.join(told)}"] if told else []


def _visible(path: Path) -> list[Path]:
    return [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]


def _travels(name: str) -> bool:
    small = name.lower()
    if any(fnmatchcase(small, pattern) for pattern in LICENCES):
        return not small.endswith(".py")
    return small != "config.json" and not any(fnmatchcase(small, pattern) for pattern in LEFT_BEHIND)


def _shards(tensors: Sequence[OutputTensor], max_shard: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _named_shards(
    tensors: Sequence[OutputTensor], max_shard: int, shard_of: Mapping[str, str] | None
) -> dict[str, list[OutputTensor]]:
    if shard_of is not None:
        named: dict[str, list[OutputTensor]] = {}
        for tensor in tensors:
            named.setdefault(shard_of[tensor.name], []).append(tensor)
        return named if len(named) > 1 else {SINGLE: list(tensors)}
    shards = _shards(tensors, max_shard)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def _write_shards(
    folder: Path,
    shards: Mapping[str, Sequence[OutputTensor]],
    on_tensor: Callable[[OutputTensor, memoryview], None] | None,
    progress: Callable[[int], None] | None,
) -> None:
    own, lock = threading.local(), threading.Lock()

    def put(sink: int, position: int, tensor: OutputTensor, piece: Piece | Made) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(CHUNK))
        for view in chunks(piece, own.buffer):
            if on_tensor:
                on_tensor(tensor, view)
            position = write_all(sink, view, position)
            if progress:
                with lock:
                    progress(len(view))

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for name, shard in shards.items():
            with open(folder / name, "wb", buffering=0) as sink:
                _fill(pool, sink.fileno(), shard, put)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _fill(pool: ThreadPoolExecutor, sink: int, shard: Sequence[OutputTensor], put: Callable[..., None]) -> None:
    """Write a shard. The pool copies pieces of files; computed pieces are made in order: `make` may accumulate values and needs memory."""
    position = write_all(sink, _header(shard), 0)
    waiting: deque[Future[None]] = deque()
    try:
        for tensor, piece in ((entry, part) for entry in shard for part in entry.pieces):
            if isinstance(piece, Made):
                put(sink, position, tensor, piece)
            else:
                waiting.append(pool.submit(put, sink, position, tensor, piece))
            position += piece.nbytes
            while len(waiting) > 16 * THREADS:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
    finally:  # no thread may write to a closed file
        for future in waiting:
            future.cancel()
        wait(waiting)


def _header(tensors: Iterable[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_all(sink: int, data: bytes | memoryview, position: int) -> int:
    """Write all of `data` at a position of a file and return the position after it. A single write may be short (disk nearly full)."""
    view = memoryview(data)
    while view:
        if PLACED:
            count = os.pwrite(sink, view, position)
        else:
            os.lseek(sink, position, os.SEEK_SET)
            count = os.write(sink, view)
        view, position = view[count:], position + count
    return position


def chunks(piece: Piece | Made, buffer: memoryview) -> Iterator[memoryview]:
    """Yield the bytes of a piece, at most `len(buffer)` at a time. A view is valid until the next one is requested.

    Raises:
        UserError: the file is shorter than the piece.
        RuntimeError: a computed piece does not have its declared size (a bug in its `make`).
    """
    if isinstance(piece, Made):
        made = memoryview(piece.make()).cast("B")
        if len(made) != piece.nbytes:
            raise RuntimeError(f"a piece of {piece.nbytes} bytes was computed as {len(made)}")
        for start in range(0, len(made), len(buffer)):
            yield made[start : start + len(buffer)]
        return
    with open(piece.file, "rb", buffering=0) as stream:
        stream.seek(piece.start)
        left = piece.nbytes
        while left:
            count = stream.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise UserError(f"{piece.file.name} ended {left} bytes early", "the shard changed while it was read")
            yield buffer[:count]
            left -= count


def read_into(stream: Any, view: memoryview) -> int:
    """Fill a view from an unbuffered stream, whose reads may be short; returns the number of bytes read."""
    done = 0
    while done < len(view) and (count := stream.readinto(view[done:])):
        done += count
    return done


def swap(partial: Path, out: Path) -> None:
    """Rename a finished folder in `OUT.work` to its final name; a folder of that name is replaced."""
    if not out.exists():
        partial.rename(out)
        return
    old = partial.with_name("replaced")
    shutil.rmtree(old, ignore_errors=True)  # left by a killed run
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)
