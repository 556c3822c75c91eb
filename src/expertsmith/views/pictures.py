"""Pictures as SVG, light and dark, without scripts: quality over size of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from expertsmith.views.wording import label, title

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 500, 62, 236, 44, 52
LIGHT = ("#3457c9", "#d9731a", "#2b8a5c", "#a04bc4", "#c2384a", "#0e8a9c", "#9c7a10", "#4b5568")
DARK = ("#8fb0ff", "#ffab66", "#6fd6a4", "#d59bf5", "#ff8c98", "#5cd0df", "#e0c05a", "#c3cddd")
DASHES = ("", "7 4", "2 3")  # after all colours were used once, lines are told apart by these


def series_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines of the picture: `points` [share of the original's bytes, mean rise] from small to large, the original last; `random` ones have a third
    number and a fourth, the least and the largest draw. Sorted by loss at the smallest size, worst first."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    several = len({group["budget"] for group in found["groups"]}) > 1
    for group in found["groups"]:
        for row in group["rows"]:
            chance = bool(row["draws"])
            name = label(row) + (f", {group['budget']}" if several else "")
            entry = lines.setdefault((name, group["budget"]), {"name": name, "random": chance, "points": [], "said": []})
            entry["points"].append([row["bytes"][1] / row["bytes"][0], row["rise"]["mean"][0], *row["rise"].get("range", ())])
            entry["said"].append(title(group))
    for entry in lines.values():
        order = sorted(range(len(entry["points"])), key=lambda i: entry["points"][i][0])
        entry["points"] = [*(entry["points"][i] for i in order), [1.0, 0.0, *([0.0, 0.0] if entry["random"] else [])]]
        entry["said"] = [*(entry["said"][i] for i in order), "the original"]
    return sorted(lines.values(), key=lambda entry: -entry["points"][0][1])


def svg(found: Mapping[str, Any]) -> str:
    """The picture as text."""
    lines = series_of(found)
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
    coloured = 0
    for place, entry in enumerate(lines):
        kind, dash = (
            ("r", "4 4") if entry["random"] else (f"c{coloured % len(LIGHT)}", DASHES[coloured // len(LIGHT) % len(DASHES)])
        )
        coloured += not entry["random"]
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in entry["points"])
        parts.append(f'<polyline class="line {kind}" points="{path}"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")
        for point, said in zip(entry["points"][:-1], entry["said"], strict=False):
            note = escape(f"{entry['name']}, {said}: {point[1]:+.3f} nats per token at {100 * point[0]:.0f} % of the bytes")
            parts.append(
                f'<circle class="dot {kind}" cx="{x(point[0]):.1f}" cy="{y(point[1]):.1f}" r="3.6"><title>{note}</title></circle>'
            )
        row = TOP + 6 + place * min(22.0, (HEIGHT - TOP - 20) / len(lines))
        parts.append(
            f'<line class="line {kind}" x1="{WIDTH - RIGHT + 18}" x2="{WIDTH - RIGHT + 42}" y1="{row:.1f}" y2="{row:.1f}"'
            + (f' stroke-dasharray="{dash}"' if dash else "")
            + "/>"
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 50}" y="{row + 4:.1f}">{escape(entry["name"])}</text>')
    name = escape(f"{found['model']['source']}: loss increase by size")
    parts.append(f'<text class="title" x="{LEFT - 46}" y="22">{name}</text>')
    parts.append(
        f'<text class="soft" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">bytes, share of the original</text>'
    )
    parts.append(
        f'<text class="soft" transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2:.0f}" y="15" text-anchor="middle">mean loss increase, nats per token</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{name}">\n'
        f'<style>{_style()}</style>\n<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _style() -> str:
    def colours(held: tuple[str, ...], ink: str, soft: str, grid: str, page: str) -> str:
        series = "".join(f".c{i}{{--c:{colour}}}" for i, colour in enumerate(held))
        return f"{series}.r{{--c:{soft}}}text{{fill:{ink}}}.soft{{fill:{soft}}}.grid{{stroke:{grid}}}.page{{fill:{page}}}.band{{fill:{soft}}}"

    light = colours(LIGHT, "#1c2230", "#5f6b7f", "#e2e6ed", "#ffffff")
    dark = colours(DARK, "#e6e9f0", "#9aa6ba", "#2b3446", "#181e2a")
    shape = "text{font:12px system-ui,sans-serif}.title{font-size:15px;font-weight:600}.line{fill:none;stroke:var(--c);stroke-width:2}.dot{fill:var(--c)}.band{opacity:.16}"
    return f"{shape}{light}@media (prefers-color-scheme:dark){{{dark}}}"
