"""Write what README and docs tell from the program itself, between `<!-- name -->` and `<!-- end of name -->`, and the schema of plans (`--check`:
only say what is out of date)."""

from __future__ import annotations

import html
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cli_reference import commands, table
from expertsmith.analysis.catalogue import definitions
from expertsmith.arch import families
from expertsmith.arch.dense import BLOCKED, DENSE
from expertsmith.calibration.observers import STATISTICS
from expertsmith.calibration.stats import JOINED, MAXIMA
from expertsmith.checkpoint.formats import formats
from expertsmith.healing.options import HEALERS
from expertsmith.lint import ENGINES, RULES
from expertsmith.methods import methods
from expertsmith.planning.plan import Plan
from expertsmith.views.show import needs

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "docs" / "schemas" / "plan.v1.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def supported() -> str:
    """How many families there are, in a sentence."""
    rows = [row for row in families().values() if row.supported]
    own = [row for row in rows if row.runs_as is None and row.no_class is None]
    part = sum(row.status == "partial" for row in own)
    aliases = ", ".join(f"`{row.model_type}` as `{row.runs_as}`" for row in rows if row.runs_as)
    without = ", ".join(f"`{row.model_type}`" for row in rows if row.no_class)
    return (
        f"{len(own)} model types of transformers 5.23, each tested through the whole flow on a tiny random model ({part} of them in part). "
        f"Run as another type: {aliases}. Weights only, because transformers has no class for them: {without}."
    )


def family_table() -> str:
    """Every family with what is particular to it."""
    rows = [(f"`{row.model_type}`", row.title, row.status, row.notes) for row in families().values()]
    return table(("model_type", "family", "status", "peculiarities"), rows)


def format_table() -> str:
    """Every quantised format × stage: what every command reads and what can be written again."""
    rows = []
    for row in formats().values():
        again = "yes" if row.encode else "bfloat16 only"
        asked = ", ".join(f"`{name}`" for name in row.methods if name)
        rows.append((f"`{row.name}`", row.tensors, asked, "decoded", "bytes copied", again, row.reference))
    return table(
        (
            "format",
            "on disk",
            "quant_method",
            "calibrate, score, analyze, verify, evaluate, skip",
            "apply",
            "heal, merge with --requantise",
            "tested against",
        ),
        rows,
    )


def dense_table() -> str:
    """Dense families, what they become, and what is refused."""
    rows = [(f"`{row.model_type}`", row.title, ", ".join(f"`{name}`" for name in row.targets)) for row in DENSE.values()]
    refused = "\n".join(f"- `{name}` is refused: {reason}" for name, reason in BLOCKED.items())
    return table(("model_type", "family", "becomes"), rows) + "\n\n" + refused


def method_table() -> str:
    """A line a method: what it does, needs and can be asked for."""
    rows = [
        (f"[`{m.name}`](#{m.name})", m.title, needs(m), ", ".join(m.budgets), "–" if m.paper == "-" else link(m.paper))
        for m in methods().values()
    ]  # fmt: skip
    return table(("method", "what it does", "needs", "budgets", "source"), rows)


def method_sections() -> str:
    """A section a method: its formula and deviations, what it costs and cannot do, its options."""
    parts = []
    for m in methods().values():
        parts.append(f"## {m.name} {{ #{m.name} }}")
        parts.append(f"**{m.title}.** {paragraphs(m.doc)}")
        if m.measure is not None:
            parts.append("Measured once and stored next to the plan: " + paragraphs(m.measure.__doc__ or ""))
        facts = [
            ("source", "" if m.paper == "-" else link(m.paper)),
            ("needs", needs(m)),
            ("cost", m.cost),
            ("budgets", ", ".join(m.budgets)),
            ("limits", m.limits),
        ]
        parts.append("\n".join(f"- {name}: {text}" for name, text in facts if text))
        if m.options:
            hints = {
                name: kind
                for function in (m.measure, m.function, m.constants, m.cut)
                if function
                for name, kind in get_type_hints(function, include_extras=True).items()
            }
            parts.append(
                table(
                    ("option", "default", "values"),
                    [(f"`{name}`", f"`{shown(value)}`", values(hints[name])) for name, value in m.options.items()],
                )
            )
    return "\n\n".join(parts)


