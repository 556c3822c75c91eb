"""Text → seeded batches of token ids with a domain label, and a fingerprint of these ids.

`[DOMAIN=]SOURCE[:N]`: SOURCE is a .jsonl/.json/.txt/.md/.parquet file, a folder of them, or a hub data set `name[subset](split)`; N bounds
the sequences taken. A record holds `input_ids`, or `text`, or `messages` (the tokenizer's chat template is applied), or `prompt` and
`response`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from expertsmith.calibration import corpus
from expertsmith.calibration.spec import DEMO, SUFFIXES, Spec, demo_text, parse_spec
from expertsmith.engine.walk import Batch
from expertsmith.errors import UserError, install_line, parse_json

FIELDS = "input_ids, text, messages, or prompt + response"
HUB = re.compile(r"^(?P<name>[\w.\-]+/[\w.\-]+|[\w.\-]+)(?:\[(?P<subset>[^\]]+)\])?(?:\((?P<split>[^)]+)\))?$")
Overlong = Literal["refuse", "truncate", "drop"]


@dataclass(frozen=True)
class DataOptions:
    """How records become sequences.

    `pack` None packs plain text and keeps demonstrations (messages, prompt + response) one a sequence. `samples` bounds the
    sequences of a domain; which ones is drawn with `seed`. `overlap` tokens of a packed window are repeated at the start of the
    next, so that an evaluation predicts every token once.
    """

    samples: int = 128
    seq_len: int = 2048
    seed: int = 42
    pack: bool | None = None
    batch_tokens: int = 8192
    overlong: Overlong = "refuse"
    overlap: int = 0


@dataclass
class TokenData:
    """Sequences of token ids by domain, and what they came from."""

    sequences: dict[str, list[list[int]]]
    packed: dict[str, bool]

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens by domain."""
        return {domain: sum(map(len, rows)) for domain, rows in self.sequences.items()}

    @property
    def fingerprint(self) -> str:
        """sha256 over domains, sequence boundaries and token ids."""
        digest = hashlib.sha256()
        for domain in sorted(self.sequences):
            digest.update(f"{domain}\0{len(self.sequences[domain])}\0".encode())
            for row in self.sequences[domain]:
                digest.update(f"{len(row)}\0".encode())
                digest.update(torch.tensor(row, dtype=torch.int64).numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def batches(self, batch_tokens: int, pad_id: int = 0) -> list[Batch]:
        """Batches of one domain each, of at most `batch_tokens` positions with padding (one row at least); long rows first, so that rows
        of like length share a batch."""
        made = []
        for domain, rows in self.sequences.items():
            order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
            while order:
                length = len(rows[order[0]])
                take, order = order[: max(1, batch_tokens // length)], order[max(1, batch_tokens // length) :]
                ids = torch.full((len(take), length), pad_id, dtype=torch.long)
                mask = torch.zeros((len(take), length), dtype=torch.bool)
                for row, index in enumerate(take):
                    ids[row, : len(rows[index])] = torch.tensor(rows[index], dtype=torch.long)
                    mask[row, : len(rows[index])] = True
                made.append(Batch(ids, mask, domain, take))
        return made


def load_tokens(
    specs: Sequence[str | Spec],
    tokenizer: Any | None,
    options: DataOptions,
    max_positions: int | None = None,
    vocab_size: int | None = None,
) -> TokenData:
    """Read, tokenize, pack and sample every source.

    Args:
        tokenizer: None where the model directory has none; then every record needs `input_ids`.
        max_positions: the model's own window, which `seq_len` may not exceed.

    Raises:
        UserError: no data, a source that is not there, records without text, a record longer than the window, ids out of range.
    """
    if not specs:
        raise UserError("no data given", "pass --data FILE (repeatable)")
    if options.seq_len < 2:
        raise UserError(f"seq_len is {options.seq_len}; a sequence has at least 2 tokens")
    if options.samples < 1:
        raise UserError(f"samples is {options.samples}; at least one sequence is needed")
    if max_positions is not None and options.seq_len - options.overlap > max_positions:
        raise UserError(
            f"--seq-len {options.seq_len - options.overlap} is longer than the model's window of {max_positions} positions",
            f"use --seq-len {max_positions} or less",
        )
    parsed = [parse_spec(spec) if isinstance(spec, str) else spec for spec in specs]
    sequences: dict[str, list[list[int]]] = {}
    packed: dict[str, bool] = {}
    for spec in parsed:
        rows, is_packed = _sequences(spec, tokenizer, options)
        if vocab_size is not None:
            highest = max(max(row) for row in rows)
            lowest = min(min(row) for row in rows)
            if highest >= vocab_size or lowest < 0:
                raise UserError(
                    f"{spec.source} has token id {highest if highest >= vocab_size else lowest}, but the model's vocabulary has {vocab_size} entries"
                )
        count = min(spec.limit or options.samples, len(rows))
        chosen = sorted(
            random.Random(f"{options.seed}/{spec.domain}/{len(sequences.get(spec.domain, []))}").sample(range(len(rows)), count)
        )
        sequences.setdefault(spec.domain, []).extend(rows[i] for i in chosen)
        packed[spec.domain] = packed.get(spec.domain, False) or is_packed
    return TokenData(dict(sorted(sequences.items())), packed)


def _sequences(spec: Spec, tokenizer: Any | None, options: DataOptions) -> tuple[list[list[int]], bool]:  # noqa: C901  (one record after another, with what is wrong with it said where it is met)
    documents: list[list[int]] = []
    places: list[str] = []
    demonstrations = 0
    for place, record in read_records(spec.source):
        ids, demonstration = tokenize(record, tokenizer, place)
        demonstrations += demonstration
        if ids:
            documents.append(ids)
            places.append(place)
    if not documents:
        raise UserError(f"{spec.source} has no text", f"its records need {FIELDS}")
    pack = options.pack if options.pack is not None else demonstrations == 0
    if pack:
        windows = list(_pack(documents, options.seq_len, options.overlap))
        if not windows:
            raise UserError(f"{spec.source} has one token; a sequence has at least 2")
        return windows, True
    rows = []
    for place, ids in zip(places, documents, strict=True):
        if len(ids) > options.seq_len:
            if options.overlong == "refuse":
                raise UserError(
                    f"{place} has {len(ids)} tokens, more than the window of {options.seq_len}",
                    "raise --seq-len, pass --overlong truncate|drop, or --pack",
                )
            if options.overlong == "drop":
                continue
        if len(ids) > 1:
            rows.append(ids[: options.seq_len])
    if not rows:
        raise UserError(f"no record of {spec.source} has between 2 and {options.seq_len} tokens")
    return rows, False


def _pack(documents: Iterable[list[int]], seq_len: int, overlap: int) -> Iterator[list[int]]:
    """Documents end to end, cut into windows; a remainder of at least 2 tokens is the last, shorter window."""
    stream: list[int] = []
    for ids in documents:
        stream.extend(ids)
    step = seq_len - overlap
    for start in range(0, max(1, len(stream) - overlap), step):
        window = stream[start : start + seq_len]
        if len(window) > 1:
            yield window


def tokenize(record: Mapping[str, Any], tokenizer: Any | None, place: str) -> tuple[list[int], bool]:
    """Token ids of a record, and whether it is a demonstration (messages, prompt + response).

    A text becomes `bos text eos` as far as the tokenizer has these; a demonstration is what the chat template makes of it.
    """
    if record.get("input_ids") is not None:  # a table has every column in every row
        ids = record["input_ids"]
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
            raise UserError(f"{place}: input_ids is not a list of integers")
        return list(ids), False
    demonstration = isinstance(record.get("messages"), list) or all(
        isinstance(record.get(key), str) for key in ("prompt", "response")
    )
    text = record.get("text")
    if not demonstration:
        if not isinstance(text, str):
            raise UserError(f"{place} has the fields {', '.join(sorted(record)) or '(none)'}, but a record needs {FIELDS}")
        if not text.strip():
            return [], False
    if tokenizer is None:
        raise UserError(
            f"{place} has text, but the model directory has no tokenizer (code from a checkpoint is not run)",
            "give records with input_ids, or add the tokenizer files to the model directory",
        )
    if isinstance(record.get("messages"), list):
        return render(tokenizer, record["messages"], place), True
    if demonstration:
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
            return render(tokenizer, messages, place), True
        return frame(tokenizer, record["prompt"] + record["response"]), True
    return frame(tokenizer, str(text)), False


def frame(tokenizer: Any, text: str, end: bool = True) -> list[int]:
    """`bos text eos`, as far as the tokenizer has these; without `end` no eos."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return ([bos] if bos is not None else []) + ids + ([eos] if end and eos is not None else [])


def render(tokenizer: Any, messages: list[Any], place: str, answer: bool = False) -> list[int]:
    """What the chat template makes of messages; with `answer` up to where the model's answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{place} has messages, but the tokenizer has no chat template", "give prompt + response, or text")
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # templates are user-supplied Jinja: anything can come out
        raise UserError(f"{place}: the chat template rejects these messages: {error}") from None
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def read_records(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) of a file, a folder, a demo text or a hub data set, in a fixed order."""
    path = Path(source)
    if source.startswith(DEMO):
        for number, text in enumerate(corpus.pieces(*demo_text(source)), 1):
            yield f"{source} piece {number}", {"text": text}
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"folder {source} holds no {'/'.join(SUFFIXES)} files")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{source} is a {path.suffix or 'nameless'} file", f"data files are {', '.join(SUFFIXES)}")
        yield from _read_file(path)
    elif path.suffix in SUFFIXES or path.is_absolute() or source.startswith("."):
        raise UserError(f"data file not found: {source}")
    else:
        yield from _read_hub(source)


def _read_file(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None
    if file.suffix in (".txt", ".md"):
        yield str(file), {"text": text}
        return
    if file.suffix == ".json":
        records = _json(text, str(file))
        if not isinstance(records, list):
            records = [records]
        for number, record in enumerate(records, 1):
            yield f"{file} record {number}", _mapping(record, f"{file} record {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file}:{number}", _mapping(_json(line, f"{file}:{number}"), f"{file}:{number}")


def _json(text: str, place: str) -> Any:
    return parse_json(text, place)


def _mapping(record: Any, place: str) -> Mapping[str, Any]:
    if isinstance(record, str):
        return {"text": record}
    if not isinstance(record, Mapping):
        raise UserError(f"{place} is a {type(record).__name__}, but a record is an object with {FIELDS}")
    return record


def _read_parquet(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ModuleNotFoundError:
        raise UserError("reading .parquet needs pyarrow", 'pip install "expertsmith[data]"') from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", record
    except (ArrowException, OSError) as error:  # OSError: pages that cannot be decoded
        raise UserError(
            f"{file} is not a readable .parquet file: {(str(error).strip() or 'damaged').splitlines()[0]}"
        ) from None


def _read_hub(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    match = HUB.fullmatch(source)
    if match is None:
        raise UserError(f"data file not found: {source}, and it is not a hub data set name[subset](split)")
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"{source} is not a file; hub data sets need the datasets library", 'pip install "expertsmith[data]"'
        ) from None
    try:
        table = datasets.load_dataset(match["name"], match["subset"], split=match["split"] or "train")
    except Exception as error:  # the hub client raises many unrelated types; all mean "not available"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source!r} is not a file, and the hub data set could not be loaded: {first}", install_line(error) or ""
        ) from None
    for number, record in enumerate(table, 1):
        yield f"{source} row {number}", record


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer of a model directory, or None where it has none that works without code of its own.

    Raises:
        UserError: there are tokenizer files, but they cannot be loaded.
    """
    if not any(
        (path / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tiktoken.model")
    ):
        return None
    from transformers import AutoTokenizer

    from expertsmith.engine.stock import quietly
    from expertsmith.engine.uneven import read_config

    try:
        with quietly():
            try:
                return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **_own_config(path))
            except Exception as error:  # a config.json that its class does not take as it stands, see read_config
                if "Validation" not in type(error).__name__:
                    raise
                return AutoTokenizer.from_pretrained(path, config=read_config(path), trust_remote_code=False)
    except Exception as error:  # tokenizer back ends raise bare Exceptions
        if "trust_remote_code" in str(error):
            return None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        package = install_line(error)
        if (
            package and (path / "tokenizer.model").exists()
        ):  # of sentencepiece or of tiktoken: transformers tries both, and names the last
            parts = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf", "tiktoken": "tiktoken"}
            package = "pip install " + " ".join(name for module, name in parts.items() if not _is_installed(module))
            first = "convert tokenizer.model first"
        if package:
            raise UserError(f"the tokenizer in {path} needs a package that is not installed: {first}", package) from None
        raise UserError(f"the tokenizer in {path} cannot be loaded: {first}", "check its files for damage") from None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its parent package is not there, or it was blocked
        return False


def _own_config(path: Path) -> dict[str, Any]:
    """The `config` that a tokenizer is loaded with where transformers does not know the model_type: what it then makes of config.json by itself can
    fail on the keys of the model."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        held = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(held, dict) or held.get("model_type") in CONFIG_MAPPING:
        return {}
    return {"config": PreTrainedConfig(tokenizer_class=held.get("tokenizer_class"))}
