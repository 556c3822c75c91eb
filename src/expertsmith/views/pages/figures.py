"""Figures as inline SVG, in the colours of page.css: sizes, losses by domain, scores, and the experts that stay in each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

WIDTH = 420  # of a panel: a phone shows it nearly as it is
CLEAR = 2.0  # standard errors, as `evaluation.paired.CLEAR`
ROW = 46  # a line of text and the bar below it


def panel(label: str, parts: Sequence[str], height: float, width: float = WIDTH, fixed: bool = False) -> str:
    """An SVG picture that has a name, and scales with the page unless it is `fixed`."""
    style = f' style="width:{width:g}px;max-width:none"' if fixed else ""
    return f'<svg class="drawing"{style} viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def figure(caption: str, *panels: str) -> str:
    """Panels side by side, on a phone one below the other. `caption`: HTML."""
    return f'<figure class="card panels"><figcaption>{caption}</figcaption>{"".join(panels)}</figure>'


def heading(text: str) -> str:
    """The title of a panel."""
    return f'<text class="axis" x="0" y="13">{escape(text)}</text>'


def bars(title: str, rows: Sequence[tuple[str, str, float, str]]) -> str:
    """Bars from zero: (name, text of the value, value, class) of each; all values are at least 0."""
    top = max([value for _, _, value, _ in rows] + [1e-12])
    parts = [heading(title)]
    for place, (name, text, value, kind) in enumerate(rows):
        y = 22 + place * ROW
        parts.append(
            f'<text x="0" y="{y + 13}">{escape(name)}</text><text x="{WIDTH}" y="{y + 13}" text-anchor="end">{escape(text)}</text>'
            f'<rect class="{kind}" x="0" y="{y + 19}" width="{max(1.0 if value else 0.0, WIDTH * value / top):.1f}" height="14" rx="2"><title>{escape(f"{name}: {text}")}</title></rect>'
        )
    return panel(title, parts, 22 + ROW * len(rows))


def differences(title: str, rows: Sequence[tuple[str, str, float, float | None]], better: str = "lower") -> str:
    """Bars from a zero line to either side, with a standard error where it is known: (name, text, difference, error) of each.

    Args:
        better: "lower" or "higher" differences are coloured as better, the others as worse; "" colours none. A difference within two standard
            errors is not coloured.
    """
    reach = [(value - (error or 0.0), value + (error or 0.0)) for _, _, value, error in rows]
    low, high = min([0.0, *(a for a, _ in reach)]), max([1e-12, *(b for _, b in reach)])
    scale = (WIDTH - 4) / (high - low)
    zero = 2 - low * scale
    parts = [heading(title), f'<line class="rule" x1="{zero:.1f}" x2="{zero:.1f}" y1="20" y2="{22 + ROW * len(rows)}"/>']
    for place, (name, text, value, error) in enumerate(rows):
        y, end = 22 + place * ROW, zero + value * scale
        unclear = not better or not value or abs(value) <= CLEAR * (error or 0.0)
        kind = "is" if unclear else "better" if (value < 0) == (better == "lower") else "worse"
        parts.append(
            f'<text x="0" y="{y + 13}">{escape(name)}</text><text x="{WIDTH}" y="{y + 13}" text-anchor="end">{escape(text)}</text>'
            f'<rect class="{kind}" x="{min(zero, end):.1f}" y="{y + 19}" width="{max(1.0 if value else 0.0, abs(end - zero)):.1f}" height="14" rx="2"><title>{escape(f"{name}: {text}")}</title></rect>'
        )
        if error:
            left, right = end - error * scale, end + error * scale
            parts.append(
                f'<path class="error" d="M{left:.1f} {y + 26}H{right:.1f}M{left:.1f} {y + 22}v8M{right:.1f} {y + 22}v8"/>'
            )
    return panel(title, parts, 22 + ROW * len(rows))


def kept_map(layers: Sequence[Mapping[str, Any]], ranges: Callable[[list[int]], str]) -> str:
    """A row a layer, a cell an expert of the source: kept, merged into a kept one, or removed. One path a row and kind keeps it small.

    Args:
        layers: of plan.json.
        ranges: writes expert ids as ranges.
    """
    most = max(entry["num_experts"] for entry in layers)
    cell = min(20.0, max(3.0, 820 / most))
    tall, left, top = min(20.0, max(9.0, cell)), 66, 20
    step = max(1, round(most / 16)) if cell < 16 else 1
    every = 1 if tall >= 12 else 2  # layer names need 12 units
    parts = [
        f'<text class="axis" x="{left + (e + 0.5) * cell:.1f}" y="13" text-anchor="middle">{e}</text>'
        for e in range(0, most, step)
    ]
    gap = 2 if cell >= 10 else 0.5
    for row, entry in enumerate(layers):
        y = top + row * tall
        name = f"{'MTP' if entry.get('mtp') else 'layer'} {entry['layer']}"
        if not row % every:
            parts.append(f'<text class="axis" x="{left - 8}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{name}</text>')
        kept = set(entry["keep"])
        merged = {e for group in entry.get("merge", ()) for e in group["from"]} - kept
        for kind, members in (
            ("kept", kept),
            ("merged", merged),
            ("gone", set(range(entry["num_experts"])) - kept - merged),
        ):
            path = "".join(
                f"M{left + first * cell:.1f} {y:.1f}h{size * cell - gap:.1f}v{tall - 2:.1f}h-{size * cell - gap:.1f}z"
                for first, size in _runs(members, 1 if cell >= 10 else most)
            )
            if path:
                parts.append(f'<path class="{kind}" d="{path}"/>')
        told = f"{name}: keeps {len(kept)} of {entry['num_experts']} experts: {ranges(entry['keep'])}"
        parts.append(
            f'<rect class="hit" x="{left}" y="{y:.1f}" width="{most * cell:.1f}" height="{tall:.1f}"><title>{escape(told)}</title></rect>'
        )
    words = {"kept": "kept", "merged": "merged into a kept expert", "gone": "removed"}
    if not any(entry.get("merge") for entry in layers):
        del words["merged"]
    legend = "".join(f'<span><span class="dot {kind}"></span>{text}</span>' for kind, text in words.items())
    width, height = left + most * cell, top + len(layers) * tall + 4
    drawn = panel("Kept experts of each layer", parts, height, width, fixed=True)
    return f'<div class="legend">{legend}</div><div class="card wide map">{drawn}</div>'


def _runs(ids: Iterable[int], longest: int) -> list[tuple[int, int]]:
    """(first, number) of consecutive ids, at most `longest` of them."""
    made: list[tuple[int, int]] = []
    for i in sorted(ids):
        if made and sum(made[-1]) == i and made[-1][1] < longest:
            made[-1] = (made[-1][0], made[-1][1] + 1)
        else:
            made.append((i, 1))
    return made
