"""Read records of text in their usual published forms, and convert each to one form.

A source is a .jsonl/.json/.csv/.txt/.md/.parquet file (text files also as .gz or .zst), a folder of such files, a hub data set
`name[subset](split)`, or text from the Python installation (`demo:code/calib`).

A record has one of these forms; the first that matches is used: `input_ids`; `messages`; `prompt` and `response` or `completion` (texts, or
lists of messages as in TRL); `text`; `conversations` (ShareGPT); `instruction`, `input`, `output` (Alpaca); `question` and `answer`. Tool
calls and `tools` go to the chat template unchanged. The parts of a message are joined; parts that are not text are refused.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from expertsmith.calibration import corpus
from expertsmith.calibration.spec import (
    DEFAULT_DOMAIN,
    DEMO,
    HELD_EVERY,
    SUFFIXES,
    Spec,
    demo_text,
    is_data_file,
    parse_spec,
    suffix_of,
)
from expertsmith.errors import UserError, install_line, parse_json

FIELDS = "input_ids, text, messages, conversations, prompt + response or completion, instruction + output, or question + answer"
HUB = re.compile(r"^(?P<name>[\w.\-]+/[\w.\-]+|[\w.\-]+)(?:\[(?P<subset>[^\]]+)\])?(?:\((?P<split>[^)]+)\))?$")
ROLES = {  # name in ShareGPT data → role
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
HELD_OUT = re.compile(r"test|valid|eval|held[_-]?out|(?<![a-z])dev(?![a-z])", re.I)
TRAINING = re.compile(r"train|calib", re.I)


def in_one_form(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Convert a record to one of {input_ids}, {text}, {prompt, response}, {messages, tools}.

    Raises:
        UserError: the fields match none of the forms listed in the module, or have a wrong type.
    """
    if record.get("input_ids") is not None:  # a table has every column in every row
        ids = record["input_ids"]
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
            raise UserError(f"{place}: input_ids is not a list of integers")
        return {"input_ids": ids}
    tools = record.get("tools")
    for form in (_messages, _prompt, _text, _sharegpt, _alpaca, _question):
        found = form(record, place)
        if found is not None:
            return {**found, **({"tools": parse_json(tools, place) if isinstance(tools, str) else tools} if tools else {})}
    raise UserError(f"{place} has the fields {', '.join(sorted(map(str, record))) or '(none)'}, but a record needs {FIELDS}")


