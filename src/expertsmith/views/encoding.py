"""Text on terminals whose encoding lacks some characters: these are written in plain ASCII instead of raising an error."""

from __future__ import annotations

import codecs
import sys
from typing import Any

PLAIN = {  # characters that the program writes → ASCII
    "→": "->", "←": "<-", "↑": "^", "↓": "v", "─": "-", "–": "-", "—": "-", "…": "...", "·": "-", "×": "x", "±": "+-", "≥": ">=", "≤": "<=",
    "“": '"', "”": '"', "‘": "'", "’": "'", "‹": "<", "›": ">", "•": "*", "━": "-", "╸": "-", "╺": "-", "√": "sqrt", "\u00a0": " ",
}  # fmt: skip
NAME = "expertsmith.plain"


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """An error handler: PLAIN's replacements, and escapes for all other characters, so that a file name stays recognisable."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


def show_on_any_terminal() -> None:
    """Let stdout and stderr write plain ASCII for characters that their encoding lacks. In UTF-8 these are only bytes of file names that
    are not text."""
    codecs.register_error(NAME, _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a program may have replaced the stream
            stream.reconfigure(errors=NAME)


def is_unicode(stream: Any) -> bool:
    """Whether a stream's encoding has every character."""
    return str(getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith("utf")
