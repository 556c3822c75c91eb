"""`evaluate`: what a model is worth next to its original: quality, tasks, texts, speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, Unpack

from expertsmith.calibration.opening import token_data
from expertsmith.checkpoint import Checkpoint, open_checkpoint, pinned
from expertsmith.errors import UserError
from expertsmith.ranks import current, refuse_several
from expertsmith.verbs.definition import FLOW, Opt, filled, out_and, verb
from expertsmith.verbs.lint import lint
from expertsmith.verbs.options import BatchTokens, Data, Drawing, Named, Opened, Resume, Running, part
from expertsmith.views import show
from expertsmith.views.progress import Progress, Silent

if TYPE_CHECKING:
    from expertsmith.evaluation.quality import Quality

Reference = Annotated[
    str | Path | None,
    Opt("The original model: adds KL divergence, top-1 agreement and ESAP.", "--reference", "-r", kind=str),
]
Tasks = Annotated[
    Sequence[str], Opt("lm-eval tasks or groups. Repeatable. Needs the extra eval.", "--tasks", metavar="NAME,…", shown=False)
]
TaskPath = Annotated[
    Sequence[str | Path],
    Opt(
        "Folder of lm-eval task yamls, with data files next to them. Runs Python code that a yaml refers to. Repeatable.",
        kind=Path,
        shown=False,
    ),
]
Limit = Annotated[int | None, Opt("Maximum number of documents per task.", least=1, shown=False)]


Answers = Annotated[
    str | Path | None,
    Opt(
        "Save the answers of every finished task here, and resume from them.",
        "--out",
        "-o",
        kind=Path,
        shown=False,
        writes="into",
    ),
]

ReportFile = Annotated[
    str | Path | None,
    Opt("Also write the result as one HTML page.", "--report", metavar="FILE", kind=Path, writes="file"),
]
ReplaceReport = Annotated[bool, Opt("Replace an existing report.", "--overwrite")]


class Judging(Drawing, Running, Opened, total=False):
    """A model that is measured on text."""


class Serving(TypedDict, total=False):
    """How speed is measured: the fields of `evaluation.serving.Setting`."""

    engine: Annotated[str, Opt("With --speed: transformers, vllm or llama.cpp.", default="transformers")]
    python: Annotated[
        str | Path | None,
        Opt(
            "Python of the engine's environment. Default: $EXPERTSMITH_VLLM or $EXPERTSMITH_LLAMA; for transformers this one.",
            "--engine-python",
            kind=Path,
            default=None,
            shown=False,
        ),
    ]
    converter: Annotated[
        str | Path | None,
        Opt(
            "llama.cpp's convert_hf_to_gguf.py, unless the models are .gguf files. Default: $EXPERTSMITH_LLAMA_CONVERTER.",
            "--gguf-converter",
            kind=Path,
            default=None,
            shown=False,
        ),
    ]
    batch: Annotated[int, Opt("With --speed: batch size in prompts.", least=1, default=1)]
    prompt_len: Annotated[int, Opt("With --speed: tokens per prompt.", least=1, default=128)]
    new_tokens: Annotated[int, Opt("With --speed: new tokens per prompt.", least=2, default=32)]
    rounds: Annotated[int, Opt("With --speed: rounds; the models alternate, and medians are shown.", least=1, default=5)]
    energy: Annotated[bool, Opt("With --speed: watt hours, by codecarbon.", "--energy", default=False)]


class JudgingAndServing(Judging, Serving, total=False):
    """Both."""


@filled
def evaluate(
    model: Named,
    data: Data = (),
    *,
    reference: Reference = None,
    tasks: Tasks = (),
    task_path: TaskPath = (),
    limit: Limit = None,
    generate: int = 0,
    formats: Sequence[str] = (),
    out: Answers = None,
    resume: Resume = True,
    report: ReportFile = None,
    overwrite: ReplaceReport = False,
    batch_tokens: BatchTokens = 4096,
    **given: Unpack[Judging],
) -> Quality:
    """Perplexity by domain on held-out text; against a reference also KL divergence, top-1 agreement and ESAP. And, as far as asked, lm-eval
    tasks, and what the model writes when it goes on from prompts of the data.

    Documents are packed into windows that overlap by one token, so that each token is predicted once. Skip thresholds of a checkpoint are in
    force. Tasks and generation have both models do the same, one in memory at a time.

    Args:
        tasks: lm-eval tasks or groups, several in one string with commas (extra `eval`).
        task_path: folders of further task yamls; a yaml may name Python functions, which are run.
        limit: documents a task at most.
        generate: new tokens of greedy runs from prompts of `data`; 0: none.
        formats: `[DOMAIN=]REGEX` that an answer is to match, for data with prompt and response.
        out: a folder that keeps the answers to every finished task, so that a further run (`resume`) goes on from there.
        report: an HTML page of the result, written at the end; `overwrite` replaces one that exists.

    Raises:
        UserError: nothing to measure, lm-eval or a task's data missing, unknown tasks, models of different vocabularies.
    """
    asked = {name: value for name, value in locals().items() if name != "given"} | given
    from expertsmith.comparison.judging import asking
    from expertsmith.evaluation.quality import Quality

    begin = time.perf_counter()
    progress = given["progress"]
    if not data and not tasks:
        raise UserError("nothing to measure", "pass --data FILE for text, or --tasks NAME for lm-eval tasks")
    if (generate or formats) and not (data and generate):
        missing = "--data FILE" if not data else "--generate N"
        raise UserError("--generate needs --data, and --format needs both", f"pass {missing}")
    if tasks or generate:
        refuse_several("evaluate --tasks" if tasks else "evaluate --generate")
    opened = [
        open_checkpoint(path, allow_pickle=given["allow_pickle"])
        for path in ([model] if reference is None else [model, reference])
    ]
    ask = asking(
        opened,
        (tasks, task_path, limit),
        (data if generate else (), generate, formats, {key: given[key] for key in ("samples", "seed", "columns")}),
        part(Running, given),
        {"batch_tokens": batch_tokens, "folder": None if out is None else Path(out), "resume": resume, "progress": progress},
    )
    quality = _of_text(opened, data, batch_tokens, given) if data else Quality()
    quality.more = ask()
    if report is not None and current().first:
        _write_report(report, quality.to_json(), asked, time.perf_counter() - begin)
    return quality


def _of_text(opened: Sequence[Checkpoint], data: Sequence[str], batch_tokens: int, given: Mapping[str, Any]) -> Quality:
    """The quality of the first model on text, next to the second if there is one; no model is in memory afterwards."""
    from expertsmith.arch import record_of
    from expertsmith.engine.devices import choose_device, choose_memory
    from expertsmith.engine.loading import load_model
    from expertsmith.evaluation.quality import measure
    from expertsmith.surgery.mask import in_force

    tokens = token_data(
        opened[0].path,
        opened[0].config,
        data,
        given["progress"],
        **part(Drawing, given),
        pack=True,
        overlong="truncate",
        batch_tokens=batch_tokens,
        overlap=1,
    )
    ranks = current()
    ranks.agree("model or text", lambda: ([entry.fingerprint for entry in opened], tokens.fingerprint))
    where = choose_device(given["device"])
    mode = choose_memory(given["memory"], opened, where, given["dtype"], ranks)
    loaded = [load_model(entry, record_of(entry.config), memory=mode, device=where, dtype=given["dtype"]) for entry in opened]
    with ExitStack() as stack:
        for entry in loaded:
            stack.enter_context(in_force(entry))
        other = loaded[1] if len(loaded) > 1 else None
        return measure(loaded[0], tokens.batches(batch_tokens), other, given["progress"], ranks)


def _write_report(file: str | Path, found: Mapping[str, Any], asked: Mapping[str, Any], seconds: float) -> None:
    """Write what was found as a page. `asked`: the options of `evaluate`."""
    from expertsmith.verbs.made import how_made
    from expertsmith.views.pages import evaluation, sheet

    model, reference = str(asked["model"]), asked["reference"]
    made = how_made("evaluate", asked, {"in all": seconds})
    sheet.write(Path(file), evaluation.page(found, model, None if reference is None else str(reference), made))


def speed(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    **setting: Any,
) -> dict[str, Any]:
    """Prefill and decode tokens a second, time to first token, peak memory and weight bytes of a model in an engine, and of a reference in
    turns with it in one run; medians over the rounds and ratios, see `evaluation.serving.compare`.

    Args:
        model, reference: checkpoints; for llama.cpp also GGUF files.
        setting: the fields of `evaluation.serving.Setting`: engine ("transformers", "vllm" or "llama.cpp"), python (of the engine's
            environment), converter (to GGUF), batch, prompt_len, new_tokens, rounds, energy, device, dtype.

    Raises:
        UserError: an engine that is not installed, or that refuses a model: in its own words, then what `lint` knows.
    """
    from expertsmith.evaluation.engines import RefusedError
    from expertsmith.evaluation.serving import Setting, compare

    model = pinned(model, revision)
    models = {"model": model} if reference is None else {"reference": reference, "model": model}
    chosen = Setting(**setting)
    try:
        return compare(models, chosen, progress or Silent())
    except RefusedError as refused:
        raise UserError(
            f"{chosen.engine} refuses {refused.model}:\n{refused.words}\n", _against(refused.model, chosen.engine)
        ) from refused


def _against(model: str, engine: str) -> str:
    """What `lint` knows against a model in an engine."""
    try:
        found = [finding for finding in lint(model, engine=engine) if finding.level != "info"]
    except UserError as error:
        return f"lint could not check it ({error.message})"
    return "\n".join(f"lint {entry.rule.id}: {entry.message}; {entry.remedy}" for entry in found) or "lint has no rule for this"


def _show(found: Any, given: Mapping[str, Any]) -> None:
    if "speed" in found:
        show.show_speed(found["speed"])
    if "mean" in found or "tasks" in found or "generation" in found:
        show.show_evaluation({key: value for key, value in found.items() if key != "speed"}, given["model"])
    if given["report"] is not None:
        show.line(f"[bold]{show.escape(str(given['report']))}[/bold]")


@verb(
    FLOW,
    name="evaluate",
    show=_show,
    plain=lambda found, given: {"model": given["model"], "reference": given["reference"], **found},
    keeps=out_and(""),
    ranks=True,
)
def _evaluate(
    model: Named,
    data: Data = (),
    *,
    reference: Reference = None,
    tasks: Tasks = (),
    task_path: TaskPath = (),
    limit: Limit = None,
    generate: Annotated[
        int,
        Opt("Also continue prompts of --data greedily for N tokens: repetition, loops, answer format.", metavar="N", least=0),
    ] = 0,
    formats: Annotated[
        Sequence[str],
        Opt(
            "With --generate and prompt + response data: the pattern that an answer must match. Repeatable.",
            "--format",
            metavar="[DOMAIN=]REGEX",
            shown=False,
        ),
    ] = (),
    out: Answers = None,
    resume: Resume = True,
    report: ReportFile = None,
    overwrite: ReplaceReport = False,
    batch_tokens: BatchTokens = 4096,
    speed: Annotated[
        bool, Opt("Measure speed and memory in an engine, alternating with the reference; --data is then optional.", "--speed")
    ] = False,
    **given: Unpack[JudgingAndServing],
) -> dict[str, Any]:
    """Measure perplexity by domain on held-out text, lm-eval tasks, and generated text, next to a reference; with --speed also the speed of both.

    Differences in tasks and texts come with the standard error of the paired differences, document by document. Perplexity is
    data-parallel: torchrun --nproc-per-node N -m expertsmith evaluate … --data …

    [dim]expertsmith evaluate mixtral-half -r mistralai/Mixtral-8x7B-v0.1 --tasks hellaswag,arc_easy --limit 200[/dim]

    [dim]expertsmith evaluate mixtral-half -r mistralai/Mixtral-8x7B-v0.1 --speed --engine vllm --batch 8[/dim]
    """
    asked = {name: value for name, value in locals().items() if name != "given"} | given
    begin = time.perf_counter()
    found: dict[str, Any] = {}
    if speed and given["as_type"] is not None:
        raise UserError("--as has no effect with --speed, because engines load the checkpoint themselves", "leave one out")
    if speed:
        refuse_several("evaluate --speed")
        where = {"device": given["device"], "dtype": given["dtype"], "progress": given["progress"]}
        found["speed"] = measure_speed(model, reference=reference, **part(Serving, given), **where)  # type: ignore[arg-type]
    if data or tasks or not speed:
        quality = evaluate(
            model,
            data,
            reference=reference,
            tasks=tasks,
            task_path=task_path,
            limit=limit,
            generate=generate,
            formats=formats,
            out=out,
            resume=resume,
            batch_tokens=batch_tokens,
            **part(Judging, given),
        )
        found |= quality.to_json()
    if report is not None and current().first:
        _write_report(report, found, asked, time.perf_counter() - begin)
    return found


measure_speed = speed  # `_evaluate` has a parameter of that name
