"""Turn records into seeded batches of token ids with a domain label, and a fingerprint of these ids.

`[DOMAIN=]SOURCE[#PART][:N]`: `calibration.records` describes SOURCE and its records; PART heldout is every eighth record, PART calib all others; N is
the maximum number of sequences taken.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from expertsmith.calibration.records import FIELDS, in_one_form, read_records, remarks
from expertsmith.calibration.spec import Spec, parse_spec
from expertsmith.engine.walk import Batch
from expertsmith.errors import UserError, install_line

Overlong = Literal["refuse", "truncate", "drop"]


@dataclass(frozen=True)
class DataOptions:
    """How records become sequences.

    `pack` None packs a source of plain text; a source with demonstrations (messages, prompt + response) keeps one record a sequence.
    `samples`: maximum number of sequences of a source, drawn with `seed`. The last `overlap` tokens of a packed window are repeated at
    the start of the next, so that an evaluation predicts every token once. `columns`: field → its column in the data, {"text": "body"}.
    """

    samples: int = 128
    seq_len: int = 2048
    seed: int = 42
    pack: bool | None = None
    batch_tokens: int = 8192
    overlong: Overlong = "refuse"
    overlap: int = 0
    columns: Mapping[str, str] | None = None


@dataclass
class TokenData:
    """Sequences of token ids by domain, whether they are packed, and notes about the data for the user."""

    sequences: dict[str, list[list[int]]]
    packed: dict[str, bool]
    notes: list[str] = field(default_factory=list)

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

    def first(self, count: int) -> TokenData:
        """At most `count` of the sequences: the first of each domain, then the second of each, and so on."""
        places = sorted((place, number) for number, rows in enumerate(self.sequences.values()) for place in range(len(rows)))[
            :count
        ]
        taken = {
            domain: [rows[place] for place, other in places if other == number]
            for number, (domain, rows) in enumerate(self.sequences.items())
        }
        left = {domain: rows for domain, rows in taken.items() if rows}
        return TokenData(left, {domain: self.packed[domain] for domain in left})

    def batches(self, batch_tokens: int, pad_id: int = 0) -> list[Batch]:
        """Batches of one domain each, with at most `batch_tokens` positions including padding, but at least one row. The longest rows
        come first, so that rows of similar length share a batch."""
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
        tokenizer: None if the model directory has none; then every record needs `input_ids`.
        max_positions: the model's own window; `seq_len` minus `overlap` may not exceed it.

    Raises:
        UserError: no data, a missing source, records without text, a record longer than the window, ids out of range.
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
    said: list[str] = remarks(parsed)
    for spec in parsed:
        rows, is_packed = _sequences(spec, tokenizer, options, said)
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
    return TokenData(dict(sorted(sequences.items())), packed, list(dict.fromkeys(said)))


def _sequences(spec: Spec, tokenizer: Any | None, options: DataOptions, said: list[str]) -> tuple[list[list[int]], bool]:  # noqa: C901  (one check after another)
    documents: list[list[int]] = []
    places: list[str] = []
    demonstrations = 0
    for place, record in read_records(spec.source, options.columns, spec.part):
        ids, demonstration = tokenize(record, tokenizer, place, said)
        demonstrations += demonstration
        if ids:
            documents.append(ids)
            places.append(place)
    if not documents:
        raise UserError(f"{spec.name} has no text", f"its records need {FIELDS}")
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


def tokenize(
    record: Mapping[str, Any], tokenizer: Any | None, place: str, said: list[str] | None = None
) -> tuple[list[int], bool]:
    """Token ids of a record, and whether it is a demonstration (a conversation, or a prompt with its answer).

    A text becomes `bos text eos`; bos or eos is omitted if the tokenizer has none. A demonstration is rendered with the chat template (see
    `render`). Changes to a record that the user should know of are appended to `said`.
    """
    usual = in_one_form(record, place)
    if "input_ids" in usual:
        return list(usual["input_ids"]), False
    if "text" in usual and not usual["text"].strip():
        return [], False
    if tokenizer is None:
        raise UserError(
            f"{place} has text, but the model directory has no tokenizer (code from a checkpoint is not run)",
            "give records with input_ids, or add the tokenizer files to the model directory",
        )
    if "text" in usual:
        return frame(tokenizer, usual["text"]), False
    if "prompt" in usual and not getattr(tokenizer, "chat_template", None):
        return frame(tokenizer, usual["prompt"] + usual["response"]), True
    return render(tokenizer, conversation(usual), place, tools=usual.get("tools"), said=said), True


def conversation(usual: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a demonstration, as converted by `in_one_form`."""
    if "messages" in usual:
        return list(usual["messages"])
    return [{"role": "user", "content": usual["prompt"]}, {"role": "assistant", "content": usual["response"]}]


