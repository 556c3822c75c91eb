"""Text on terminals that cannot show all of it: what their encoding lacks is written plainly, and nothing ends because of it."""

from __future__ import annotations

import codecs
import sys
from typing import Any

PLAIN = {  # what the program itself writes → the same in ASCII
    "→": "->", "←": "<-", "↑": "^", "↓": "v", "─": "-", "–": "-", "—": "-", "…": "...", "·": "-", "×": "x", "±": "+-", "≥": ">=", "≤": "<=",
    "“": '"', "”": '"', "‘": "'", "’": "'", "‹": "<", "›": ">", "•": "*", "━": "-", "╸": "-", "╺": "-", "√": "sqrt", "\u00a0": " ",
}  # fmt: skip
NAME = "expertsmith.plain"


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """An error handler: PLAIN's words, and escapes for all else, so that a file's name can still be told."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


def show_on_any_terminal() -> None:
    """Have stdout and stderr write what their encoding lacks plainly. In UTF-8 that is only what no encoding has: the bytes of a file's name
    that are not text."""
    codecs.register_error(NAME, _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a program has put something else there
            stream.reconfigure(errors=NAME)


def is_unicode(stream: Any) -> bool:
    """Whether a stream's encoding has every character."""
    return str(getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith("utf")
