"""The options that several verbs have, each defined once, and the groups in which they are handed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict

from expertsmith.verbs.definition import Opt
from expertsmith.views.progress import Progress

if TYPE_CHECKING:
    from expertsmith.calibration.stats import Statistics
    from expertsmith.experts.inventory import Inventory
    from expertsmith.planning.plan import Plan
else:  # named in annotations only, which must not import what runs models
    Statistics: TypeAlias = Any
    Inventory: TypeAlias = Any
    Plan: TypeAlias = Any

Ratio: TypeAlias = float | int | str
CHOICE, TEXT, MACHINE, JOB = "Choice of experts", "Text", "Model and machine", "Job and output"  # panels of the help
SPECS = "[DOMAIN=]SOURCE[#PART][:N]"

Model = Annotated[
    str | Path | Inventory,
    Opt(
        "Checkpoint directory, owner/name on the Hugging Face hub, or demo (comes with the package).",
        argument=True,
        metavar="MODEL",
        kind=str,
    ),
]
Named = Annotated[  # where the verb opens it itself
    str | Path,
    Opt(
        "Checkpoint directory, owner/name on the Hugging Face hub, or demo (comes with the package).",
        argument=True,
        metavar="MODEL",
        kind=str,
    ),
]
Out = Annotated[str | Path, Opt("Output folder.", "--out", "-o", metavar="OUT", kind=Path, writes="folder")]
Into = Annotated[  # a folder that an interrupted run goes on in
    str | Path, Opt("Output folder.", "--out", "-o", metavar="OUT", kind=Path, writes="into")
]
Data = Annotated[
    Sequence[str],
    Opt(
        "Text: .jsonl/.json/.csv/.txt/.md/.parquet file (also .gz, .zst), folder, hub data set name\\[subset](split), or demo:code/calib (text of the Python package). Records: text, messages, prompt + response or completion, ShareGPT, Alpaca, question + answer, or input_ids. SOURCE#heldout is every eighth record, SOURCE#calib the others. Repeatable.",
        "--data",
        "-d",
        metavar=SPECS,
    ),
]
Columns = Annotated[
    Mapping[str, str] | None,
    Opt(
        "The column of the data that a field is in, where it has another name: text=body. Repeatable.",
        "--columns",
        metavar="FIELD=COLUMN",
        default=None,
        shown=False,
        panel=TEXT,
    ),
]
EvalData = Annotated[
    Sequence[str],
    Opt(
        "Held-out text to measure quality on. Default: the calibration text. Repeatable.",
        "--eval-data",
        "-e",
        metavar=SPECS,
    ),
]
Keep = Annotated[
    Ratio | None,
    Opt(
        "Routed experts to keep in each layer: a ratio (0.5, 50%) or a count (4). Optional for methods with a built-in threshold.",
        "--keep",
        "-k",
        kind=str,
    ),
]
Fit = Annotated[
    str | None,
    Opt(
        "Instead of --keep: as many experts as fit into this memory, with weights as stored and KV cache: 24GB, 80GiB, or the share of it that an engine uses: vllm:24GB, sglang:24GB.",
        "--fit",
        metavar="SIZE",
    ),
]
Context = Annotated[
    int | None,
    Opt(
        "With --fit: tokens of KV cache; 0 counts the weights only. Default: 32768, or the model's window if less.",
        "--context",
        metavar="TOKENS",
        least=0,
        shown=False,
        panel=CHOICE,
    ),
]
Stats = Annotated[
    str | Path | Statistics | None,
    Opt("Statistics folder made by `expertsmith calibrate`.", "--stats", "-s", kind=Path, panel=CHOICE),
]
Domains = Annotated[Sequence[str], Opt("Use only this domain of the statistics. Repeatable.", "--domain", panel=CHOICE)]
Progressive = Annotated[
    bool,
    Opt(
        "Layer by layer: take the statistics of a layer on inputs that the layers already chosen make. They then hold for this method and --keep only.",
        "--progressive",
        panel=CHOICE,
    ),
]
Budget = Annotated[
    str | None,
    Opt(
        "uniform: every layer keeps the same number; global: the layers share one total; threshold: the method's own; sensitivity, esap: searched on --data, with the uniform total. Default: the method's usual.",
        shown=False,
        panel=CHOICE,
    ),
]
Uniform = Annotated[
    bool, Opt("Round to the same number of experts in every layer, and report the cost.", "--uniform", panel=CHOICE)
]
Options = Annotated[
    Mapping[str, Any] | None, Opt("Option of the method. Repeatable.", "--option", "-O", metavar="KEY=VALUE", panel=CHOICE)
]
Groups = Annotated[
    Literal["keep", "flatten"],
    Opt(
        "Routers with expert groups: keep drops the same number from each group; flatten sets n_group = 1.",
        "--router-groups",
        panel=CHOICE,
    ),
]
Mtp = Annotated[
    Literal["keep", "drop"],
    Opt(
        "Multi-token-prediction layers: keep prunes them like the others, for speculative decoding; drop leaves them out.",
        "--mtp",
        panel=CHOICE,
    ),
]
Measure = Annotated[bool, Opt("Measure quality at the end.", "--measure/--no-measure")]
Resume = Annotated[bool, Opt("Resume an interrupted run, or start over.", "--resume/--fresh", panel=JOB)]
Overwrite = Annotated[bool, Opt("Replace an existing output.", "--overwrite", panel=JOB)]
Push = Annotated[
    str | None,
    Opt(
        "Then upload the result to the hub as this private repository (owner/name).",
        "--push",
        metavar="OWNER/NAME",
        shown=False,
        panel=JOB,
    ),
]
Track = Annotated[
    str | None,
    Opt(
        "Log losses and held-out errors to tensorboard, wandb or trackio, which has to be installed. tensorboard writes to runs/.",
        "--track",
        metavar="TRACKER",
        panel=JOB,
    ),
]
Requantise = Annotated[
    bool,
    Opt(
        "Write merged or healed weights of a quantised model in its own format, and report the cost. Default: all weights in bfloat16.",
        "--requantise",
    ),
]
PlanGiven: TypeAlias = str | Path | Plan
PlanFile = Annotated[PlanGiven, Opt("plan.json", argument=True, metavar="PLAN", kind=Path)]
BatchTokens = Annotated[int, Opt("Tokens per batch.", least=1, panel=TEXT)]
SeqLen = Annotated[
    int | None,
    Opt("Longest sequence in tokens. Default: 2048, or the model's window if less.", shown=False, least=2, panel=TEXT),
]
Pack = Annotated[
    bool | None,
    Opt(
        "Join texts into full sequences, or one record per sequence. Default: texts are packed, demonstrations are not.",
        "--pack/--no-pack",
        default=None,
        shown=False,
        panel=TEXT,
    ),
]
Dtype = Annotated[str, Opt("auto (as stored), float32 or bfloat16.", panel=MACHINE)]


class Report(TypedDict, total=False):
    """Where progress goes: on the command line to stderr, unless --quiet."""

    progress: Annotated[Progress, Opt("", default=None)]


class Opening(TypedDict, total=False):
    """How a model is opened."""

    as_type: Annotated[
        str | None,
        Opt(
            "Treat MODEL as this family, if transformers has it under another name. Names and shapes of all tensors are checked.",
            "--as",
            metavar="MODEL_TYPE",
            default=None,
            shown=False,
            panel=MACHINE,
        ),
    ]
    revision: Annotated[
        str | None,
        Opt(
            "Branch, tag or commit of MODEL on the hub; owner/name@REV works too.",
            "--revision",
            metavar="REV",
            default=None,
            shown=False,
            panel=MACHINE,
        ),
    ]
    allow_pickle: Annotated[
        bool, Opt("Read a pickle-only checkpoint (with weights_only).", "--allow-pickle", default=False, panel=MACHINE)
    ]


class Placing(TypedDict, total=False):
    """Where a model is."""

    device: Annotated[str, Opt("auto, cpu, cuda or cuda:0.", default="auto", panel=MACHINE)]
    memory: Annotated[
        str,
        Opt("resident: whole model; stream: one decoder layer at a time; auto: by free memory.", default="auto", panel=MACHINE),
    ]


class Running(Placing, total=False):
    """How a model is run."""

    dtype: Annotated[str, Opt("auto (as stored), float32 or bfloat16.", default="auto", panel=MACHINE)]


class Drawing(TypedDict, total=False):
    """How many texts are drawn, and how long they are."""

    samples: Annotated[int, Opt("Sequences per domain, drawn with --seed.", least=1, default=128, panel=TEXT)]
    seq_len: Annotated[
        int | None,
        Opt(
            "Longest sequence in tokens. Default: 2048, or the model's window if less.",
            least=2,
            default=None,
            shown=False,
            panel=TEXT,
        ),
    ]
    seed: Annotated[int, Opt("Seed of the sampling.", default=42, panel=TEXT)]
    columns: Columns


class Text(Drawing, total=False):
    """How text becomes sequences and batches."""

    pack: Pack
    overlong: Annotated[
        Literal["refuse", "truncate", "drop"],
        Opt("A record longer than the window, without packing: refuse, truncate or drop.", default="refuse", panel=TEXT),
    ]
    batch_tokens: Annotated[
        int | None, Opt("Tokens per batch. Default: 8192; fewer on a CPU.", least=1, default=None, panel=TEXT)
    ]


class Calibration(Text, Running, total=False):
    """One pass of a model over text."""

    resume: Annotated[bool, Opt("Resume an interrupted run, or start over.", "--resume/--fresh", default=True, panel=JOB)]


class Calibrating(Calibration, Opening, Report, total=False):
    """`Calibration` of a model that the verb opens."""


class Opened(Opening, Report, total=False):
    """A model that is opened and not run."""


def part(group: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `given` that belongs to a group, to pass it on."""
    return {name: given[name] for name in group.__annotations__ if name in given}
