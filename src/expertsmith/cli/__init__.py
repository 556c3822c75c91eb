"""The command line: a command per verb, made from its definition. Tables go to stdout, progress to stderr.

We compared Typer and this adapter with cyclopts, which reads annotated signatures itself. cyclopts needs an adapter of about the same length for
groups in a TypedDict, `--json`, `--quiet` and the reference, and its errors and help would change what scripts see.
"""

from __future__ import annotations

import errno
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer

import expertsmith.api
import expertsmith.demo  # noqa: F401
from expertsmith.errors import UsageError, UserError
from expertsmith.ranks import connected, tells
from expertsmith.verbs.definition import MISSING, VERBS, Option, Verb, pairs
from expertsmith.verbs.options import JOB
from expertsmith.views import show
from expertsmith.views.encoding import show_on_any_terminal
from expertsmith.views.progress import Bar, Silent

ORDER = [
    "compress",
    "calibrate",
    "plan",
    "apply",
    "dequantise",
    "skip",
    "verify",
    "evaluate",
    "compare",
    "convert",
    "heal",
    "analyze",
    "inspect",
    "lint",
    "methods",
    "architectures",
    "export",
    "demo",
    "recipes",
    "run",
]  # of the help, by the groups in which it shows them
JSON = typer.Option("--json", help="Print one machine-readable object on stdout, and nothing else.", rich_help_panel=JOB)
Refused: type[Exception] = typer.BadParameter.__mro__[2]  # what Typer's parser raises: click's ClickException
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO)
QUIET = typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=JOB)

