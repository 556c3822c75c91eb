"""The commands with their arguments, options and defaults, as Markdown, from the command line itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from rich.text import Text
from typer.main import get_command

from expertsmith.cli import app

WORDS = {str: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}
EXAMPLE = re.compile(r"\[dim\](expertsmith .*?)\[/dim\]", re.S)


def commands() -> str:
    """A section a command, by the groups of `--help`."""
    group = get_command(app)
    hints = {entry.name or entry.callback.__name__: hints_of(entry.callback) for entry in app.registered_commands}
    panels: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        panels.setdefault(command.rich_help_panel, []).append(section(name, command, hints[name]))
    return "\n\n".join(f"## {panel}\n\n" + "\n\n".join(parts) for panel, parts in panels.items())


def section(name: str, command: Any, hints: dict[str, Any]) -> str:
    """Usage, description, examples, arguments and options of one command."""
    arguments = [entry for entry in command.params if entry.param_type_name == "argument"]
    options = [
        entry for entry in command.params if entry.param_type_name == "option" and not entry.hidden and entry.name != "help"
    ]
    usage = [f"expertsmith {name}", *(entry.metavar if entry.required else f"[{entry.metavar}]" for entry in arguments)]
    usage += [f"{entry.opts[0]} {value_of(entry, hints)}" for entry in options if entry.required]
    usage += ["[OPTIONS]"] if any(not entry.required for entry in options) else []
    parts = [f"### {name}", f"`{' '.join(usage)}`"]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        example = EXAMPLE.fullmatch(paragraph.strip())
        parts.append(f"```bash\n{' '.join(example[1].split())}\n```" if example else " ".join(plain(paragraph).split()))
    if arguments:
        parts.append("\n".join(f"- `{entry.metavar}`: {plain(entry.help)}" for entry in arguments))
    if options:
        parts.append(table(("option", "what it does"), [(flags(entry, hints), said(entry)) for entry in options]))
    return "\n\n".join(parts)


def hints_of(function: Any) -> dict[str, Any]:
    """Parameter → its plain type."""
    return {name: bare(kind) for name, kind in get_type_hints(function, include_extras=True).items()}


def bare(kind: Any) -> Any:
    """A type without Annotated, None and list."""
    if get_origin(kind) is Annotated:
        return bare(get_args(kind)[0])
    if isinstance(kind, UnionType):
        return bare(next(part for part in get_args(kind) if part is not type(None)))
    return bare(get_args(kind)[0]) if get_origin(kind) is list else kind


def value_of(option: Any, hints: dict[str, Any]) -> str:
    """The word for an option's value; empty for a flag."""
    return "" if option.is_flag else option.metavar or WORDS[hints[option.name]]


def flags(option: Any, hints: dict[str, Any]) -> str:
    """How it is written: `--data`, `-d` `SOURCE`."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = value_of(option, hints)
    return f"{names} `{value}`" if value else names


def said(option: Any) -> str:
    """Its help, and what holds where it is not given, unless the help says so."""
    text = plain(option.help)
    if option.required:
        return f"{text} Required."
    if option.default is None or not option.show_default or (option.is_flag and not option.secondary_opts):
        return text
    return f"{text} Default: `{(option.opts if option.default else option.secondary_opts)[0] if option.is_flag else option.default}`."


def plain(text: str) -> str:
    """Help without rich's markup, with brackets that Markdown does not take for links."""
    return Text.from_markup(text).plain.replace("[", "\\[")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines)
