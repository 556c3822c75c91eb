"""comparison.html: one offline page with the style and plotly.js of the `analyze` page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from expertsmith.views.pages import asset, contents, embedded, framed, plotly
from expertsmith.views.pictures import DARK, LIGHT, line_name, looks
from expertsmith.views.wording import Row, cells, columns, heading, how, original_cells, sentences, title

FIRST = 3  # sentences before the figure: with more of them, the first screen would not have it


def page(found: Mapping[str, Any]) -> str:
    """The whole page as text."""
    name, said = str(found["model"]["source"]), sentences(found)

    def told(texts: Sequence[str]) -> str:
        return "".join(f"<p>{escape(text)}</p>" for text in texts)

    parts = {
        "TITLE": escape(f"{name}: methods side by side"),
        "NAME": escape(name),
        "STYLE": asset("page.css") + asset("compare.css"),
        "SUMMARY": told(said[:FIRST]),
        "MORE": told(said[FIRST:]),
        "CONTENTS": contents(
            [*((f"table-{i}", title(group)) for i, group in enumerate(found["groups"])), ("made", "How it was made, and notes")]
        ),
        "TABLES": "".join(_table(i, group, found) for i, group in enumerate(found["groups"])),
        "NOTES": "".join(f"<li>{escape(text)}</li>" for text in (*how(found), *found["notes"])),
        "MADE_BY": escape(found["made_by"]),
        "DATA": embedded(_data(found)),
        "PLOTLY": plotly(),
        "SCRIPT": asset("theme.js") + asset("compare.js"),
    }
    return framed("compare.html", "expertsmith compare", parts)


def _table(place: int, group: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    rows = group["rows"]
    head = "".join(f"<th>{escape(text)}</th>" for text in columns(found, rows))
    lines = ['<tr class="original">' + "".join(f"<td>{escape(text)}</td>" for text in original_cells(found, rows)) + "</tr>"]
    for row in rows:
        kind = ' class="worse"' if row["worse_than_random"] else ""
        texts = "".join(
            f"<td>{f'<b>{escape(text)}</b>' if best else escape(text)}</td>" for text, best in cells(row, found, rows)
        )
        lines.append(f'<tr{kind} title="{escape(row["title"])}">{texts}</tr>')
    return f'<h3 id="table-{place}">{escape(heading(group, rows))}</h3><div class="card wide"><table class="numbers"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _data(found: Mapping[str, Any]) -> dict[str, Any]:
    """The data of the figure: a line for each method with every measure of every point, and each single draw of `random`."""
    lines: dict[str, dict[str, Any]] = {}
    drawn = looks(found)
    for group in found["groups"]:
        for row in group["rows"]:
            name = line_name(row, group, found)
            line = lines.setdefault(name, {"name": name, "random": bool(row["draws"]), "points": [], **drawn.get(name, {})})
            line["points"].append(_point(row, title(group), found, row["draws"]))
    for line in lines.values():
        line["points"].sort(key=lambda point: point["share"])
    order = sorted(lines.values(), key=lambda line: -line["points"][0]["values"]["mean"])
    measures = {
        "mean": "mean loss increase, nats per token",
        "kl": "KL divergence from the original, nats",
        "lost": "tokens with a different top-1, %",
    }
    measures |= {f"on {name}": f"loss increase on {name}, nats per token" for name in found["original"]["domains"]}
    return {"measures": measures, "lines": order, "colours": {"light": LIGHT, "dark": DARK}}


def _point(row: Row, said: str, found: Mapping[str, Any], drawn: Sequence[Row]) -> dict[str, Any]:
    return {
        "share": row["bytes"][1] / row["bytes"][0],
        "experts": row["experts"],
        "group": said,
        "error": row["rise"]["mean"][1],
        "seconds": row["planning"]["seconds"],
        "values": _values(row, found),
        "draws": [_values(held, found) for held in drawn],
    }


def _values(row: Row, found: Mapping[str, Any]) -> dict[str, float]:
    quality = row["quality"]
    rises = {
        f"on {name}": quality["domains"][name]["loss"] - held["loss"] for name, held in found["original"]["domains"].items()
    }
    mean = quality["mean"]
    return {"mean": row["rise"]["mean"][0], "kl": mean["kl"], "lost": 100 * (1 - mean["top1_agreement"]), **rises}
