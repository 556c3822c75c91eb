"""Text from the CPython installation, in three domains: the data source `demo:DOMAIN/SPLIT`.

Nothing is packaged or downloaded: the text is read at run time from the running interpreter.

* ``code``: source files of the standard library, with their docstrings removed;
* ``prose``: English technical prose, from the ``pydoc_data.topics`` language reference and from the docstrings taken
  out of the standard library;
* ``unicode``: records of the Unicode character database such as ``U+00E9 LATIN SMALL LETTER E WITH ACUTE``.

Every document belongs to exactly one split (``train``, ``calib`` or ``heldout``), chosen by a hash of its name. A
module of the standard library has one split in ``code`` and ``prose`` and in all files of its package, so the split of a
text does not change when it moves between Python releases (``zipfile.py`` became ``zipfile/__init__.py``). The text
itself still differs a little from release to release, because the standard library and the Unicode database grow. The
splits of one installation never overlap.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import re
import sysconfig
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path

DOMAINS: tuple[str, ...] = ("code", "prose", "unicode")
SPLITS: tuple[str, ...] = ("train", "calib", "heldout")

CALIB_PERCENT = 12
HELDOUT_PERCENT = 12

# Tests and idlelib are not shipped by every distribution, lib2to3 and distutils were removed in 3.12/3.13, the rest is
# generated data, not prose or code that somebody wrote.
SKIPPED_NAMES = frozenset(
    (
        *("test", "tests", "idlelib", "lib2to3", "distutils", "encodings", "ensurepip", "turtledemo", "__phello__"),
        *("site-packages", "dist-packages", "lib-dynload", "pydoc_data", "__pycache__"),
        *("entities.py", "stringprep.py", "locale.py", "antigravity.py", "this.py"),
    )
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "__hello__")
MIN_FILE_BYTES = 800
MAX_FILE_BYTES = 120_000

MIN_DOCUMENT_CHARS = 200
BLOCK_SIZE = 64
CHUNK_CHARS = 4_000
DEFAULT_BUDGET = 80_000


def documents(domain: str, split: str) -> list[str]:
    """Return the texts of one domain and split, in an order that depends on the installation only.

    Args:
        domain: one of `DOMAINS`.
        split: ``"train"``, ``"calib"`` or ``"heldout"``.

    Raises:
        ValueError: for an unknown domain or split.
        RuntimeError: if the installation has no such text (for example a standard library inside a zip file).
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}, expected one of {DOMAINS}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {SPLITS}")
    texts = [text for key, text in _DOMAIN_READERS[domain]() if _split_of(key) == split]
    if not texts:
        raise RuntimeError(f"this Python installation has no {split} text for the domain {domain!r}")
    return texts


def pieces(domain: str, split: str, budget: int = DEFAULT_BUDGET) -> Iterator[str]:
    """Return pieces of whole lines, at most `budget` bytes in total, taken in turn from all documents: the first piece of each, then the
    second of each. So a small budget still covers many documents."""
    return _pieces(documents(domain, split), budget)


def write(folder: str | os.PathLike[str], split: str, budget: int = DEFAULT_BUDGET) -> dict[str, Path]:
    """Write ``<domain>.jsonl`` files of ``{"text": ...}`` records for one split: `pieces` of at most `budget` bytes of text.

    Returns:
        The path written for each domain.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    for domain in DOMAINS:
        path = target / f"{domain}.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as stream:
            for piece in pieces(domain, split, budget):
                stream.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
        written[domain] = path
    return written


def _split_of(key: str) -> str:
    """Choose the split of a document from its name alone."""
    percent = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:4], "big") % 100
    if percent < HELDOUT_PERCENT:
        return "heldout"
    return "calib" if percent < HELDOUT_PERCENT + CALIB_PERCENT else "train"


def _pieces(texts: list[str], budget: int) -> Iterator[str]:
    """Yield pieces of the texts, one of each text in turn, until `budget` bytes of UTF-8 are spent."""
    # Neighbours in sorted order are alike (files of one package, blocks of one script): a hash order mixes them.
    mixed = sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8")).digest())
    queues = [_chunks(text) for text in mixed]
    spent = 0
    while queues:
        remaining = []
        for queue in queues:
            piece = next(queue, None)
            if piece is None:
                continue
            spent += len(piece.encode("utf-8"))
            if spent > budget:
                return
            yield piece
            remaining.append(queue)
        queues = remaining


def _chunks(text: str) -> Iterator[str]:
    """Cut a text at line ends into chunks of about `CHUNK_CHARS` characters."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= CHUNK_CHARS:
            yield "".join(lines)
            lines, size = [], 0
    if size >= MIN_DOCUMENT_CHARS:
        yield "".join(lines)


