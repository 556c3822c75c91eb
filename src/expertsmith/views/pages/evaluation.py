"""The page of `evaluate`: a model next to its reference in one figure, then text by domain, tasks, generated text and speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertsmith.views.pages import figures, sheet
from expertsmith.views.show import SPEEDS, WRITTEN, estimate, metric_name, speed_cells, task_name

Found = Mapping[str, Any]

COLOURS = "Red is worse, green is better, by more than two standard errors."


def page(found: Found, model: str, reference: str | None, made: Found) -> str:
    """The whole page as text.

    Args:
        found: the result of `evaluate` as plain data.
        made: how it was made, see `verbs.made`.
    """
    panels = [*_of_text(found), *_of_tasks(found), *_of_speed(found), *_of_generation(found)]
    against = (
        f"Against the reference, ± paired standard error. {COLOURS}"
        if reference
        else "± standard error; no reference was given."
    )
    first = figures.figure(f"<b>The answer.</b> {against}", *panels[:2])
    parts = [_text(found), _tasks(found), _generation(found), _speed(found)]
    sections = [part for part in parts if part]
    facts = {
        "model": model,
        "reference": reference or "none; pass --reference MODEL for KL divergence, top-1 agreement and differences",
    }
    sections.append(sheet.how_made(made, {**facts, "not measured": _missing(found)}))
    name = sheet_name(model) + (f" next to {sheet_name(reference)}" if reference else "")
    return sheet.sheet("expertsmith evaluate", name, _sentences(found), first, sections, f"{made['by']}.")


def sheet_name(source: str) -> str:
    """The last part of a path or of a hub name."""
    return source.rstrip("/").rpartition("/")[2] or source


def rise(value: float, error: float | None, sign: str = "+") -> str:
    """A difference in nats per token with its standard error."""
    return f"{value:{sign}.3f} ± {error:.3f}" if error is not None else f"{value:{sign}.3f} (one sequence: no standard error)"


def noise(mean: Found) -> str:
    """The end of a sentence about a rise that may be chance."""
    unclear = mean["rise_se"] is not None and abs(mean["rise"]) <= figures.CLEAR * mean["rise_se"]
    return ", which is within two standard errors" if unclear else ""


def _short(value: float, error: float | None) -> str:
    return f"{value:+.3f}" + (f" ± {error:.3f}" if error is not None else "")


def rises(quality: Found) -> str:
    """A panel: the loss of a model minus its reference's, by domain."""
    rows = [
        (f"{name}: perplexity {row['reference_perplexity']:.2f} → {row['perplexity']:.2f}", _short(row["rise"], row["rise_se"]), row["rise"], row["rise_se"])
        for name, row in quality["domains"].items()
    ]  # fmt: skip
    return figures.differences("Loss increase, nats per token", rows)


def by_domain(quality: Found) -> str:
    """A table: perplexity, loss and distances of each domain, and their mean."""
    rows, mean = quality["domains"], quality["mean"]
    if "kl" not in mean:
        lines = [
            [name, f"{row['perplexity']:.2f}", f"{row['loss']:.4f} ± {row['loss_se']:.4f}", f"{row['tokens']:,}"]
            for name, row in rows.items()
        ]
        return sheet.table(["domain", "perplexity", "loss ± standard error", "tokens"], lines)
    columns = [
        "domain",
        "perplexity, reference",
        "here",
        "loss, reference",
        "here",
        "increase ± se",
        "KL",
        "top-1",
        "ESAP",
        "tokens",
    ]
    lines = []
    for name, row in rows.items():
        lines.append(
            [name, f"{row['reference_perplexity']:.2f}", f"{row['perplexity']:.2f}", f"{row['reference_loss']:.4f}", f"{row['loss']:.4f}", *_distances(row), f"{row['tokens']:,}"]
        )  # fmt: skip
    if len(rows) > 1:
        lines.append(["mean of domains", "", "", f"{mean['reference_loss']:.4f}", f"{mean['loss']:.4f}", *_distances(mean), ""])
    words = (
        "Increase: loss minus the reference's in nats per token, with the paired standard error over sequences. KL divergence from the reference in nats; "
        "top-1: share of tokens with the same most probable next token; ESAP: mean overlap of the two distributions."
    )
    return sheet.table(columns, lines) + sheet.paragraph(words)


