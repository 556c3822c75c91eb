"""The demo's page: one self-contained HTML file, light and dark, with inline SVG and no external scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertsmith.calibration.stats import Statistics

PALETTE = ("#4269d0", "#ff9f43", "#8a929e", "#3ca951", "#a463f2", "#e15759")
STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --line: #e4e7ec; --page: #ffffff; --card: #f7f8fa; --cell: 66, 105, 208; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaef; --soft: #9aa3b2; --line: #2d3442; --page: #12161f; --card: #1a202c; --cell: 118, 156, 255; } }
* { box-sizing: border-box } body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem }
h1 { font-size: 1.7rem; margin: 0 0 .4rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem } p { margin: .3rem 0 1rem; max-width: 46rem } .soft { color: var(--soft) }
.lead { font-size: 1.1rem } .wide { overflow-x: auto } svg { max-width: 100%; height: auto; display: block } text { fill: var(--ink); font: 12px system-ui, sans-serif } .axis { fill: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--soft) } th:first-child, td:first-child { text-align: left } .best { font-weight: 700 } .maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.4rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .4rem 0 } .dot { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
"""


def write_report(path: Path, result: dict[str, Any], statistics: Statistics, rows: Sequence[dict[str, Any]]) -> None:
    """Write the page: summary, bars of the loss by domain and choice, the table, and the experts that each domain uses and keeps."""
    plans = {
        row["domain"]: row["plan"]
        for row in rows
        if row["plan"] is not None and row["domain"] and row["label"].startswith("easy_ep")
    }
    body = [
        "<h1>Half of the experts, chosen for one domain</h1>",
        f'<p class="lead">{escape(result["summary"])}</p>',
        '<p class="soft">A small Mixture-of-Experts model, trained on text from the Python installation. It is calibrated once; '
        "then several methods remove half of its experts. Every result was verified against the original with the same experts masked.</p>",
        f"<h2>Loss increase by domain</h2><p>Increase of the held-out loss over the original, nats per token (lower is better). Experts chosen for "
        f"{escape(result['target'])} keep {escape(result['target'])} and lose on the other domains.</p>",
        _bars(result),
        "<h2>Perplexity on held-out text</h2>",
        f"<p>{_why(result)}</p>",
        _table(result),
        "<h2>Expert use by domain</h2><p>Share of each domain's tokens that a layer routes to each expert; stronger colour means more. "
        "<i>easy_ep</i> keeps the framed half for that domain. Point at a cell to see its value.</p>",
        '<p>For all measures of the experts, see <a href="analysis/report.html">the analysis of this model</a>.</p>',
        '<div class="maps">' + "".join(_map(name, statistics, plans.get(name)) for name in result["domains"]) + "</div>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>expertsmith demo</title><style>{STYLE}</style>'
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n', encoding="utf-8"
    )


def _bars(result: dict[str, Any]) -> str:
    base, rows, domains = result["rows"][0]["loss"], result["rows"][1:], result["domains"]
    top = max(0.1, *(row["loss"][name] - base[name] for row in rows for name in domains))
    width, height, left, bottom, above = 880, 300, 46, 34, 16
    scale = (height - bottom - above) / top
    group = (width - left) / len(domains)
    bar = min(34.0, (group - 30) / len(rows))
    parts = []
    step = next(s for s in (0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0) if top / s <= 6)
    for tick in range(int(top / step) + 1):
        y = height - bottom - tick * step * scale
        parts.append(
            f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/><text class="axis" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick * step:g}</text>'
        )
    for g, name in enumerate(domains):
        start = left + g * group + (group - bar * len(rows)) / 2
        for i, row in enumerate(rows):
            rise = round(row["loss"][name] - base[name], 3) + 0.0  # no minus zero
            size = max(1.0, rise * scale)
            title = f"{row['label']} on {name}: {rise:+.3f} nats, perplexity {row['perplexity'][name]:.1f}"
            parts.append(
                f'<rect x="{start + i * bar + 1.5:.1f}" y="{height - bottom - size:.1f}" width="{bar - 3:.1f}" height="{size:.1f}" rx="2" fill="{PALETTE[i % len(PALETTE)]}"><title>{escape(title)}</title></rect>'
                f'<text class="axis" x="{start + i * bar + bar / 2:.1f}" y="{height - bottom - size - 4:.1f}" text-anchor="middle" style="font-size:10px">{round(rise, 2) + 0.0:.2f}</text>'
            )
        parts.append(
            f'<text x="{left + (g + 0.5) * group:.1f}" y="{height - 10}" text-anchor="middle">on {escape(name)}</text>'
        )
    legend = "".join(
        f'<span><span class="dot" style="background:{PALETTE[i % len(PALETTE)]}"></span>{escape(row["label"])}</span>'
        for i, row in enumerate(rows)
    )
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Increase of the held-out loss by domain and choice">{"".join(parts)}</svg>'
    return f'<div class="legend">{legend}</div><div class="wide">{svg}</div>'


