"""SVG pictures, light and dark, without scripts: quality over size in a comparison."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from expertsmith.views.wording import label, title

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 500, 62, 236, 44, 52
LIGHT = ("#3457c9", "#d9731a", "#2b8a5c", "#a04bc4", "#c2384a", "#0e8a9c", "#9c7a10", "#4b5568")
DARK = ("#8fb0ff", "#ffab66", "#6fd6a4", "#d59bf5", "#ff8c98", "#5cd0df", "#e0c05a", "#c3cddd")
DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 5")  # distinguish lines of the same colour
MARKERS = {  # paths around 0, by plotly's names
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.6-3.6h7.2v7.2h-7.2z",
    "diamond": "M0-5l5 5-5 5-5-5z",
    "triangle-up": "M0-5l4.8 8.4h-9.6z",
    "cross": "M-1.5-5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
}


def colours_of(names: Iterable[str]) -> dict[str, int]:
    """Name → an index of a colour, from the name (without what follows a colon), so that it is the same on every page unless two names want the same."""
    chosen: dict[str, int] = {}
    for name in sorted(set(names), key=lambda name: (zlib.crc32(name.encode()), name)):
        wish = zlib.crc32(name.partition(":")[0].encode()) % len(LIGHT)
        uses = [list(chosen.values()).count(i) for i in range(len(LIGHT))]
        chosen[name] = min(range(len(LIGHT)), key=lambda i: (uses[i], (i - wish) % len(LIGHT)))
    return chosen


def looks_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name → its colour (an index), marker and dash (an index), for names with one line each; no two of `len(MARKERS) * len(DASHES)` are alike without
    colours either, as in print."""
    made: dict[str, dict[str, Any]] = {}
    for name, colour in colours_of(names).items():
        taken = {(held["marker"], held["dash"]) for held in made.values()}
        pairs = (
            (marker, dash) for dash in range(len(DASHES)) for marker in list(MARKERS)[colour % len(MARKERS) :] + list(MARKERS)
        )
        marker, dash = next((pair for pair in pairs if pair not in taken), (list(MARKERS)[colour % len(MARKERS)], 0))
        made[name] = {"colour": colour, "marker": marker, "dash": dash}
    return made