def _distances(row: Found) -> list[str]:
    return [
        _short(row["rise"], row["rise_se"]),
        f"{row['kl']:.4f}",
        f"{100 * row['top1_agreement']:.1f} %",
        f"{row['esap']:.3f}",
    ]


def _sentences(found: Found) -> list[str]:
    made = []
    if "domains" in found:
        mean, domains = found["mean"], found["domains"]
        where = next(iter(domains)) if len(domains) == 1 else f"{len(domains)} domains"
        if "kl" in mean:
            value, error = mean["rise"], mean["rise_se"]
            made.append(
                f"On {where}, the loss is {rise(abs(value), error, '')} nats per token {'above' if value >= 0 else 'below'} the reference's{noise(mean)}; "
                f"both predict the same next token at {100 * mean['top1_agreement']:.1f} % of the tokens."
            )
        else:
            each = ", ".join(f"{name} {row['perplexity']:.2f}" for name, row in domains.items())
            made.append(f"Perplexity: {each}. Without a reference, there is nothing to compare it with.")
    if "tasks" in found:
        made.append(_clear(found["tasks"]["rows"]))
    if "speed" in found and "ratios" in found["speed"]:
        ratios = found["speed"]["ratios"]
        told = [f"{what.partition(',')[0]} {ratios[key]:.2f} ×" for key, what, _ in SPEEDS[:2] if ratios.get(key)]
        made.append(f"Speed in {found['speed']['setting']['engine']}, against the reference: {', '.join(told)}.")
    if "generation" in found:
        made.append(
            f"Texts that end in a loop: {', '.join(_loops(*entry) for entry in found['generation']['domains'].items())}."
        )
    return made


def _loops(domain: str, row: Found) -> str:
    theirs = row["loops"].get("reference")
    return f"{domain} {row['loops']['value']:.0%}" + ("" if theirs is None else f" (reference {theirs:.0%})")


def _clear(rows: list[dict[str, Any]]) -> str:
    """How many task scores differ beyond two standard errors."""
    if "difference" not in rows[0]:
        return f"{len(rows)} task scores, without a reference."
    words = [estimate(row, row["higher_is_better"])[3] for row in rows]
    told = [
        f"{words.count(word)} {text}"
        for word, text in (("worse", "worse"), ("better", "better"), ("differs", "other"))
        if word in words
    ]
    return f"Of {len(rows)} task scores, {' and '.join(told) if told else 'none differs'} by more than two standard errors."


def _missing(found: Found) -> str:
    """What was not asked for, and the option that measures it."""
    options = {
        "domains": "perplexity (--data FILE)",
        "tasks": "tasks (--tasks NAME)",
        "generation": "generated text (--generate N)",
        "speed": "speed and memory (--speed)",
    }
    return ", ".join(text for key, text in options.items() if key not in found)


def _of_text(found: Found) -> list[str]:
    if "domains" not in found:
        return []
    if "kl" in found["mean"]:
        return [rises(found)]
    rows = [(name, f"{row['perplexity']:.2f}", row["perplexity"], "is") for name, row in found["domains"].items()]
    return [figures.bars("Perplexity", rows)]


