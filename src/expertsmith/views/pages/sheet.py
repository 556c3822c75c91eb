"""Pages without a script for figures: the frame with its first screen, contents and sections, and the parts that several pages have.

Such a page is some tens of kilobytes: it lies inside a checkpoint, or is one of many results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from expertsmith.views.pages import asset, contents, framed
from expertsmith.views.show import byte_count

Section = tuple[str, str, str]  # id, title, HTML
KINDS = {"good": "supported", "fair": "partly", "bad": "not-supported", "none": "not-testable"}  # classes of page.css


def sheet(
    kicker: str, name: str, summary: Sequence[str], first: str, sections: Sequence[Section], foot: str, style: str = ""
) -> str:
    """A whole page as text: kicker, name and summary, the first screen's HTML, a list of contents, and the sections."""
    parts = {
        "TITLE": escape(f"{name}: {kicker}"),
        "STYLE": asset("page.css") + asset("sheet.css") + style,
        "NAME": escape(name),
        "SUMMARY": "".join(f"<p>{escape(text)}</p>" for text in summary),
        "FIRST": first,
        "CONTENTS": contents([(key, title) for key, title, _ in sections]),
        "SECTIONS": "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{html}</section>' for key, title, html in sections),
        "FOOT": escape(foot),
        "SCRIPT": asset("sheet.js"),
    }
    return framed("sheet.html", kicker, parts)


def write(path: Path, text: str) -> None:
    """Write a page under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def answer(question: str, kind: str, badge: str, big: str, lines: Iterable[str]) -> str:
    """A card of the first screen: a question, its answer in a word (`kind`: good, fair, bad or none) and in a line, and what else to know."""
    rows = "".join(f"<li>{escape(text)}</li>" for text in lines)
    return (
        f'<article class="verdict {KINDS[kind]}"><span class="badge">{escape(badge)}</span><h2>{escape(question)}</h2>'
        f'<p class="big">{escape(big)}</p><ul>{rows}</ul></article>'
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """A table of numbers (or "words") from plain texts; a wide one scrolls by itself."""
    head = "".join(f"<th>{escape(text)}</th>" for text in columns)
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="card wide"><table class="{kind}"><tr>{head}</tr>{lines}</table></div>'


def bullets(texts: Iterable[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def paragraph(text: str) -> str:
    """A plain text between figures and tables."""
    return f'<p class="soft">{escape(text)}</p>'


def how_made(made: Mapping[str, Any], more: Mapping[str, str]) -> Section:
    """The last section: the command, versions, settings, seconds and memory of a run (`verbs.made`), and `more` facts."""
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in made["settings"].items())
    facts = {
        "command": made["command"],
        **more,
        "settings": settings,
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in made["seconds"].items()),
        "peak memory": ", ".join(f"{byte_count(value)} of {name}" for name, value in made["memory"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in made["versions"].items()),
        "made": made["when"],
    }
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{f'<pre>{escape(text)}</pre>' if name == 'command' else escape(text)}</td></tr>"
        for name, text in facts.items()
        if text
    )
    return "made", "How it was made", f'<div class="card wide"><table class="facts">{rows}</table></div>'