app = typer.Typer(
    name="expertsmith",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Remove the experts that you do not need from a Mixture-of-Experts language model, and prove the result right.

    model + data ─calibrate→ statistics ─plan→ plan.json ─apply→ checkpoint ─verify, evaluate→ report

    Each stage writes a file and can be re-run from the file before it. `compress` runs all stages at once; `demo` shows
them offline in under a minute.""",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", "-V", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from expertsmith import __version__

        print(f"expertsmith {__version__}")
        raise typer.Exit


def command(verb: Verb) -> Callable[..., None]:
    """The function that Typer makes a command of."""
    options = [option for option in verb.options if option.name != "progress"]

    def run(**values: Any) -> None:
        now = VERBS[verb.name]
        as_json, quiet = values.pop("as_json"), values.pop("quiet", False)
        given = {option.name: _read(option, values[option.name]) for option in options}
        with _ranks(now, given.get("device")) as (rank, where):
            if where is not None:
                given["device"] = where
            bar = {"progress": Silent() if quiet or rank > 0 else Bar()} if len(options) < len(verb.options) else {}
            result = _called(now, given, bar, rank)
            if rank == 0:
                _tell(now, result, given, as_json)
        if not now.passed(result):
            raise typer.Exit(1)

    parameters = [_parameter(option) for option in options]
    parameters.append(
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, JSON])
    )
    if len(options) < len(verb.options):  # it has progress to show
        parameters.append(
            inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, QUIET])
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    run.__name__, run.__doc__ = verb.name, verb.doc
    return run


def _called(verb: Verb, given: Mapping[str, Any], bar: Mapping[str, Any], rank: int) -> Any:
    """What the verb returns. How it is used, and what an interrupted run leaves, are said by one rank."""
    try:
        return verb.function(**given, **bar)
    except UsageError as error:
        if rank > 0:
            raise typer.Exit(2) from None
        wrong = typer.BadParameter(str(error))
        wrong.parts = (error.message, error.remedy)  # type: ignore[attr-defined]  # for --json
        raise wrong from None
    except KeyboardInterrupt:
        if rank == 0:
            print(_interrupted(verb, given), file=sys.stderr)
        raise typer.Exit(130) from None


def _tell(verb: Verb, result: Any, given: Mapping[str, Any], as_json: bool) -> None:
    """Show a result."""
    if as_json:
        show.as_json(_versioned(verb, verb.plain(result, given)))
    else:
        verb.show(result, given)


def _versioned(verb: Verb, value: Any) -> Any:
    """An object that does not say what it is, with that in front. Lists stay lists, and a format of its own stays what it means there."""
    if not isinstance(value, Mapping) or "format" in value:
        return value
    return {"format": f"expertsmith.{verb.name}", "version": 1, **value}


def _interrupted(verb: Verb, given: Mapping[str, Any]) -> str:
    """What an interrupted command leaves, and the command that goes on."""
    with suppress(UserError):  # a recipe that cannot be read any more
        anew = {"--fresh", "--overwrite"} if verb.name == "run" else {"--fresh"}  # a recipe goes on with what it may replace
        again = shlex.join(["expertsmith", *(word for word in sys.argv[1:] if word not in anew)])
        kept = [str(place) for place in dict.fromkeys(verb.keeps(given)) if place.exists()]
        if kept:
            return f"interrupted; what is finished is kept in {', '.join(kept)}\nto go on: {again}"
    return "interrupted; nothing was kept, and no unfinished output is left"


def _several() -> int:
    """The number of processes that torchrun started for this command, or 0 if there is only this one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world if world > 1 else 0


def _ranks(verb: Verb, device: Any) -> Any:
    """A context that yields (rank, its device or None).

    Raises:
        UserError: several processes, of a verb that does not share its work out.
    """
    if not _several():
        return nullcontext((0, None))
    if not verb.ranks:
        able = ", ".join(name for name in ORDER if VERBS[name].ranks)
        raise UserError(
            f"{verb.name} runs as one process, but torchrun started {_several()}",
            f"run it without torchrun, which is for {able}, or unset WORLD_SIZE",
        )
    return connected(device)


def _silent() -> bool:
    """Whether another rank tells why the run failed."""
    if not _several():
        return False
    return not tells()


def _parts(option: Option) -> tuple[Any, bool, bool]:
    """(type of a value, whether several may be given, whether it may be left out) on the command line."""
    kinds = (
        [option.type]
        if get_origin(option.type) in (Literal, None) or isinstance(option.type, type)
        else list(get_args(option.type))
    )
    if get_origin(option.type) in (Sequence, Mapping):
        kinds = [option.type]
    optional = NoneType in kinds
    kind = next(kind for kind in kinds if kind is not NoneType)
    if get_origin(kind) is Mapping:
        return str, True, True
    if get_origin(kind) is Sequence:
        return option.opt.kind or get_args(kind)[0], True, True
    return option.opt.kind or (str if get_origin(kind) is Literal else kind), False, optional


def _words(option: Option) -> tuple[str, ...]:
    return get_args(option.type) if get_origin(option.type) is Literal else ()


def _parameter(option: Option) -> inspect.Parameter:
    kind, several, optional = _parts(option)
    opt = option.opt
    default = opt.cli if opt.cli is not MISSING else None if several else option.default
    if default is MISSING and optional:
        default = None
    more: dict[str, Any] = {"help": opt.help, "show_default": opt.shown and default is not None, "rich_help_panel": opt.panel}
    if opt.metavar or _words(option):
        more["metavar"] = opt.metavar or "|".join(_words(option))
    if opt.least is not None:
        more["min"] = opt.least
    made = typer.Argument(**more) if opt.argument else typer.Option(*opt.flags, **more)
    hint = list[kind] | None if several else kind | None if optional else kind  # type: ignore[valid-type]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, made])


def _read(option: Option, value: Any) -> Any:
    """A value as the verb takes it."""
    if get_origin(option.type) is Sequence:
        return list(value or ())
    if any(get_origin(kind) is Mapping for kind in (option.type, *get_args(option.type))):
        return pairs(option.opt.flags[-1], value) or {}
    words = _words(option)
    if words and value not in words:
        flag = option.opt.flags[0] if option.opt.flags else f"--{option.name.replace('_', '-')}"
        raise UserError(f"{flag} is {value!r}", f"choose {' or '.join(words)}")
    return value


for _name in ORDER:
    app.command(_name, rich_help_panel=VERBS[_name].panel)(command(VERBS[_name]))


def main() -> None:
    """Run the command line. A user's mistake ends in one line and exit code 2; `--debug` shows where it came from."""
    show_on_any_terminal()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, prog_name="expertsmith", standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else 0)
    except Refused as error:
        _refuse(error, "--json" in arguments)
    except UserError as error:
        if debug:
            raise
        _fail(error.message, error.remedy, "--json" in arguments)
    except Exception as error:
        if not debug and _silent():  # it fails because another rank no longer answers
            raise SystemExit(1) from None
        told = None if debug else _told(error)
        if told is None:
            raise
        _fail(told, "", "--json" in arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _refuse(error: Any, as_json: bool) -> NoReturn:
    """Say what is wrong with the command line itself, as Typer does."""
    from typer.rich_utils import rich_format_error

    rich_format_error(error)
    if as_json and tells():
        _error_as_json(*getattr(error, "parts", (error.format_message(), "")))
    raise SystemExit(error.exit_code)


def _told(error: Exception) -> str | None:
    """What the machine could not give, in a sentence; None: the error is a defect. safetensors has an exception of its own for files."""
    number, place = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if number in FULL or any(os.strerror(code) in str(error) for code in FULL):
        return (
            f"the disk is full{f' ({place})' if place else ''}; make room or choose another output, and run the command again"
        )
    if number in DENIED and place:
        return f"{place} cannot be read or written ({os.strerror(number)}); make it accessible, or choose another path"
    if _out_of_memory(error):
        return "memory ran out; run with --memory stream and a smaller --batch-tokens, or on a larger machine"
    return None


def _out_of_memory(error: Exception) -> bool:
    """Whether the system or torch had no more memory to give (torch says so in a RuntimeError's text)."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def _fail(message: str, remedy: str, as_json: bool) -> NoReturn:
    if _silent():
        raise SystemExit(2)
    print(f"error: {UserError(message, remedy)}", file=sys.stderr)
    if as_json:
        _error_as_json(message, remedy)
    raise SystemExit(2)


def _error_as_json(message: str, remedy: str) -> None:
    show.as_json({"format": "expertsmith.error", "version": 1, "error": message, "remedy": remedy or None})
