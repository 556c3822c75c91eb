"""The page of `compress`: what was cut, what it cost, whether it is proven, whether it will serve; then where, how and from what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expertsmith.views.pages import figures, sheet
from expertsmith.views.pages.evaluation import COLOURS, by_domain, noise, rise, rises
from expertsmith.views.show import apart, byte_count, count, layer_reason, neurons_kept, ranges, reason_title

Found = Mapping[str, Any]
WORDS = {"error": "refuses it", "warning": "with a warning", "": "no obstacle found"}  # lint's worst level for an engine


def page(found: Found, made: Found) -> str:
    """The whole page as text.

    Args:
        found: the result of `compress` as plain data.
        made: how it was made, see `verbs.made`.
    """
    cards = [_cut(found), _cost(found), _proof(found), _serving(found)]
    first = (
        f'<div class="first"><div class="answers">{"".join(sheet.answer(*card) for card in cards)}</div>{_figure(found)}</div>'
    )
    sections = [_experts(found), *_quality(found), *_healing(found), _proven(found), _engines(found)]
    if found["notes"]:
        sections.append(("notes", "Notes", sheet.bullets(found["notes"])))
    sections.append(sheet.how_made(made, _material(found)))
    summary = ["; ".join(text for text in (_stays(found), _changes(found), _says(cards[2][2]), _serves(found)) if text) + "."]
    foot = f"{made['by']}. All numbers are in the output of compress --json; the plan is in expertsmith/plan.json of the model."
    name = f"{_name(found['model'])}, {found['plan']['method']['name']}"
    return sheet.sheet("expertsmith compress", name, summary, first, sections, foot)


def _name(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2] or source


def _share(found: Found) -> str:
    """ "8 of 16 experts per layer", "3 to 8 of 16 experts per layer", "72 of 96 neurons in each expert"."""

    def spread(values: Sequence[int]) -> str:
        return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"

    layers = found["plan"]["layers"]
    held = [entry["neurons"] for entry in layers if entry.get("neurons")]
    if held:
        left = spread([count for entry in held for count in entry["counts"]])
        return f"{left} of {spread([entry['width'] for entry in held])} neurons in each expert"
    return f"{spread([len(entry['keep']) for entry in layers])} of {spread([entry['num_experts'] for entry in layers])} experts per layer"


def _stays(found: Found) -> str:
    before, after = found["plan"]["summary"]["bytes"]
    return f"{_share(found)} stay, with {100 * after / before:.0f} % of the bytes"


def _changes(found: Found) -> str:
    quality = found["quality"]
    if not quality:
        return "the loss was not measured"
    value = quality["mean"]["rise"]
    return f"the loss on {_text_of(quality)} {'rises' if value >= 0 else 'falls'} by {rise(abs(value), quality['mean']['rise_se'], '')} nats per token{noise(quality['mean'])}"


def _text_of(quality: Found) -> str:
    return "held-out text" if quality["held_out"] else "the calibration text itself"


def _says(badge: str) -> str:
    told = {
        "proven": "the result is proven",
        "bytes only": "the bytes are proven",
        "before healing": "it was proven before healing",
    }
    return told.get(badge, "the proof FAILED")


def _serves(found: Found) -> str:
    held = _levels(found)
    refusing = [engine for engine, level in held.items() if level == "error"]
    return f"{', '.join(refusing)} will not serve it" if refusing else "lint finds no engine that would refuse it"


def _cut(found: Found) -> tuple[str, str, str, str, list[str]]:
    parameters, held = found["plan"]["summary"]["parameters"], found["plan"]["summary"]["bytes"]
    merged = sum(bool(entry.get("merge")) for entry in found["plan"]["layers"])
    lines = [
        f"{byte_count(held[0])} → {byte_count(held[1])} ({100 * held[1] / held[0]:.0f} %)",
        f"{count(parameters[0])} → {count(parameters[1])} parameters",
        *([f"experts are merged in {merged} layers"] if merged else []),
    ]
    return "What was cut", "none", f"{100 * held[1] / held[0]:.0f} % left", _share(found), lines


def _cost(found: Found) -> tuple[str, str, str, str, list[str]]:
    quality, title = found["quality"], "What it cost"
    if not quality:
        why = "run again with --measure" if found["not_measured"] == "--no-measure" else "pass --eval-data FILE"
        return title, "none", "not measured", "Loss not measured", [f"{found['not_measured']}: {why}"]
    mean, rows = quality["mean"], quality["domains"]
    lines = [
        f"{name}: perplexity {row['reference_perplexity']:.2f} → {row['perplexity']:.2f}"
        for name, row in list(rows.items())[:4]
    ]
    if len(rows) > 4:
        lines.append(f"and {len(rows) - 4} domains more")
    lines.append(f"KL {mean['kl']:.3f} nats, same top-1 at {100 * mean['top1_agreement']:.1f} % of the tokens")
    if not quality["held_out"]:
        lines.append("on the calibration text itself: too optimistic, pass --eval-data FILE")
    badge = f"{len(rows)} domains" if len(rows) > 1 else next(iter(rows))
    return (
        title,
        "none" if quality["held_out"] else "fair",
        badge,
        f"{rise(mean['rise'], mean['rise_se'])} nats per token",
        lines,
    )


def _proof(found: Found) -> tuple[str, str, str, str, list[str]]:
    held, title = found["verify"], "Is it proven?"
    healed = ["of the checkpoint before healing, which then changed weights"] if "heal" in found else []
    if held["wrong_tensors"] or held["config_differs"]:
        lines = [f"{len(held['wrong_tensors'])} of {held['tensors']:,} tensors differ from the plan"]
        lines += [f"config differs in {', '.join(held['config_differs'])}"] if held["config_differs"] else []
        return title, "bad", "FAILED", "Bytes are not as planned", lines
    bytes_ = f"bytes: {held['tensors']:,} tensors as planned"
    if held["not_compared"]:
        return (
            title,
            "fair",
            "bytes only",
            "Bytes as planned",
            [bytes_, f"layers, logits: not measured, {held['not_compared']}", *healed],
        )
    lines = [
        bytes_,
        f"layers: {len(held['layers'])} compared, logits: differ by {held['logits_difference']:.2g} of {held['logits_scale']:.3g}",
        f"allowed: {held['tolerance']:g}; {held['tokens']:,} tokens, {held['dtype']}",
        *([apart(held["apart"], held["tokens"])] if held.get("apart") else []),
        *([f"multi-token prediction: bytes only, {held['mtp_not_compared']}"] if held["mtp_not_compared"] else []),
        *healed,
    ]
    big = f"Largest difference {held['largest_relative_difference']:.1e}"
    if not held["passed"]:
        return title, "bad", "FAILED", big, lines
    return title, *(("fair", "before healing") if healed else ("good", "proven")), big, lines


def _levels(found: Found) -> dict[str, str]:
    """The worst level of lint's findings for each engine, "" where there is none but infos."""
    worst = dict.fromkeys(found["lint"]["engines"], "")
    for finding in found["lint"]["findings"]:
        if finding["level"] == "error" or (finding["level"] == "warning" and not worst[finding["engine"]]):
            worst[finding["engine"]] = finding["level"]
    return worst