def frame(tokenizer: Any, text: str, end: bool = True) -> list[int]:
    """The token ids of `bos text eos`, without eos if not `end`; bos or eos is omitted if the tokenizer has none."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return ([bos] if bos is not None else []) + ids + ([eos] if end and eos is not None else [])


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    place: str,
    answer: bool = False,
    tools: Any = None,
    said: list[str] | None = None,
) -> list[int]:
    """The token ids of messages rendered with the chat template; with `answer`, up to the start of the model's answer.

    Without a template, messages are written as `User: …`, `Assistant: …`. If the template rejects a system message, its text is put before
    the user's. Both are noted in `said`.
    """
    said = [] if said is None else said
    if not getattr(tokenizer, "chat_template", None):
        said.append('the tokenizer has no chat template; messages are written as "User: …" and "Assistant: …"')
        return frame(tokenizer, _plainly(messages, answer), end=not answer)
    more: dict[str, Any] = {"tools": tools} if tools else {}
    try:
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer, **more)
        except Exception:
            joined = _without_system(messages)
            if joined is None:
                raise
            rendered = tokenizer.apply_chat_template(joined, tokenize=False, add_generation_prompt=answer, **more)
            said.append("the chat template takes no system message; its text was put before the user's")
    except Exception as error:  # templates are user-supplied Jinja: anything can come out
        raise UserError(f"{place}: the chat template rejects these messages: {error}") from None
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def _plainly(messages: Sequence[Mapping[str, Any]], answer: bool) -> str:
    turns = [f"{str(message['role']).capitalize()}: {message.get('content') or ''}" for message in messages]
    return "\n\n".join([*turns, *(["Assistant:"] if answer else [])])


def _without_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with the system message put before the text of the user message after it; None if they do not begin with these two."""
    if len(messages) < 2 or messages[0].get("role") != "system" or messages[1].get("role") != "user":
        return None
    text = f"{messages[0].get('content') or ''}\n\n{messages[1].get('content') or ''}"
    return [{**messages[1], "content": text}, *map(dict, messages[2:])]


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer of a model directory, or None if it has none that works without remote code.

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
            except Exception as error:  # its class rejects this config.json, see read_config
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
        ):  # of sentencepiece or tiktoken: transformers tries both and names the last
            parts = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf", "tiktoken": "tiktoken"}
            package = "pip install " + " ".join(name for module, name in parts.items() if not _is_installed(module))
            first = "convert tokenizer.model first"
        if package:
            raise UserError(f"the tokenizer in {path} needs a package that is not installed: {first}", package) from None
        raise UserError(f"the tokenizer in {path} cannot be loaded: {first}", "check its files for damage") from None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its parent package is missing, or its import is blocked
        return False


def _own_config(path: Path) -> dict[str, Any]:
    """The `config` argument for the tokenizer of a model_type that transformers does not know, else nothing. Without it, transformers reads
    config.json itself and can fail on the model's keys."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        held = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(held, dict) or held.get("model_type") in CONFIG_MAPPING:
        return {}
    return {"config": PreTrainedConfig(tokenizer_class=held.get("tokenizer_class"))}