def healing_sections() -> str:
    """A section a way of healing: its doc and its options."""
    parts = []
    for name, kind in HEALERS.items():
        hints = get_type_hints(kind, include_extras=True)
        rows = [(f"`{entry.name}`", f"`{shown(entry.default)}`", values(hints[entry.name])) for entry in fields(kind)]
        docs = [paragraphs(part.__doc__ or "") for part in kind.__mro__[:-1]]
        parts += [f"### {name}", *docs, table(("option", "default", "values"), rows)]
    return "\n\n".join(parts)


def statistics_table() -> str:
    """Every statistic with shape, unit and definition, and how parts of it are put together where they are not summed."""
    rows = []
    for name, what in STATISTICS.items():
        joined = "; parts: the larger" if name in MAXIMA else "; parts: one after another" if name in JOINED else ""
        asked = f" (`{what.option}`)" if what.option else ""
        rows.append((f"`{name}` `{what.shape}`", what.unit, what.definition + joined + asked))
    return table(("name and shape", "unit", "definition"), rows)


def measure_tables() -> str:
    """Every measure with unit and definition, a table a section of the file."""
    titles = {
        "static": "From the weights: `layers[].static`",
        "usage": "From statistics: `layers[].usage`",
        "sample": "From all experts on a sample: `layers[].sample`",
        "model": "For the whole model: top level of the file",
    }
    parts = []
    for part, entries in definitions().items():
        rows = [(f"`{name}`", entry["unit"], entry["definition"]) for name, entry in entries.items()]
        parts += [f"## {titles[part]}", table(("measure", "unit", "definition"), rows)]
    return "\n\n".join(parts)


def engine_table() -> str:
    """The engines, and the version whose source was read."""
    rows = [(name, version, str(sum(rule.engine == name for rule in RULES))) for name, version in ENGINES.items()]
    return table(("engine", "version checked", "rules"), rows)


def rule_tables() -> str:
    """Every rule, by engine."""
    parts = []
    for engine, version in ENGINES.items():
        rows = []
        for rule in RULES:
            if rule.engine == engine:
                source = html.escape(rule.source.removeprefix(version + ", "), quote=False).replace("_", r"\_")
                rows.append((f"`{rule.id.removeprefix(engine + '-')}`", f"{rule.says}<br><small>{source}</small>"))
        parts += [f"## {engine}", f"Checked in {version}.", table(("rule", "what it says, and its source"), rows)]
    return "\n\n".join(parts)


def link(text: str) -> str:
    """Papers as links."""
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def paragraphs(doc: str) -> str:
    """A docstring as Markdown, without the errors it raises."""
    return "\n\n".join(part for part in inspect.cleandoc(doc).split("\n\n") if not part.startswith("Raises:"))


def values(kind: Any) -> str:
    """What an option takes."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind) if value != "")
    if get_origin(kind) is Union:
        return " or ".join(values(part) for part in get_args(kind))
    if getattr(kind, "__metadata__", None):
        plain, limit = get_args(kind)
        return f"{values(plain)}, at least {limit.bound}"
    return {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}[kind]


def shown(value: Any) -> str:
    """A default as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


SECTIONS: dict[str, Callable[[], str]] = {
    "supported families": supported,
    "families": family_table,
    "dense families": dense_table,
    "formats": format_table,
    "methods": method_table,
    "every method": method_sections,
    "healing": healing_sections,
    "statistics": statistics_table,
    "measures": measure_tables,
    "engines": engine_table,
    "rules": rule_tables,
    "commands": commands,
}


def filled(text: str) -> str:
    """A page with every section between marks written anew."""

    def write(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{SECTIONS[match[1]]()}\n<!-- end of {match[1]} -->"

    return re.sub(rf"<!-- ({'|'.join(SECTIONS)}) -->\n.*?<!-- end of \1 -->", write, text, flags=re.S)


def plan_schema(_: str) -> str:
    """The JSON Schema of plan.json."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema(by_alias=True)}
    return json.dumps({**made, "title": "plan.json of expertsmith, version 1"}, indent=2) + "\n"


def main() -> None:
    stale = []
    for page, write in [*((page, filled) for page in PAGES), (SCHEMA, plan_schema)]:
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        wanted = write(text)
        if wanted != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                page.write_text(wanted, encoding="utf-8")
    if "--check" in sys.argv and stale:
        sys.exit(f"{', '.join(stale)}: out of date: run make docs-reference")


if __name__ == "__main__":
    main()