def _serving(found: Found) -> tuple[str, str, str, str, list[str]]:
    held, engines = _levels(found), found["lint"]["engines"]
    refusing = sum(level == "error" for level in held.values())
    kind = "bad" if refusing == len(held) else "fair" if any(held.values()) else "good"
    badge = f"{refusing} refuse{'s' * (refusing == 1)}" if refusing else "warnings" if any(held.values()) else "no obstacle"
    lines = [f"{engines[engine]}: {WORDS[level]}" for engine, level in held.items()]
    return "Will it serve?", kind, badge, f"{len(held) - refusing} of {len(held)} engines, by lint", lines


def _figure(found: Found) -> str:
    summary, quality = found["plan"]["summary"], found["quality"]
    held, experts = summary["bytes"], summary["experts"]
    sizes = figures.bars(
        "Size",
        [
            ("bytes before", byte_count(held[0]), held[0] / held[0], "was"),
            ("bytes after", f"{byte_count(held[1])} ({100 * held[1] / held[0]:.0f} %)", held[1] / held[0], "is"),
            ("experts before", f"{experts[0]:,}", 1.0, "was"),
            ("experts after", f"{experts[1]:,} ({100 * experts[1] / experts[0]:.0f} %)", experts[1] / experts[0], "is"),
        ],
    )
    if not quality:
        return figures.figure("<b>What is left.</b> The loss was not measured.", sizes)
    caption = (
        f"<b>What is left, and what it costs</b> on {_text_of(quality)}, ± paired standard error over sequences. {COLOURS}"
    )
    return figures.figure(caption, sizes, rises(quality))


def _experts(found: Found) -> sheet.Section:
    plan = found["plan"]
    if any(entry.get("neurons") for entry in plan["layers"]):
        rows = [[f"{entry['layer']}", neurons_kept(entry), layer_reason(entry)] for entry in plan["layers"]]
        table = sheet.table(["layer", "kept neurons", reason_title(plan["layers"][0])], rows)
        return "experts", "Kept neurons of each layer's experts", table
    drawn = figures.kept_map(plan["layers"], ranges)
    title = reason_title(plan["layers"][0])
    columns = ["layer", "kept", "of", "kept experts (ids of the source)", *([title] if title else [])]
    rows = [
        [
            f"{entry['layer']}",
            f"{len(entry['keep'])}",
            f"{entry['num_experts']}",
            ranges(entry["keep"]),
            *([layer_reason(entry)] if title else []),
        ]
        for entry in plan["layers"]
    ]
    listed = f"<details><summary>The same as a table</summary>{sheet.table(columns, rows)}</details>"
    return "experts", "Kept experts of each layer", drawn + listed