# --- code and docstrings -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _modules() -> tuple[tuple[str, str, str], ...]:
    """Return (split key, code without docstrings, prose of the docstrings) of the standard library's files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for path in _source_files(root):
        try:
            source = path.read_text(encoding="utf-8")
            code, prose = _separate(source)
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        # One split for a whole package and for its private twin: `_pydecimal` is the text of `decimal`.
        name = path.relative_to(root).parts[0].removesuffix(".py").lstrip("_").removeprefix("py") or "py"
        modules.append((f"stdlib:{name}", code, prose))
    return tuple(modules)


def _source_files(root: Path) -> Iterator[Path]:
    """Yield the standard library's source files in sorted order, without tests and generated data."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not _skipped(name))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix != ".py" or _skipped(name):
                continue
            if MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
                yield path


def _skipped(name: str) -> bool:
    return name in SKIPPED_NAMES or name.startswith(SKIPPED_PREFIXES)


def _separate(source: str) -> tuple[str, str]:
    """Split a source file into its code without docstrings and the prose of its docstrings."""
    # Not splitlines: it would also break at form feeds, which the parser's line numbers do not count.
    lines = [f"{line}\n" for line in source.split("\n")]
    paragraphs: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        paragraphs.extend(_prose_paragraphs(inspect.cleandoc(docstring)))
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno or node.body[0].lineno
        # A body that shares its docstring's line ("def f(): 'doc'") stays: cutting whole lines would cut the code too.
        if lines[first].lstrip().startswith(('"', "'", "r", "R", "u", "U")):
            lines[first:last] = [""] * (last - first)
    code = re.sub(r"\n{4,}", "\n\n\n", "".join(lines)).strip("\n") + "\n"
    return code, "\n\n".join(paragraphs)


def _code() -> Iterator[tuple[str, str]]:
    for key, code, _ in _modules():
        if len(code) >= MIN_DOCUMENT_CHARS:
            yield key, code


# --- prose ---------------------------------------------------------------------------------------------------------


def _prose() -> Iterator[tuple[str, str]]:
    yield from _topics()
    for key, _, prose in _modules():
        if len(prose) >= MIN_DOCUMENT_CHARS:
            yield key, prose + "\n"


@functools.lru_cache(maxsize=1)
def _topics() -> tuple[tuple[str, str], ...]:
    """Return (split key, text) of the language reference topics, each paragraph in one topic only."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ()
    # Topics are sections of the reference and contain one another, so a paragraph would reach several splits: keep it
    # in the shortest topic which has it.
    seen: set[str] = set()
    kept: list[tuple[str, str]] = []
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        paragraphs = []
        for paragraph in _prose_paragraphs(topics[name]):
            signature = " ".join(paragraph.split()).lower()
            if signature not in seen:
                seen.add(signature)
                paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs)
        if len(text) >= MIN_DOCUMENT_CHARS:
            kept.append((f"topic:{name}", text + "\n"))
    return tuple(sorted(kept))


def _prose_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs that read as English, without indentation; leave out code blocks, tables and headings."""
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        paragraph = textwrap.dedent(block.strip("\n")).rstrip()
        if len(paragraph) < 40 or ">>>" in paragraph:
            continue
        plain = sum(char.isalpha() or char in " \n.,;'" for char in paragraph)
        words = paragraph.split()
        if plain >= 0.9 * len(paragraph) and sum(word.isalpha() for word in words) >= 0.6 * len(words):
            yield paragraph


# --- unicode -------------------------------------------------------------------------------------------------------


def _unicode() -> Iterator[tuple[str, str]]:
    """Yield (split key, records) for each block of consecutive code points that has named characters."""
    for start in range(0, 0x110000, BLOCK_SIZE):
        records = []
        for code_point in range(start, start + BLOCK_SIZE):
            name = unicodedata.name(chr(code_point), "")
            # Names made of the code point itself (ideographs) or of its syllable teach nothing and are 90 % of all.
            if name and not name.endswith(f"{code_point:04X}") and not name.startswith("HANGUL SYLLABLE"):
                records.append(f"U+{code_point:04X} {name}\n")
        text = "".join(records)
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield f"unicode:{start:06X}", text


_DOMAIN_READERS = {"code": _code, "prose": _prose, "unicode": _unicode}
