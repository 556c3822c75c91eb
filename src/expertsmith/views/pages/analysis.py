"""The `analyze` page: one HTML file with the measures, the figures' code and plotly.js, so it works offline.

The script reads the content of `measures.json`, reduced to what the figures need: three decimals, and only the lower triangles of
similarity matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from expertsmith.views.pages import asset, embedded, framed, plotly
from expertsmith.views.pictures import DARK, LIGHT, looks_of

SYMMETRIC = {"router_cosine", "matrix_cosine", "neuron_cosine", "output_angular", "activation_cosine", "coselection_lift"}
UNSHOWN = {"output_cosine", "definitions", "effective_rank_error", "fingerprint", "trends"}
SCRIPTS = ("theme.js", "figures.js", "cuts.js", "page.js")

# how what is no domain and no method is drawn, in every figure: colour (an index), marker, dash (an index)
SERIES: dict[str, tuple[int, str, int]] = {
    "gate": (0, "circle", 0),
    "up": (1, "square", 0),
    "down": (2, "diamond", 0),
    "outputs": (3, "triangle-up", 0),
    "router rows": (4, "cross", 0),
    "usage": (5, "square", 0),
    "saliency": (3, "diamond", 1),
    "load": (5, "circle", 0),
    "router scores": (6, "diamond", 1),
    "rank correlation": (3, "circle", 0),
    "matched": (2, "circle", 0),
    "unmatched": (1, "diamond", 1),
    "selected": (0, "square", 0),
    "experts": (7, "circle", 0),
    "super-experts": (4, "diamond", 0),
    "kept": (1, "circle", 0),
    "merged": (3, "square", 0),
}


def write_page(path: Path, measures: Mapping[str, Any]) -> None:
    """Write the page under a temporary name, then rename. `measures`: plain data as in `measures.json`."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(measures), encoding="utf-8")
    partial.replace(path)


def page(measures: Mapping[str, Any]) -> str:
    """The whole page as text."""
    name = str(measures["model"]["source"]).rstrip("/").rpartition("/")[2]
    parts = {
        "TITLE": escape(f"{name}: what the experts do"),
        "NAME": escape(name),
        "STYLE": asset("page.css"),
        "SUMMARY": "".join(f"<p>{escape(sentence)}</p>" for sentence in measures["summary"]),
        "VERDICTS": "".join(_verdict(found) for found in measures["observations"]),
        "NOTES": "".join(f"<li>{escape(note)}</li>" for note in measures["notes"]),
        "DEFINITIONS": _definitions(measures["definitions"]),
        "MADE_BY": escape(measures["made_by"]),
        "DATA": embedded(compact(measures) | {"looks": _looks(measures), "colours": {"light": LIGHT, "dark": DARK}}),
        "PLOTLY": plotly(),
        "SCRIPT": "\n".join(asset(script) for script in SCRIPTS),
    }
    return framed("page.html", "expertsmith analyze", parts)


def _looks(measures: Mapping[str, Any]) -> dict[str, Any]:
    """Kind → name → how it is drawn. Domains and methods look as their names say; domains may be those of the data before or after pruning."""
    before, after = measures.get("before_cut") or {}, measures.get("after_cut") or {"layers": []}
    domains = {
        *((measures.get("data") or {}).get("tokens") or ()),
        *(name for row in after["layers"] for name in row.get("lost", ())),
    }
    return {
        "domain": looks_of(domains),
        "method": looks_of(name for name in before.get("methods", ()) if name != "random"),
        "series": {name: dict(zip(("colour", "marker", "dash"), drawn, strict=True)) for name, drawn in SERIES.items()},
    }


def compact(value: Any, key: str = "") -> Any:
    """The measures, reduced for the page."""
    if isinstance(value, float):
        short = round(value, 3) if abs(value) >= 0.1 else float(f"{value:.3g}")
        return int(short) if short == int(short) else short
    if isinstance(value, list):
        if key in SYMMETRIC:
            return [compact(entry) for row, line in enumerate(value) for entry in line[: row + 1]]
        return [compact(entry) for entry in value]
    if isinstance(value, dict):
        return {name: compact(entry, name) for name, entry in value.items() if name not in UNSHOWN}
    return value


def _verdict(found: Mapping[str, Any]) -> str:
    kind = found["verdict"].replace(" ", "-")
    return (
        f'<article class="verdict {kind}"><span class="badge">{escape(found["verdict"])}</span><h3>{found["observation"]}. {escape(found["title"])}</h3>'
        f"<p>{escape(found['text'])}</p><p>{escape(found['paper'])}</p><details><summary>How this is decided</summary><p>{escape(found['rule'])}</p></details></article>"
    )


def _definitions(sections: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    rows = [
        f"<tr><td><code>{escape(section)}.{escape(name)}</code></td><td>{escape(entry['unit'])}</td><td>{escape(entry['definition'])}</td></tr>"
        for section, entries in sections.items()
        for name, entry in entries.items()
    ]
    return "".join(rows)
