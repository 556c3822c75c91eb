"""The application, the options that several commands have, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertsmith.errors import UserError

if TYPE_CHECKING:
    from expertsmith.progress import Progress

app = typer.Typer(
    name="expertsmith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Remove the experts that you do not need from a Mixture-of-Experts language model, and prove the result right.

    model + data ─calibrate→ statistics ─plan→ plan.json ─apply→ checkpoint ─verify, evaluate→ report

    Each arrow leaves a file, and every stage reruns alone from the file before it. `compress` does all of it in one go; `demo` shows
    it offline in under a minute.""",
)

FLOW, LOOK, MORE = "The flow", "Look", "More"

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Checkpoint directory, owner/name on the Hugging Face hub, or demo (comes along)."),
]
As = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="MODEL_TYPE",
        help="Treat MODEL as this family, for one that transformers has under another name; all tensors are checked by name and shape.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        help="Branch, tag or commit of MODEL on the hub; owner/name@REV says the same of any model.",
        show_default=False,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="[DOMAIN=]SOURCE[:N]",
        help="Text: .jsonl/.json/.txt/.md/.parquet file, folder, hub data set name\\[subset](split), or demo:code/calib (text that comes with Python). Records hold text, messages, prompt + response, or input_ids. Repeatable.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Where the result goes.")]
Method = Annotated[str, typer.Option("--method", "-m", help="How experts are scored; see `expertsmith methods`.")]
Keep = Annotated[
    str | None,
    typer.Option(
        "--keep",
        "-k",
        help="Routed experts that stay in each layer: a ratio (0.5, 50%) or a count (4). Methods with a threshold of their own do without.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="uniform: every layer keeps the same number; global: the layers share one total; threshold: what the method's own threshold says. Default: the method's usual.",
        show_default=False,
    ),
]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform",
        help="Of a budget that leaves layers different numbers, the nearest plan that stock engines load, and what it costs.",
    ),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-O", metavar="KEY=VALUE", help="Option of the method; repeatable.")
]
Domains = Annotated[list[str] | None, typer.Option("--domain", help="Use only this domain of the statistics; repeatable.")]
Groups = Annotated[
    str,
    typer.Option(
        "--router-groups", help="Group-limited routers: keep drops the same number from each group; flatten sets n_group = 1."
    ),
]
Mtp = Annotated[
    str,
    typer.Option(
        "--mtp",
        help="Multi-token-prediction layers: keep prunes them with the others, for speculative decoding; drop leaves them out.",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Sequences a domain, drawn with --seed.")]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens a sequence at most. Default: 2048, or the model's window if less.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Join texts into full sequences, or one record a sequence. Default: texts are packed, demonstrations are not.",
        show_default=False,
    ),
]
Overlong = Annotated[str, typer.Option(help="A record longer than the window without packing: refuse, truncate or drop.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens that run at once.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.")]
Memory = Annotated[
    str, typer.Option(help="resident: whole model; stream: one decoder layer at a time; auto decides by free memory.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One machine-readable object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Requantise = Annotated[
    bool,
    typer.Option(
        "--requantise",
        help="Write merged or healed weights of a quantised model in its own format, and say what that costs. Default: everything in bfloat16.",
    ),
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read a pickle-only checkpoint (with weights_only).")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Complete what an interrupted run left, or start again.")]
EvalData = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-data",
        "-e",
        metavar="[DOMAIN=]SOURCE[:N]",
        help="Held-out text to measure the loss of quality on; repeatable. Without it the calibration text is used.",
    ),
]
Stats = Annotated[Path | None, typer.Option("--stats", "-s", help="Statistics folder made by `expertsmith calibrate`.")]


def options_of(pairs: list[str] | None) -> dict[str, str]:
    """KEY=VALUE pairs as a dictionary."""
    values = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"-O {pair!r} is not KEY=VALUE")
        values[key] = value
    return values


def word(value: str, option: str, *allowed: str) -> Any:
    """A value that has to be one of a few words."""
    if value not in allowed:
        raise UserError(f"--{option} is {value!r}", f"choose {' or '.join(allowed)}")
    return value


def progress_of(quiet: bool) -> Progress:
    """Bars on stderr, or nothing."""
    from expertsmith.progress import Bar, Silent

    return Silent() if quiet else Bar()