def looks(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a line → its colour (an index), marker and dash (an index). They follow from the method's name (`colours_of`); a method's healed lines
    have its colour and marker, and a dash of their own."""
    rows = [(row, line_name(row, group, found)) for group in found["groups"] for row in group["rows"] if not row["draws"]]
    made: dict[str, dict[str, Any]] = {}
    chosen = colours_of(str(row["method"]) for row, _ in rows)
    turn = {name: list(chosen.values())[:place].count(chosen[name]) for place, name in enumerate(chosen)}
    lines: dict[int, list[str]] = {}
    for row, name in rows:
        held = lines.setdefault(chosen[str(row["method"])], [])
        if name not in held:
            held.append(name)
        marker = list(MARKERS)[(chosen[str(row["method"])] + turn[str(row["method"])]) % len(MARKERS)]
        made[name] = {
            "colour": chosen[str(row["method"])],
            "marker": marker,
            "dash": held.index(name) % len(DASHES),
        }
    return made


def line_name(row: Mapping[str, Any], group: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The name of a row's line: method and healing, and the budget if there are several."""
    several = len({other["budget"] for other in found["groups"]}) > 1
    return label(row) + (f", {group['budget']}" if several else "")


def series_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the picture. `points`: [share of the original's bytes, mean rise] from small to large, the original last; for `random`,
    followed by the least and largest draw. Lines are sorted by rise at the smallest size, worst first."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for group in found["groups"]:
        for row in group["rows"]:
            chance = bool(row["draws"])
            name = line_name(row, group, found)
            entry = lines.setdefault(
                (name, group["budget"]), {"name": name, "random": chance, "points": [], "said": [], "errors": []}
            )
            entry["errors"].append(row["rise"]["mean"][1])
            entry["points"].append([row["bytes"][1] / row["bytes"][0], row["rise"]["mean"][0], *row["rise"].get("range", ())])
            entry["said"].append(title(group))
    for entry in lines.values():
        order = sorted(range(len(entry["points"])), key=lambda i: entry["points"][i][0])
        entry["points"] = [*(entry["points"][i] for i in order), [1.0, 0.0, *([0.0, 0.0] if entry["random"] else [])]]
        entry["errors"] = [entry["errors"][i] for i in order]
        entry["said"] = [*(entry["said"][i] for i in order), "the original"]
    return sorted(lines.values(), key=lambda entry: -entry["points"][0][1])


def svg(found: Mapping[str, Any]) -> str:
    """The picture as SVG text."""
    lines = series_of(found)
    width = max(
        WIDTH, WIDTH - RIGHT + 60 + max(7 * len(entry["name"]) for entry in lines)
    )  # the longest name of a line has room
    values = [value for entry in lines for point in entry["points"] for value in point[1:]]
    low: float = min(0.0, *values)
    high: float = max(0.01, *values)
    smallest: float = min(point[0] for entry in lines for point in entry["points"])
    span = max(1 - smallest, 0.01)

    def x(share: float) -> float:
        return LEFT + 14 + (share - smallest) / span * (WIDTH - LEFT - RIGHT - 28)

    def y(rise: float) -> float:
        return HEIGHT - BOTTOM - (rise - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    steps = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
    step = next((s for s in steps if (high - low) / s <= 7), 20.0)
    parts = []
    tick = -int(-low // step) * step
    while tick <= high + 1e-12:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick + 0.0:.3g}</text>')
        tick = round(tick + step, 9)
    sizes: list[float] = []
    for share in sorted({point[0] for entry in lines for point in entry["points"]}):
        if all(abs(x(share) - x(other)) > 46 for other in sizes):
            sizes.append(share)
            parts.append(
                f'<text class="soft" x="{x(share):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{100 * share:.0f} %</text>'
            )
    for entry in lines:
        if entry["random"]:
            around = [(p[0], p[2]) for p in entry["points"]] + [(p[0], p[3]) for p in reversed(entry["points"])]
            parts.append(f'<polygon class="band" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in around)}"/>')
    drawn = looks(found)
    for place, entry in enumerate(lines):
        look = drawn.get(entry["name"], {"marker": "circle"})
        kind, dash = ("r", "4 4") if entry["random"] else (f"c{look['colour']}", DASHES[look["dash"]])
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in entry["points"])
        parts.append(f'<polyline class="line {kind}" points="{path}"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")
        parts.extend(_points(entry, MARKERS[look["marker"]], kind, x, y))
        row = TOP + 6 + place * min(22.0, (HEIGHT - TOP - 20) / len(lines))
        parts.append(
            f'<line class="line {kind}" x1="{WIDTH - RIGHT + 18}" x2="{WIDTH - RIGHT + 42}" y1="{row:.1f}" y2="{row:.1f}"'
            + (f' stroke-dasharray="{dash}"' if dash else "")
            + "/>"
        )
        parts.append(
            f'<path class="dot {kind}" transform="translate({WIDTH - RIGHT + 30} {row:.1f})" d="{MARKERS[look["marker"]]}"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 50}" y="{row + 4:.1f}">{escape(entry["name"])}</text>')
    name = escape(f"{found['model']['source']}: loss increase by size")
    parts.append(f'<text class="title" x="{LEFT - 46}" y="22">{name}</text>')
    parts.append(
        f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">bytes, share of the original</text>'
    )
    parts.append(
        f'<text class="soft" transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2:.0f}" y="15" text-anchor="middle">mean loss increase ± standard error, nats per token</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" role="img" aria-label="{name}">\n'
        f'<style>{_style()}</style>\n<rect class="page" width="{width}" height="{HEIGHT}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _points(
    entry: Mapping[str, Any], marker: str, kind: str, x: Callable[[float], float], y: Callable[[float], float]
) -> list[str]:
    """The points of a line, each with its standard error and a tooltip."""
    parts = []
    for point, said, error in zip(entry["points"][:-1], entry["said"], entry["errors"], strict=False):
        across, up = x(point[0]), y(point[1])
        note = f"{entry['name']}, {said}: {point[1]:+.3f}{f' ± {error:.3f}' if error else ''} nats per token at {100 * point[0]:.0f} % of the bytes"
        if error:
            bar = f"M{across:.1f} {y(point[1] - error):.1f}V{y(point[1] + error):.1f}m-3 0h6m-6 {y(point[1] - error) - y(point[1] + error):.1f}h6"
            parts.append(f'<path class="bar {kind}" d="{bar}"/>')
        parts.append(f'<path class="dot {kind}" transform="translate({across:.1f} {up:.1f})" d="{marker}"/>')
        parts.append(f'<circle class="hit" cx="{across:.1f}" cy="{up:.1f}" r="8"><title>{escape(note)}</title></circle>')
    return parts


def _style() -> str:
    def colours(held: tuple[str, ...], ink: str, soft: str, grid: str, page: str) -> str:
        series = "".join(f".c{i}{{--c:{colour}}}" for i, colour in enumerate(held))
        return f"{series}.r{{--c:{soft}}}text{{fill:{ink}}}.soft{{fill:{soft}}}.grid{{stroke:{grid}}}.page{{fill:{page}}}.band{{fill:{soft}}}"

    light = colours(LIGHT, "#1c2230", "#5f6b7f", "#e2e6ed", "#ffffff")
    dark = colours(DARK, "#e6e9f0", "#9aa6ba", "#2b3446", "#181e2a")
    shape = "text{font:12px system-ui,sans-serif}.title{font-size:15px;font-weight:600}.line{fill:none;stroke:var(--c);stroke-width:2}.dot{fill:var(--c)}.bar{fill:none;stroke:var(--c)}.hit{fill:transparent}.band{opacity:.16}"
    return f"{shape}{light}@media (prefers-color-scheme:dark){{{dark}}}"