def _quality(found: Found) -> list[sheet.Section]:
    if not found["quality"]:
        return []
    return [("quality", f"Quality by domain, on {_text_of(found['quality'])}", by_domain(found["quality"]))]


def _healing(found: Found) -> list[sheet.Section]:
    if "heal" not in found:
        return []
    report = found["heal"]
    was, now = report["held_out"]["before"]["domains"], report["held_out"]["after"]["domains"]
    rows = [
        [name, f"{was[name]['reference_loss']:.4f}", f"{was[name]['loss']:.4f}", f"{row['loss']:.4f}", f"{was[name]['kl']:.4f}", f"{row['kl']:.4f}", f"{row['tokens']:,}"]
        for name, row in now.items()
    ]  # fmt: skip
    parts = [
        sheet.paragraph(f"By {report['method']}, measured on a held-out part of the calibration text."),
        *(sheet.paragraph(f"{sentence}.") for sentence in report.get("rule", ())),
        sheet.table(["domain", "loss, original", "before", "after", "KL before", "after", "tokens"], rows),
    ]
    if not report["accepted"]:
        parts.append(sheet.paragraph("Healing did not improve the held-out part, so no weight was changed."))
    if report["mixed"]:
        parts.append(sheet.paragraph(f"{report['mixed']}."))
    if report["layers"]:
        each = [[f"{row['layer']}", f"{row['error_before']:.4g}", f"{row['error_after']:.4g}"] for row in report["layers"]]
        parts.append(sheet.table(["layer", "held-out error of the layer", "after"], each))
    return [("healing", "Healing", "".join(parts))]


def _proven(found: Found) -> sheet.Section:
    held = found["verify"]
    text = "Every layer and the logits of the written checkpoint next to those of the original with the same experts masked or merged. Relative: share of the largest value."
    if held["wrong_tensors"]:
        text = f"These tensors differ from the plan, so no layer was compared: {', '.join(held['wrong_tensors'][:20])}."
    elif held["config_differs"] or held["not_compared"]:
        text = "No outputs were compared."
    rows = [
        [f"{row['layer']}", f"{row['difference']:.2g}", f"{row['scale']:.3g}", _relative(row["difference"], row["scale"])]
        for row in held["layers"]
    ]
    if rows:
        total = held["logits_difference"], held["logits_scale"]
        rows.append(["logits", f"{total[0]:.2g}", f"{total[1]:.3g}", _relative(*total)])
    drawn = sheet.table(["layer", "largest difference", "largest value", "relative"], rows) if rows else ""
    return "proof", "The proof", sheet.paragraph(text) + drawn


def _relative(difference: float, scale: float) -> str:
    return f"{difference / scale if scale else difference:.1e}"


def _engines(found: Found) -> sheet.Section:
    held = found["lint"]
    rows = []
    for engine, version in held["engines"].items():
        own = [finding for finding in held["findings"] if finding["engine"] == engine]
        rows += [(version, finding["level"], _told(finding)) for finding in own] or [(version, "", "nothing found")]
    text = "What lint knows from the engines' sources about this config and these tensor headers. It does not start an engine."
    drawn = sheet.table(["engine, the version that was read", "level", "finding"], rows, "words")
    return "serving", "Engines", sheet.paragraph(text) + drawn


def _told(finding: Found) -> str:
    return f"{finding['message']}; {finding['remedy']}" if finding["remedy"] else finding["message"]


def _material(found: Found) -> dict[str, str]:
    plan = found["plan"]
    calibration, quality = plan.get("calibration"), found["quality"]

    def tokens(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {number:,}" for name, number in counts.items())

    options = ", ".join(f"{key} {value}" for key, value in plan["method"]["options"].items())
    return {
        "model": f"{found['model']} ({plan['model']['model_type']}, {plan['model']['fingerprint'][:23]}…)",
        "output": found["out"],
        "method": plan["method"]["name"] + (f" ({options})" if options else ""),
        "calibration": f"tokens: {tokens(calibration['tokens'])} ({calibration['fingerprint'][:23]}…)"
        if calibration
        else "no text",
        "measured on": f"{_text_of(quality)}, tokens: {tokens({name: row['tokens'] for name, row in quality['domains'].items()})}"
        if quality
        else f"not measured ({found['not_measured']})",
    }
