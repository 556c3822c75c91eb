"""What a verb is: a function whose signature says all of its options once. The command line, the recipe's sections and the reference are made
from it.

An option is `Annotated[type, Opt(help, …)]`; several that go together are a `TypedDict` of such options, which a verb takes whole
(`**given: Unpack[Group]`) and hands on whole.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from expertsmith.calibration.opening import beside, opened_as
from expertsmith.checkpoint import pinned
from expertsmith.checkpoint.output import Writes, check_output
from expertsmith.errors import UserError
from expertsmith.registry import unknown
from expertsmith.views.progress import usual

FLOW, LOOK, MORE = "The flow", "Look", "More"
MISSING = inspect.Parameter.empty


class Opt:
    """The description of an option on the command line.

    Args:
        help: one or two short sentences.
        flags: its spellings, where they are not --name-of-the-parameter; an argument has none and a `metavar`.
        kind: the type that the command line reads, where Python takes more.
        least: the smallest number allowed.
        default: of a group's option, which has no other place for it.
        shown: whether the help shows the default.
        cli: the default of the command line, where it is another.
        writes: of an output: how it is written, see `checkpoint.output`. It is checked before anything else happens.
        panel: the title under which the help shows it; None: with the first ones.
    """

    def __init__(
        self,
        help: str,
        *flags: str,
        metavar: str | None = None,
        argument: bool = False,
        kind: Any = None,
        least: int | None = None,
        default: Any = MISSING,
        shown: bool = True,
        cli: Any = MISSING,
        writes: Writes | None = None,
        panel: str | None = None,
    ) -> None:
        self.help, self.flags, self.metavar, self.argument, self.panel = help, flags, metavar, argument, panel
        self.kind, self.least, self.default, self.shown, self.cli, self.writes = kind, least, default, shown, cli, writes


@dataclass(frozen=True)
class Option:
    """One parameter of a verb."""

    name: str
    type: Any
    opt: Opt
    default: Any = MISSING

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING


@dataclass(frozen=True)
class Verb:
    """A function as a command.

    `show(result, given)` prints what it returned, `plain` makes JSON of it, and `passed` says whether the exit code is 0. `keeps`: where an
    interrupted run leaves what the next one goes on from. `ranks`: it runs under torchrun.
    """

    name: str
    panel: str
    function: Callable[..., Any]
    show: Callable[[Any, Mapping[str, Any]], None]
    plain: Callable[[Any, Mapping[str, Any]], Any]
    passed: Callable[[Any], bool]
    keeps: Callable[[Mapping[str, Any]], list[Path]]
    ranks: bool = False
    options: tuple[Option, ...] = field(default=())

    @cached_property
    def doc(self) -> str:
        """Its docstring up to `Args:` or `Raises:`."""
        text = inspect.getdoc(self.function) or ""
        for mark in ("\nArgs:", "\nRaises:", "\nReturns:"):
            text = text.partition(mark)[0]
        return text.strip()


VERBS: dict[str, Verb] = {}
F = TypeVar("F", bound=Callable[..., Any])


def options_of(function: Callable[..., Any]) -> tuple[Option, ...]:
    """The options of a function: its annotated parameters, then those of the group that it takes whole, but for those that it has itself."""
    hints = _hints(function)
    found: dict[str, Option] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            group = get_args(hints[name])[0] if name in hints and get_args(hints[name]) else None
            for key, hint in (get_type_hints(group, include_extras=True) if group else {}).items():
                made = _option(key, hint, MISSING)
                if made is not None and key not in found:
                    found[key] = made
            continue
        made = _option(name, hints[name], parameter.default)
        if made is not None:
            found[name] = made
    return tuple(found.values())


def check_outputs(options: Iterable[Option], values: Mapping[str, Any]) -> None:
    """Refuse outputs that cannot be written, and a file that exists unless it is to be replaced."""
    for option in options:
        if option.opt.writes is not None and values.get(option.name) is not None:
            check_output(Path(values[option.name]), option.opt.writes, values.get("overwrite", False))


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of the parameters. That of the result may be a name that only a type checker knows."""
    own = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    return get_type_hints(type("_", (), {"__annotations__": own, "__module__": function.__module__}), include_extras=True)


def _is(kind: Any, hint: Any) -> bool:
    """Whether a hint is `kind[…]`, or that or None."""
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return kind in (get_origin(inner), *map(get_origin, get_args(inner)))


def listed(name: str, value: Any) -> list[Any]:
    """What is given where a list is wanted: a single value is a list of one, and a text is no list of letters.

    Raises:
        UserError: something else than texts, paths and numbers.
    """
    given = [value] if isinstance(value, (str, Path, int, float)) else [] if value is None else list(value)
    kinds = (str, Path, int, float) if name == "keep" else (str, Path)
    wrong = [entry for entry in given if not isinstance(entry, kinds)]
    if wrong:
        raise UserError(f"{name} has {wrong[0]!r}, but a list of texts is wanted")
    return [str(entry) if isinstance(entry, Path) else entry for entry in given]


def pairs(flag: str, value: Any) -> Any:
    """What is given where a mapping is wanted: that, or KEY=VALUE, or a list of these. `flag` is its option.

    Raises:
        UserError: a text of another form.
    """
    if value is None or isinstance(value, Mapping):
        return value
    made = {}
    for pair in listed(flag.lstrip("-"), value):
        key, equals, held = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{flag} {pair!r} is not KEY=VALUE")
        made[key] = held
    return made


