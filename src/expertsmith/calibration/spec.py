"""Parse data specifications of the command line: `[DOMAIN=]SOURCE[:N]`. Needs no torch, because recipes are checked with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertsmith.errors import UserError

DEFAULT_DOMAIN = "default"
DEMO = "demo:"  # text that every Python installation carries, by domain and split
SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".parquet")


@dataclass(frozen=True)
class Spec:
    """One `--data` argument."""

    domain: str
    source: str
    limit: int | None


def parse_spec(text: str) -> Spec:
    """Split `[DOMAIN=]SOURCE[:N]`.

    Raises:
        UserError: an empty source, a limit that is not a positive number, or a demo text that there is not.
    """
    domain, equals, rest = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.\-]+", domain):
        domain, rest = "", text
    source, colon, tail = rest.rpartition(":")
    limit = None
    if colon and re.fullmatch(r"-?\d+", tail):
        limit = int(tail)
        if limit <= 0:
            raise UserError(f"--data {text!r}: the number after the colon is {limit}", "give a positive number of sequences")
    else:
        source = rest
    if not source:
        raise UserError(f"--data {text!r} has no source", "write [DOMAIN=]SOURCE[:N], for example math=calib.jsonl:64")
    if source.startswith(DEMO):
        demo_text(source)
    return Spec(domain or DEFAULT_DOMAIN, source, limit)


def demo_text(source: str) -> tuple[str, str]:
    """(domain, split) of `demo:DOMAIN/SPLIT`.

    Raises:
        UserError: another domain or split than there are.
    """
    from expertsmith.calibration.corpus import DOMAINS, SPLITS

    domain, _, split = source.removeprefix(DEMO).partition("/")
    if domain not in DOMAINS or split not in SPLITS:
        raise UserError(
            f"there is no text {source}", f"write demo:DOMAIN/SPLIT with {', '.join(DOMAINS)} and {', '.join(SPLITS)}"
        )
    return domain, split


def refuse_missing(specs: Sequence[str]) -> None:
    """Name all data files that are not there, before hours of calibration.

    Raises:
        UserError: a file is missing, or a spec cannot be read.
    """
    paths = [Path(parse_spec(spec).source) for spec in specs]
    missing = [str(path) for path in paths if path.suffix in SUFFIXES and not path.exists()]
    if missing:
        raise UserError(f"data file not found: {', '.join(dict.fromkeys(missing))}")