def _of_tasks(found: Found) -> list[str]:
    if "tasks" not in found:
        return []
    rows = [row for row in found["tasks"]["rows"] if row["value"] is not None]
    if not rows:
        return []
    if "difference" in rows[0]:
        held = [
            (f"{task_name(row)}, {metric_name(row)}", estimate(row)[2], row["difference"], row["difference_se"])
            for row in rows
            if row["difference"] is not None
        ]
        higher = {row["higher_is_better"] for row in rows}
        better = "" if len(higher) > 1 else {True: "higher", False: "lower"}.get(higher.pop(), "")
        return [figures.differences("Tasks, difference to the reference", held, better)]
    return [
        figures.bars(
            "Tasks", [(f"{task_name(row)}, {metric_name(row)}", estimate(row)[0], max(0.0, row["value"]), "is") for row in rows]
        )
    ]


def _of_speed(found: Found) -> list[str]:
    if "speed" not in found:
        return []
    held, rows = found["speed"], []
    for key, what, unit in SPEEDS[:2]:
        for side, kind in (("reference", "was"), ("model", "is")):
            if side in held and held[side].get(key):
                rows.append((f"{what}, {side}", unit(held[side][key]), float(held[side][key]), kind))
    return [figures.bars(f"Speed in {held['setting']['engine']}", rows)] if rows else []


def _of_generation(found: Found) -> list[str]:
    if "generation" not in found:
        return []
    rows = []
    for domain, row in found["generation"]["domains"].items():
        for side, kind in (("reference", "was"), ("value", "is")):
            if row["loops"].get(side) is not None:
                rows.append(
                    (
                        f"{domain}, {'reference' if side == 'reference' else 'model'}",
                        f"{row['loops'][side]:.3f}",
                        row["loops"][side],
                        kind,
                    )
                )
    return [figures.bars("Share of texts that end in a loop", rows)] if rows else []


def _text(found: Found) -> sheet.Section | None:
    return ("text", "Text by domain", by_domain(found)) if "domains" in found else None


def _tasks(found: Found) -> sheet.Section | None:
    if "tasks" not in found:
        return None
    rows, limit = found["tasks"]["rows"], found["tasks"]["limit"]
    columns = ["reference", "here", "difference", ""] if "difference" in rows[0] else ["score"]
    lines = [
        [task_name(row), metric_name(row), f"{row['documents']:,}", *estimate(row, row["higher_is_better"])] for row in rows
    ]
    words = "± standard error; that of a difference is paired, over documents." + (
        f" Up to {limit} documents each." if limit else ""
    )
    cut = [
        f"{row['cut']:,} requests of {row['task']} are longer than the window and were truncated on the left"
        for row in rows
        if row["cut"]
    ]
    drawn = sheet.table(["task", "metric", "n", *columns], lines) + sheet.paragraph(words)
    return "tasks", "Tasks", drawn + (sheet.bullets(dict.fromkeys(cut)) if cut else "")


def _generation(found: Found) -> sheet.Section | None:
    if "generation" not in found:
        return None
    held = found["generation"]
    against = "difference" in next(iter(held["domains"].values()))["length"]
    lines = [
        [domain, f"{row['prompts']}", what, *estimate(row[key], better, digits=1 if key == "length" else 3)]
        for domain, row in held["domains"].items()
        for key, (what, better) in WRITTEN.items()
        if key in row
    ]
    columns = ["reference", "here", "difference", ""] if against else ["here"]
    words = f"Greedy decoding of {held['new_tokens']} tokens, ± standard error."
    return (
        "generation",
        "Generated text",
        sheet.table(["domain", "prompts", "measure", *columns], lines) + sheet.paragraph(words),
    )


def _speed(found: Found) -> sheet.Section | None:
    if "speed" not in found:
        return None
    held = found["speed"]
    names, lines = speed_cells(held)
    setting = held["setting"]
    words = (
        f"{setting['engine']}, batch {setting['batch']}, {setting['prompt_len']} + {setting['new_tokens']} tokens, {setting['dtype']}; medians of "
        f"{setting['rounds']} alternating rounds. A ratio is the median over the rounds of the ratio within a round."
    )
    notes = [f"energy: {held['energy']}"] if "energy" in held else []
    return "speed", "Speed and memory", sheet.table(["", *names], lines) + sheet.paragraph(words) + sheet.bullets(notes)