def _messages(record: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    held = record.get("messages")
    return {"messages": _turns(held, place)} if isinstance(held, list) else None


def _prompt(record: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    prompt = record.get("prompt")
    answer = record["response"] if record.get("response") is not None else record.get("completion")
    if isinstance(prompt, str) and isinstance(answer, str):
        return {"prompt": prompt, "response": answer}
    if isinstance(prompt, list) and isinstance(answer, list):
        return {"messages": _turns([*prompt, *answer], place)}
    return None


def _text(record: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    return {"text": record["text"]} if isinstance(record.get("text"), str) else None


def _sharegpt(record: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    held = record.get("conversations")
    if not isinstance(held, list):
        return None
    turns = [_turn_of_sharegpt(turn, place) for turn in held]
    return {"messages": _turns([*_system(record), *turns], place)}


def _turn_of_sharegpt(turn: Any, place: str) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn  # `conversations` of role and content
    role = ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise UserError(f"{place}: a turn is from {turn['from']!r}", f"known are {', '.join(ROLES)}")
    return {"role": role, "content": turn.get("value")}


def _alpaca(record: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    asked, answer, more = record.get("instruction"), record.get("output"), record.get("input")
    if not isinstance(asked, str) or not isinstance(answer, str):
        return None
    if more is not None and not isinstance(more, str):
        raise UserError(f"{place}: input is not a text")
    return {"messages": _turns([*_system(record), *_asked("\n\n".join(filter(None, (asked, more))), answer)], place)}


def _question(record: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    question, answer = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    return {"messages": [*_system(record), *_asked(question, answer)]}


def _asked(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    held = record.get("system")
    return [{"role": "system", "content": held}] if isinstance(held, str) and held else []


def _turns(messages: Sequence[Any], place: str) -> list[dict[str, Any]]:
    """The messages with text as content; it may be null only with tool calls."""
    if not messages:
        raise UserError(f"{place} has no messages")
    made = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{place}: a message has no role", 'write {"role": "user", "content": "…"}')
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = "".join(_part(part, place) for part in content)
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise UserError(f"{place}: a message of {message['role']} has no text")
        made.append({**{key: value for key, value in message.items() if value is not None}, "content": content})
    return made


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if (
        isinstance(part, Mapping)
        and isinstance(part.get("text"), str)
        and part.get("type", "text") in ("text", "input_text", "output_text")
    ):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UserError(f"{place}: a message has a part of type {kind}; only text is read", "remove such records")


def remarks(specs: Sequence[Spec]) -> list[str]:
    """Notes on the sources for the user: those joined into one domain or given twice, and the (mixed) files of folders."""
    said = []
    unlabelled = [spec.source for spec in specs if spec.domain == DEFAULT_DOMAIN]
    if len(unlabelled) > 1:
        said.append(f"{', '.join(unlabelled)} have no DOMAIN= and are read as one domain")
    if unlabelled and len(unlabelled) < len(specs):
        said.append(f"without DOMAIN=, so of domain {DEFAULT_DOMAIN}: {', '.join(unlabelled)}")
    given = Counter(
        f"{Path(spec.source).resolve()}{f'#{spec.part}' if spec.part else ''}" if Path(spec.source).exists() else spec.name
        for spec in specs
    )
    said.extend(f"{source} is given {count} times" for source, count in given.items() if count > 1)
    for spec in specs:
        if Path(spec.source).is_dir():
            names = [str(file.relative_to(spec.source)) for file in _files(Path(spec.source))]
            said.append(f"{spec.source}: {len(names)} files are read, {', '.join(names[:4])}{', …' if len(names) > 4 else ''}")
            apart = [[name for name in names if kind.search(name)] for kind in (TRAINING, HELD_OUT)]
            if all(apart):
                said.append(
                    f"{spec.source} holds training text ({apart[0][0]}) and held-out text ({apart[1][0]}); give the files one by one to keep them apart"
                )
    return said


def read_records(
    source: str, columns: Mapping[str, str] | None = None, part: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, record) of a source, in a fixed order.

    Args:
        columns: field → its column, if that has another name: {"text": "body"}.
        part: "heldout": every eighth record only; "calib": the others.
    """
    for number, (place, record) in enumerate(_read(source), 1):
        if part and (number % HELD_EVERY == 0) != (part == "heldout"):
            continue
        if columns:
            missing = [name for name in columns.values() if name not in record]
            if missing:
                raise UserError(
                    f"{place} has no column {missing[0]}", f"its columns are {', '.join(map(str, record)) or '(none)'}"
                )
            record = {**record, **{name: record[column] for name, column in columns.items()}}
        yield place, record


def apart(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Specifications of calibration text and of held-out text, by setting every eighth record of each source aside. A source with a part of its own, or
    with fewer than eight records, has none to set aside: it is calibration text."""
    calib, held = [], []
    for text in texts:
        spec = parse_spec(text)
        can = spec.part is None and next(islice(_read(spec.source), HELD_EVERY - 1, None), None) is not None
        calib.append(str(replace(spec, part="calib")) if can else text)
        held += [str(replace(spec, part="heldout"))] if can else []
    return calib, held


def _read(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(source)
    if source.startswith(DEMO):
        for number, text in enumerate(corpus.pieces(*demo_text(source)), 1):
            yield f"{source} piece {number}", {"text": text}
    elif path.is_dir():
        files = _files(path)
        if not files:
            raise UserError(f"folder {source} holds no {'/'.join(SUFFIXES)} files")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        if not is_data_file(path):
            raise UserError(f"{source} is a {path.suffix or 'nameless'} file", f"data files are {', '.join(SUFFIXES)}")
        yield from _read_file(path)
    elif is_data_file(path) or path.is_absolute() or source.startswith("."):
        raise UserError(f"data file not found: {source}")
    else:
        yield from _read_hub(source)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if is_data_file(file) and file.is_file())


def _read_file(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kind = suffix_of(file)
    if kind == ".parquet":
        yield from _read_parquet(file)
        return
    text = _text_of(file)
    if kind in (".txt", ".md"):
        yield str(file), {"text": text}
    elif kind == ".csv":
        yield from _read_csv(file, text)
    elif kind == ".json":
        records = parse_json(text, str(file))
        if not isinstance(records, list):
            records = [records]
        for number, record in enumerate(records, 1):
            yield f"{file} record {number}", _mapping(record, f"{file} record {number}")
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{file}:{number}", _mapping(parse_json(line, f"{file}:{number}"), f"{file}:{number}")


def _text_of(file: Path) -> str:
    """The unpacked text of a file, with line feeds as line ends and without a byte order mark."""
    held = file.read_bytes()
    try:
        if file.suffix == ".gz":
            held = gzip.decompress(held)
        elif file.suffix == ".zst":
            held = _zstandard(held)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be unpacked: {error}", "check that the file is whole") from None
    try:
        return io.StringIO(held.decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None


def _zstandard(held: bytes) -> bytes:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UserError("reading .zst needs zstandard", 'pip install "expertsmith[data]"') from None
    made = []
    while held:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            made.append(frame.decompress(held))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        if not frame.eof:  # the library says nothing when a file ends too early
            raise EOFError("it ends before its last frame does")
        held = frame.unused_data
    return b"".join(made)


def _read_csv(file: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # a document is one field
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for number, record in enumerate(rows, 1):
            place = f"{file} row {number}"
            if None in record:
                raise UserError(
                    f"{place} has more fields than the first row has names", "give the columns names in the first row"
                )
            yield place, record
    except csv.Error as error:
        raise UserError(f"{file} is not a readable .csv file: {error} (line {rows.line_num})") from None


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
