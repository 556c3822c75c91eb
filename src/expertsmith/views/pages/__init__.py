"""HTML pages that work offline: one file each, with style and script inside, and plotly.js where figures answer to selectors. Content is plain
data, as in the JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from typing import Any


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A template with {{NAME}} replaced by parts["NAME"]."""
    head, *rest = template.split("{{")
    made = [head]
    for piece in rest:  # one pass, so that data cannot be mistaken for a placeholder
        key, _, tail = piece.partition("}}")
        made += [parts[key], tail]
    return "".join(made)


def framed(body: str, kicker: str, parts: Mapping[str, str]) -> str:
    """A whole page: the frame with title, style, kicker and name, and in it the template `body`."""
    held = {**parts, "KICKER": escape(kicker)}
    return filled(asset("frame.html"), {**held, "BODY": filled(asset(body), held)})


def contents(entries: Iterable[tuple[str, str]]) -> str:
    """The list of contents: (id, title) of each section."""
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title in entries)
    return f'<nav class="contents" aria-label="Contents"><ul>{links}</ul></nav>'


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def plotly() -> str:
    """plotly.js, safe inside a script element."""
    return asset("plotly-cartesian.min.js").replace("</script", "<\\/script")


def asset(name: str) -> str:
    """A file of `assets/`."""
    return files(__name__).joinpath("assets", name).read_text(encoding="utf-8")