def _why(result: dict[str, Any]) -> str:
    """Why the two methods differ, with the numbers of this run."""
    target = result["target"]
    by_label = {row["label"]: row for row in result["rows"]}
    ours, reap = by_label[f"easy_ep for {target}"], by_label[f"reap for {target}"]
    text = (
        f"<i>easy_ep</i> sums an expert's contribution over all {escape(target)} tokens, so it keeps the experts that "
        f"handle {100 * ours['routed']:.0f} % of them. <i>reap</i> averages over the tokens of each expert, however few"
    )
    if reap["routed"] < ours["routed"]:
        text += f": here it keeps experts for other domains that hardly any {escape(target)} token reaches ({100 * reap['routed']:.0f} %)"
    return text + ". Calibrate <i>reap</i> on every domain that the model must keep."


def _table(result: dict[str, Any]) -> str:
    domains, target = result["domains"], escape(result["target"])
    best = {name: min(row["perplexity"][name] for row in result["rows"][1:]) for name in domains}
    head = "".join(f"<th>{escape(name)}</th>" for name in domains)
    lines = []
    for row in result["rows"]:
        cells = "".join(
            f"<td{' class=best' if row['perplexity'][n] == best[n] else ''}>{row['perplexity'][n]:.1f}</td>" for n in domains
        )
        share = f"<td>{100 * row['routed']:.0f} %</td>"
        lines.append(f"<tr><td>{escape(row['label'])}</td>{cells}{share}<td>{escape(row['verify'])}</td></tr>")
    return f'<div class="wide"><table><tr><th>kept experts</th>{head}<th>{target} tokens<br>kept</th><th>verify</th></tr>{"".join(lines)}</table></div>'


def _map(name: str, statistics: Statistics, plan: Any) -> str:
    layers = sorted(statistics.layers)
    experts = statistics.layers[layers[0]].num_experts
    cell, left, top = 26, 58, 20
    kept = plan.kept if plan is not None else {}
    shares = {
        layer: statistics.layers[layer].domains[name]["selections"] / statistics.layers[layer].domains[name]["selections"].sum()
        for layer in layers
    }
    peak = max(float(values.max()) for values in shares.values())
    parts = [
        f'<text class="axis" x="{left + e * cell + cell / 2}" y="14" text-anchor="middle" style="font-size:10px">{e}</text>'
        for e in range(experts)
    ]
    for row, layer in enumerate(layers):
        y = top + row * cell
        parts.append(f'<text class="axis" x="{left - 8}" y="{y + cell / 2 + 4}" text-anchor="end">layer {layer}</text>')
        for e in range(experts):
            share = float(shares[layer][e])
            frame = ' stroke="var(--ink)" stroke-width="1.8"' if e in kept.get(layer, ()) else ""
            title = f"layer {layer}, expert {e}: {100 * share:.1f} % of the routed {name} tokens" + (
                ", kept" if frame else ", removed" if kept else ""
            )
            parts.append(
                f'<rect x="{left + e * cell + 2}" y="{y + 2}" width="{cell - 4}" height="{cell - 4}" rx="3" fill="rgba(var(--cell), {0.06 + 0.94 * share / peak:.3f})"{frame}><title>{escape(title)}</title></rect>'
            )
    size = f"0 0 {left + experts * cell + 4} {top + len(layers) * cell + 4}"
    return f'<figure style="margin:0"><figcaption><b>{escape(name)}</b></figcaption><svg viewBox="{size}" role="img" aria-label="Expert usage on {escape(name)}">{"".join(parts)}</svg></figure>'
