"""Parse data specifications of the command line: `[DOMAIN=]SOURCE[#PART][:N]`. Needs no torch, because recipes are checked with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertsmith.errors import UserError

DEFAULT_DOMAIN = "default"
DEMO = "demo:"  # text from the Python installation, by domain and split
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".md", ".parquet")
PACKED = (".gz", ".zst")
PARTS = ("calib", "heldout")  # of a source's records: every `HELD_EVERY`th is held out, the others calibrate
HELD_EVERY = 8


@dataclass(frozen=True)
class Spec:
    """One `--data` argument."""

    domain: str
    source: str
    limit: int | None
    part: str | None = None

    @property
    def name(self) -> str:
        """The source with its part."""
        return f"{self.source}#{self.part}" if self.part else self.source

    def __str__(self) -> str:
        """The specification as a user writes it."""
        labelled = self.domain != DEFAULT_DOMAIN or "=" in self.source
        return f"{f'{self.domain}=' if labelled else ''}{self.name}{f':{self.limit}' if self.limit else ''}"


def parse_spec(text: str) -> Spec:
    """Split `[DOMAIN=]SOURCE[#PART][:N]`. An existing file or folder has priority: a file named `a=b.jsonl` needs no label.

    Raises:
        UserError: an empty source, a limit that is not a positive number, or an unknown demo text.
    """
    usual = _split(text)
    found = next((reading for reading in (*_literal(text), usual) if _exists(reading.source)), usual)
    if found.limit is not None and found.limit <= 0:
        raise UserError(f"{text!r}: the number after the colon is {found.limit}", "give a positive number of sequences")
    if not found.source:
        raise UserError(f"{text!r} has no source", "write [DOMAIN=]SOURCE[#PART][:N], for example math=calib.jsonl:64")
    if found.source.startswith(DEMO):
        demo_text(found.source)
    return found


def other_reading(text: str) -> str | None:
    """A note if another reading of the specification exists too, else None."""
    found, usual = parse_spec(text), _split(text)
    if found == usual or not _exists(usual.source):
        return None
    return f"{text!r} is the file or folder of that name, not {usual.source} of the domain {usual.domain}; write {usual.domain}=./{usual.source} for that"


def _literal(text: str) -> list[Spec]:
    """The readings of a specification without a label: all of it as a name, all but the limit, or all but the part and the limit."""
    source, limit = _limited(text)
    return [Spec(DEFAULT_DOMAIN, text, None), Spec(DEFAULT_DOMAIN, source, limit), _parted(DEFAULT_DOMAIN, source, limit)]


def _split(text: str) -> Spec:
    domain, equals, rest = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.\-]+", domain):
        domain, rest = DEFAULT_DOMAIN, text
    source, limit = _limited(rest)
    return Spec(domain, source, limit) if _exists(source) else _parted(domain, source, limit)


def _parted(domain: str, text: str, limit: int | None) -> Spec:
    source, mark, part = text.rpartition("#")
    return Spec(domain, source, limit, part) if mark and part in PARTS else Spec(domain, text, limit)


def _limited(text: str) -> tuple[str, int | None]:
    source, colon, tail = text.rpartition(":")
    return (source, int(tail)) if colon and re.fullmatch(r"-?\d{1,9}", tail) else (text, None)


def _exists(source: str) -> bool:
    try:
        return bool(source) and Path(source).exists()
    except OSError:  # the name is too long
        return False


def suffix_of(source: str | Path) -> str:
    """The suffix of a file name without that of its compression: .jsonl for a.jsonl.gz."""
    path = Path(source)
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def is_data_file(source: str | Path) -> bool:
    """Whether a name is that of a data file."""
    return suffix_of(source) in SUFFIXES


def demo_text(source: str) -> tuple[str, str]:
    """(domain, split) of `demo:DOMAIN/SPLIT`.

    Raises:
        UserError: an unknown domain or split.
    """
    from expertsmith.calibration.corpus import DOMAINS, SPLITS

    domain, _, split = source.removeprefix(DEMO).partition("/")
    if domain not in DOMAINS or split not in SPLITS:
        raise UserError(
            f"there is no text {source}", f"write demo:DOMAIN/SPLIT with {', '.join(DOMAINS)} and {', '.join(SPLITS)}"
        )
    return domain, split


def refuse_missing(specs: Sequence[str]) -> None:
    """Refuse missing data files before hours of calibration; the message names all.

    Raises:
        UserError: a file is missing, or a spec cannot be read.
    """
    sources = [parse_spec(spec).source for spec in specs]
    missing = [source for source in sources if is_data_file(source) and not _exists(source)]
    if missing:
        raise UserError(f"data file not found: {', '.join(dict.fromkeys(missing))}")