def _option(name: str, hint: Any, default: Any) -> Option | None:
    if get_origin(hint) is not Annotated:
        return None
    kind, *extras = get_args(hint)
    opt = next((extra for extra in extras if isinstance(extra, Opt)), None)
    if opt is None:
        return None
    return Option(name, kind, opt, opt.default if default is MISSING else default)


def filled(function: F, headers_only: bool = False) -> F:
    """A function that takes a group whole, with the defaults of what is not given, and a signature that names every option.

    A single value (`data="a.jsonl"`, `keep=0.5`) is a list of one where a list is wanted, KEY=VALUE a mapping. Where it has the options of `options.Opening`, its first argument is a model: that of the revision that is asked for, and treated as the
    family `as_type` for as long as the function runs.

    Args:
        headers_only: no weights of the model are needed.

    Raises (when it is called):
        TypeError: an option that neither the function nor the group has, with the one that was meant.
    """
    options = {option.name: option for option in options_of(function)}
    signature = inspect.signature(function)
    own = [name for name, entry in signature.parameters.items() if entry.kind is not entry.VAR_KEYWORD]
    group = {name: option.default for name, option in options.items() if name not in own}
    hints = _hints(function) | {name: option.type for name, option in options.items()}
    readers: dict[str, Callable[[Any], Any]] = {
        name: partial(listed, name) for name, hint in hints.items() if _is(Sequence, hint)
    }
    flags = {name: option.opt.flags[-1] for name, option in options.items() if option.opt.flags}
    readers |= {name: partial(pairs, flags.get(name, name)) for name, hint in hints.items() if _is(Mapping, hint)}

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() - {*own, *group}:
            raise TypeError(str(unknown(f"option of {function.__name__}", name, [*own, *group])))
        bound = signature.bind(*args, **group | kwargs)
        bound.apply_defaults()
        rest = next((name for name, entry in signature.parameters.items() if entry.kind is entry.VAR_KEYWORD), "")
        given = bound.arguments.pop(rest, {})
        values = {**bound.arguments, **given}
        values |= {name: read(values[name]) for name, read in readers.items()}
        check_outputs(options.values(), values)
        if values.get("progress", MISSING) is None:
            values["progress"] = usual()
        if values.get("revision") is not None:
            values[own[0]], values["revision"] = pinned(values[own[0]], values["revision"]), None
        with opened_as(
            values[own[0]] if own else None,
            values.get("as_type"),
            headers_only=headers_only,
            allow_pickle=values.get("allow_pickle", False),
        ):
            return function(**values)

    shown = [entry for entry in signature.parameters.values() if entry.kind is not entry.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=options[name].type)
        for name, default in group.items()
    ]
    run.__signature__ = signature.replace(parameters=[*shown, *more])  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def command_line(name: str, given: Mapping[str, Any]) -> str:
    """The command that gives a verb these options: those that differ from their defaults. An object without a file is shown as <its name>."""
    words = ["expertsmith", name]
    for option in VERBS[name].options:
        value = given.get(option.name, option.default)
        default = option.default if option.opt.cli is MISSING else option.opt.cli
        if option.name == "progress" or value is None or value is MISSING:
            continue
        values = [f"{key}={held}" for key, held in value.items()] if isinstance(value, Mapping) else value
        several = isinstance(values, (list, tuple))
        if (several and not values) or (not option.opt.argument and _plain(value) and value == default):
            continue
        flags = [flag for flag in option.opt.flags if flag.startswith("--")] or [f"--{option.name.replace('_', '-')}"]
        yes, _, no = flags[0].partition("/")
        if isinstance(value, bool):
            words.append(yes if value else no or f"--no-{yes.lstrip('-')}")
            continue
        for entry in values if several else [value]:
            text = str(entry) if _plain(entry) else f"<{option.name}>"
            words += [text] if option.opt.argument else [flags[0], text]
    return shlex.join(words)


def _plain(value: Any) -> bool:
    """Whether a value can be written on a command line."""
    return isinstance(value, (str, Path, int, float, list, tuple))


def out_and(*suffixes: str) -> Callable[[Mapping[str, Any]], list[Path]]:
    """`Verb.keeps` of a verb that works in `<out>.<suffix>`; "" is its output itself."""

    def places(given: Mapping[str, Any]) -> list[Path]:
        out = given.get("out")
        return [] if out is None else [beside(out, suffix) if suffix else Path(out) for suffix in suffixes]

    return places


def verb(
    panel: str,
    *,
    name: str | None = None,
    show: Callable[[Any, Mapping[str, Any]], None],
    plain: Callable[[Any, Mapping[str, Any]], Any] = lambda result, given: result,
    passed: Callable[[Any], bool] = lambda result: True,
    keeps: Callable[[Mapping[str, Any]], list[Path]] = lambda given: [],
    ranks: bool = False,
    headers_only: bool = False,
) -> Callable[[F], F]:
    """Register a function as a command of the command line."""

    def register(function: F) -> F:
        made = filled(function, headers_only)
        title = name or function.__name__
        VERBS[title] = Verb(title, panel, made, show, plain, passed, keeps, ranks, options_of(function))
        return made

    return register
