"""The verbs of expertsmith as functions. Models are paths or hub ids; statistics and plans are paths or loaded objects. `revision` is the
branch, tag or commit of a model on the hub; any hub id may also be written `owner/name@REVISION`. `as_type`: see `_treating`.

    calibrate → statistics → plan → apply → checkpoint → verify, evaluate

Importing this module is quick: torch and transformers are imported by the functions that run a model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from expertsmith.arch import refuse_without_class
from expertsmith.checkpoint import open_checkpoint, pinned
from expertsmith.errors import UserError
from expertsmith.inventory import Inventory, take_inventory
from expertsmith.opening import beside, open_model, opened_as, token_data, window_of
from expertsmith.plan import Plan, load_plan
from expertsmith.progress import Progress, Silent, timed
from expertsmith.registry import unknown
from expertsmith.selection import Rules, keep_count, parse_keep

if TYPE_CHECKING:
    from expertsmith.calibration.stats import Statistics
    from expertsmith.evaluation.quality import Quality
    from expertsmith.lint import Finding
    from expertsmith.methods.base import Budget, Method
    from expertsmith.surgery.verify import Verdict

Verb = TypeVar("Verb", bound=Callable[..., Any])
Keep = float | int | str
RATIOS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


def _treating(headers_only: bool = False) -> Callable[[Verb], Verb]:
    """Every verb with `as_type`: while it runs, the family that MODEL and all checkpoints of its model_type are treated as, which has to have
    their tensors by name and shape. It is transformers' own name of the family where config.json has another."""

    def wrap(verb: Verb) -> Verb:
        @wraps(verb)
        def run(model: Any, *args: Any, **kwargs: Any) -> Any:
            opening = {key: kwargs[key] for key in ("allow_pickle", "revision") if key in kwargs}
            with opened_as(model, kwargs.get("as_type"), headers_only=headers_only, **opening):
                return verb(model, *args, **kwargs)

        return cast(Verb, run)

    return wrap


@_treating(headers_only=True)
def inspect(
    model: str | Path, *, revision: str | None = None, as_type: str | None = None, allow_pickle: bool = False
) -> dict[str, Any]:
    """What a checkpoint is and what each keep ratio would leave, from its config and headers only (no weight is read).

    Raises:
        UserError: not a checkpoint of a supported MoE family, or a damaged one.
    """
    inventory = take_inventory(
        open_checkpoint(model, headers_only=True, allow_pickle=allow_pickle, revision=revision), undecodable=True
    )
    record, rules = inventory.architecture, inventory.rules
    quantisation, weights = _quantisation(inventory)
    parameters, nbytes = weights.size()[0], inventory.size()[1]
    ratios: list[dict[str, float]] = []
    for ratio in RATIOS:
        with suppress(UserError):  # a ratio below what the router needs is left out
            counts = {layer: keep_count(ratio, inventory.rules_of(layer)) for layer in inventory.layers}
            counts |= dict.fromkeys(inventory.mtp_layers, max(counts.values()))
            after = weights.size(counts)[0], inventory.size(counts)[1]
            if after[1] != nbytes and not any(row["bytes"] == after[1] for row in ratios):
                ratios.append(
                    {
                        "keep": ratio,
                        "experts": max(counts.values()),
                        "fewest_experts": min(counts.values()),
                        "parameters": after[0],
                        "bytes": after[1],
                        "bytes_ratio": after[1] / nbytes,
                    }
                )
    groups = None if rules.groups == 1 else {"groups": rules.groups, "top_groups": rules.top_groups}
    return {
        "model": str(model),
        "family": record.title,
        "model_type": record.model_type,
        "status": record.status,
        "notes": record.notes,
        "layers": inventory.num_layers,
        "moe_layers": inventory.layers,
        "multi_token_prediction": _mtp(inventory),
        "num_experts": inventory.num_experts,
        "experts_by_layer": inventory.counts,
        "top_k": inventory.top_k,
        "shared_experts": _shared(inventory),
        "router": {"score": record.score, "selection_bias": bool(record.selection_bias), "expert_groups": groups},
        "least_experts": rules.least,
        "parameters": {
            "total": parameters,
            "active": weights.active_parameters,
            "routed_experts": weights.routed_parameters,
        },
        "quantisation": quantisation,
        "bytes": nbytes,
        "tensors": len(inventory.checkpoint.tensors),
        "keep_ratios": ratios,
    }


def _mtp(inventory: Inventory) -> dict[str, Any] | None:
    """Multi-token prediction: its layers with experts, and its bytes; None where there is none."""
    held = [claim for claim in inventory.claims if claim.mtp]
    if not held:
        return None
    return {"moe_layers": inventory.mtp_layers, "bytes": sum(claim.info.nbytes for claim in held)}


def _quantisation(inventory: Inventory) -> tuple[dict[str, str | None] | None, Inventory]:
    """(formats and, where they are not all known, why; None for an unquantised checkpoint), and the inventory that counts weights: of the
    float weights, or of what stands there where it cannot be decoded."""
    from expertsmith.checkpoint.floats import quantisation_config, quantisation_of

    try:
        found = quantisation_of(inventory.checkpoint)
    except UserError as error:
        method = quantisation_config(inventory.checkpoint).get("quant_method")
        return {"formats": f"quant_method {method}" if method else "unknown", "cannot_be_decoded": str(error)}, inventory
    if found is None:
        return None, inventory
    return {"formats": found.title, "cannot_be_decoded": None}, inventory.floats


def _shared(inventory: Inventory) -> int | None:
    """Shared experts: their number where the config counts them, else 1 where the family has one."""
    from expertsmith.arch import config_get

    record = inventory.architecture
    if record.shared_key:
        value = config_get(inventory.config, record.shared_key)
        if isinstance(value, list):  # one number a layer
            value = max((number for number in value if isinstance(number, int)), default=0)
        return int(value) if isinstance(value, int) else 0
    return 1 if record.shared else 0


@_treating(headers_only=True)
def lint(
    model: str | Path,
    *,
    engine: str | None = None,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    as_type: str | None = None,
    revision: str | None = None,
) -> list[Finding]:
    """Whether serving engines will take this checkpoint's expert count, router and groups; from config and headers only."""
    from expertsmith.lint import lint as find

    inventory = take_inventory(open_checkpoint(model, headers_only=True, revision=revision), undecodable=True)
    return find(inventory, engine, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel)


@_treating()
def calibrate(
    model: str | Path,
    data: Sequence[str],
    out: str | Path,
    *,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 42,
    pack: bool | None = None,
    overlong: Literal["refuse", "truncate", "drop"] = "refuse",
    batch_tokens: int = 8192,
    output_sum: bool = False,
    all_outputs: bool = False,
    sample_tokens: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    resume: bool = True,
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """One pass over the data → a folder with the statistics of every criterion, by layer and domain.

    Args:
        data: `[DOMAIN=]SOURCE[:N]` each.
        samples: sequences a domain, drawn with `seed`.
        seq_len: tokens a sequence at most; None: 2048 or the model's window, whichever is less.
        pack: join texts into full sequences; None: texts yes, demonstrations (messages, prompt + response) no.
        output_sum: also sum the raw outputs of every expert over the tokens routed to it.
        all_outputs: also sum them over all tokens: every expert runs on every token (needed by hc_smoe).
        sample_tokens: also keep the block's inputs and outputs of this many tokens a domain.
        memory: "resident", "stream" (one decoder layer at a time) or "auto".
        resume: complete a folder that an interrupted run left; otherwise start again.
    """
    from expertsmith.calibration.observers import Extras
    from expertsmith.calibration.runner import collect

    model = pinned(model, revision)
    progress = progress or Silent()
    inventory = take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    tokens = token_data(
        inventory.checkpoint.path,
        inventory.checkpoint.config,
        data,
        progress,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=pack,
        overlong=overlong,
        batch_tokens=batch_tokens,
    )
    loaded = open_model(inventory, progress, device=device, dtype=dtype, memory=memory, mtp=True)
    extras = Extras(output_sum, all_outputs, sample_tokens, seed)
    return collect(loaded, tokens, Path(out), batch_tokens=batch_tokens, extras=extras, resume=resume, progress=progress)


@_treating()
def plan(
    model: str | Path | Inventory,
    method: str,
    keep: Keep | None = None,
    *,
    stats: str | Path | Statistics | None = None,
    data: Sequence[str] = (),
    domains: Sequence[str] = (),
    budget: str | None = None,
    uniform: bool = False,
    options: Mapping[str, Any] | None = None,
    router_groups: Literal["keep", "flatten"] = "keep",
    mtp: Literal["keep", "drop"] = "keep",
    out: str | Path | None = None,
    work: str | Path | None = None,
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    **calibration: Any,
) -> Plan:
    """Choose which experts stay, and which are merged.

    Args:
        keep: a ratio (0.5, "50%") or a count (4, "4"); None for methods with a threshold of their own.
        stats: statistics of `calibrate`; without them `data` is calibrated first (into `<out>.stats`).
        domains: use only these domains of the statistics.
        budget: "uniform" (every layer alike), "global" (the layers share one total) or "threshold" (the method's own); None: the method's usual.
        uniform: of a budget that leaves layers different numbers, make the nearest plan with one number, and note what that costs.
        options: the method's own options, see `expertsmith methods`.
        router_groups: "keep" drops the same number from every expert_group; "flatten" gives up the groups (n_group = 1).
        mtp: "keep" prunes multi-token-prediction layers with the others, to the same number of experts; "drop" leaves them out.
        work: folder for what is costly to compute again (measured weights, finished searches); default `<out>.measured`.
        calibration: options of `calibrate`, used with `data`.

    Raises:
        UserError: unknown method or option, a keep that the router cannot work with, statistics of another model.
    """
    from expertsmith import planning

    model = pinned(model, revision)
    progress = progress or Silent()
    inventory = model if isinstance(model, Inventory) else take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    chosen, values, share, chosen_budget, rules = _request(inventory, method, keep, budget, options, router_groups)
    if domains and (chosen.reads == "model" or chosen.data_free):
        raise UserError(f"method {method} reads no statistics, of which --domain could choose", "leave --domain out")
    place = None if work is None and out is None else Path(work) if work is not None else beside(out or "", "measured")
    job = planning.Job(inventory, chosen, values, share, chosen_budget, rules, progress, work=place)
    job.mtp = mtp
    job.batch_tokens = calibration.get("batch_tokens", job.batch_tokens)
    job.resume = calibration.get("resume", True)
    if chosen.reads == "model":
        if not data:
            raise UserError(f"method {method} runs the model on text", "pass --data FILE")
        job.open = partial(_model_and_tokens, inventory, data, progress, calibration, router_groups)
    elif not chosen.data_free:
        if stats is None:
            if not data:
                raise UserError(
                    f"method {method} needs calibration", "pass --stats STATS (made by `expertsmith calibrate`) or --data FILE"
                )
            stats = calibrate(
                inventory.checkpoint.source,
                data,
                beside(out or "plan.json", "stats"),
                all_outputs=chosen.all_outputs,
                progress=progress,
                allow_pickle=allow_pickle,
                **calibration,
            )
        job.statistics = planning.statistics_for(inventory, chosen, stats, domains)
    made = planning.make_plan(job, router_groups, uniform, {"domains": list(domains)} if domains else {})
    if out is not None:
        made.save(out)
    return made


@_treating()
def plan_from(
    model: str | Path | Inventory,
    file: str | Path,
    keep: Keep | None = None,
    *,
    router_groups: Literal["keep", "flatten"] = "keep",
    mtp: Literal["keep", "drop"] = "keep",
    out: str | Path | None = None,
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Plan:
    """A plan from another tool's choice of experts: ordered lists (with `keep`), masks or retained experts; see `interchange`.

    Raises:
        UserError: a file that fits none of the formats, or not this model.
    """
    from expertsmith import interchange
    from expertsmith.surgery.apply import check_plan

    model = pinned(model, revision)
    inventory = model if isinstance(model, Inventory) else take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    made = interchange.plan_from(file, inventory, keep, router_groups, mtp)
    check_plan(made, inventory)
    if out is not None:
        made.save(out)
    return made


def export(plan: str | Path | Plan, format: str, out: str | Path) -> None:
    """Write a plan's choice in a format of other tools: "ordered" (JSONL), "mask" or "retained" (JSON).

    Raises:
        UserError: an unknown format, or a plan that says more than the format holds.
    """
    from expertsmith.interchange import export as text_of

    text = text_of(plan if isinstance(plan, Plan) else load_plan(plan), format)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(text, encoding="utf-8")


def _request(
    inventory: Inventory,
    method: str,
    keep: Keep | None,
    budget: str | None,
    options: Mapping[str, Any] | None,
    router_groups: str,
) -> tuple[Method, dict[str, Any], float | int | None, Budget, dict[int, Rules]]:
    """Everything that was asked for, checked before anything is computed."""
    from expertsmith import methods as registered
    from expertsmith import planning
    from expertsmith.surgery.uneven import refuse_padded

    chosen = registered.find(method)
    values = chosen.parse_options(options or {})
    share = None if keep is None else parse_keep(keep)
    refuse_padded(inventory)
    chosen_budget = planning.choose_budget(chosen, budget, share)
    rules = planning.rules_of(inventory, router_groups)
    if share is not None:
        where = inventory.checkpoint.source
        for layer, entry in rules.items():
            keep_count(share, entry, where if len(set(rules.values())) == 1 else f"decoder layer {layer} of {where}")
    return chosen, values, share, chosen_budget, rules


def _model_and_tokens(
    inventory: Inventory, data: Sequence[str], progress: Progress, options: Mapping[str, Any], router_groups: str
) -> Any:
    """(model, token data) for a method that runs the model; `options` are those of `calibrate`."""
    where = {key: options[key] for key in ("device", "dtype", "memory") if key in options}
    rest = {
        key: value
        for key, value in options.items()
        if key not in (*where, "resume", "output_sum", "all_outputs", "sample_tokens")
    }
    source = inventory.checkpoint
    tokens = token_data(source.path, source.config, data, progress, **rest)
    return open_model(inventory, progress, router_groups=router_groups, **where), tokens


@_treating()
def apply(
    model: str | Path | Inventory,
    plan: str | Path | Plan,
    out: str | Path,
    *,
    pad: bool = False,
    requantise: bool = False,
    overwrite: bool = False,
    check_values: bool = True,
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write the checkpoint that the plan describes, tensor by tensor; the model is never loaded. Returns notes.

    Layers that keep different numbers of experts are written with `per_layer_config`, for `load` or transformers with remote code.

    Args:
        pad: instead, fill such layers up with experts that are never selected, so that stock classes load the result.
        requantise: quantise merged experts of a quantised source again, in its own format; otherwise a merge writes everything in bfloat16.

    Raises:
        UserError: the plan is for another model or breaks a rule, the output exists, the disk is full, NaN in a kept tensor.
    """
    from expertsmith.surgery.apply import apply_plan

    loaded = plan if isinstance(plan, Plan) else load_plan(plan)
    model = pinned(model, revision)
    inventory = model if isinstance(model, Inventory) else take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    return apply_plan(
        loaded,
        inventory,
        Path(out),
        pad=pad,
        requantise=requantise,
        overwrite=overwrite,
        check_values=check_values,
        progress=progress,
    )


def dequantise(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a quantised checkpoint, of a MoE or any other model, as plain bfloat16, tensor by tensor, and read it back; returns sizes.

    Raises:
        UserError: nothing is quantised, or a format that cannot be decoded exactly.
    """
    from expertsmith.surgery.dequantise import dequantise as write

    return write(
        open_checkpoint(model, allow_pickle=allow_pickle, revision=revision), Path(out), overwrite=overwrite, progress=progress
    )


@_treating()
def verify(
    model: str | Path | Inventory,
    out: str | Path,
    *,
    plan: str | Path | Plan | None = None,
    data: Sequence[str] = (),
    tokens: int = 1024,
    seq_len: int | None = None,
    tolerance: float = 1e-4,
    device: str = "auto",
    dtype: str = "float32",
    memory: str = "auto",
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Verdict:
    """Prove that OUT is MODEL with the plan's experts gone; leaves `OUT/expertsmith/verify.json`.

    Args:
        plan: None: the plan inside OUT.
        data: text to compare on; none: seeded random tokens, which reach experts that a narrow text would not.
        tokens: how many tokens to compare on, about.
        tolerance: largest difference allowed, relative to the largest reference value of the same layer (and of the logits).
    """
    from expertsmith.engine.loading import choose_device, choose_memory
    from expertsmith.surgery import verify as proof

    model = pinned(model, revision)
    progress = progress or Silent()
    inventory = model if isinstance(model, Inventory) else take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    output = open_checkpoint(out)
    loaded = plan if isinstance(plan, Plan) else load_plan(plan if plan is not None else proof.find_plan(Path(out)))
    config = inventory.config
    if data:
        length = seq_len or min(256, window_of(inventory.checkpoint.config))
        count = max(1, tokens // (length * len(data)))
        source = inventory.checkpoint
        batches = token_data(
            source.path,
            source.config,
            data,
            progress,
            samples=count,
            seq_len=length,
            seed=0,
            pack=True,
            overlong="truncate",
            batch_tokens=2048,
        ).batches(2048)
    else:
        batches = proof.random_batches(
            int(config.get("vocab_size", 2)), tokens, length=min(seq_len or 64, window_of(inventory.checkpoint.config))
        )
    where = choose_device(device)
    mode = choose_memory(memory, [inventory.checkpoint, output], where, dtype)
    verdict = proof.verify(
        loaded, inventory, output, batches, memory=mode, device=where, dtype=dtype, tolerance=tolerance, progress=progress
    )
    proof.save_verdict(verdict, Path(out))
    return verdict


@_treating()
def evaluate(
    model: str | Path,
    data: Sequence[str] = (),
    *,
    reference: str | Path | None = None,
    tasks: Sequence[str] = (),
    task_path: Sequence[str | Path] = (),
    limit: int | None = None,
    generate: int = 0,
    formats: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = True,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 42,
    batch_tokens: int = 4096,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
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

    Raises:
        UserError: nothing to measure, lm-eval or a task's data missing, unknown tasks, models of different vocabularies.
    """
    from expertsmith.arch import record_of
    from expertsmith.engine.loading import choose_device, choose_memory, load_model
    from expertsmith.evaluation.quality import Quality, measure
    from expertsmith.judging import asking
    from expertsmith.surgery.mask import in_force

    model = pinned(model, revision)
    progress = progress or Silent()
    if not data and not tasks:
        raise UserError("there is nothing to measure", "pass --data FILE for text, or --tasks NAME for lm-eval tasks")
    if (generate or formats) and not (data and generate):
        missing = "--data FILE" if not data else "--generate N"
        raise UserError(
            "prompts to go on from, and answers to look at, are asked for with --data and --generate", f"pass {missing}"
        )
    opened = [
        open_checkpoint(path, allow_pickle=allow_pickle) for path in ([model] if reference is None else [model, reference])
    ]
    ask = asking(
        opened,
        (tasks, task_path, limit),
        (data if generate else (), generate, formats, samples, seed),
        {"device": device, "dtype": dtype, "memory": memory},
        {"batch_tokens": batch_tokens, "folder": None if out is None else Path(out), "resume": resume, "progress": progress},
    )
    if not data:
        return Quality(more=ask())
    tokens = token_data(
        opened[0].path,
        opened[0].config,
        data,
        progress,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        pack=True,
        overlong="truncate",
        batch_tokens=batch_tokens,
        overlap=1,
    )
    where = choose_device(device)
    mode = choose_memory(memory, opened, where, dtype)
    loaded = [load_model(entry, record_of(entry.config), memory=mode, device=where, dtype=dtype) for entry in opened]
    with ExitStack() as stack:
        for entry in loaded:
            stack.enter_context(in_force(entry))
        quality = measure(loaded[0], tokens.batches(batch_tokens), loaded[1] if reference is not None else None, progress)
    del loaded, entry  # what is asked next needs one model in memory at a time
    quality.more = ask()
    return quality


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
        return f"lint cannot tell why ({error.message})"
    return (
        "\n".join(f"lint {entry.rule.id}: {entry.message}; {entry.remedy}" for entry in found)
        or "lint knows no rule against it"
    )


@_treating()
def skip(
    model: str | Path,
    data: Sequence[str],
    out: str | Path,
    *,
    plan: str | Path | Plan | None = None,
    statistic: Literal["median", "mean", "quantile"] = "median",
    quantile: float = 0.5,
    active: float | None = None,
    eval_data: Sequence[str] = (),
    measure: bool = True,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    **calibration: Any,
) -> dict[str, Any]:
    """Dynamic skipping: thresholds below which a token leaves out its least weighted experts, written with a checkpoint.

    With top_k = 2 the rule is the paper's: the second expert is skipped where w_2 < threshold * w_1. With more it is the tail rule of
    its appendix A.2: the smallest number of experts stays whose left-out weights are at most threshold of all (`engine.skipping`).
    `expertsmith.load` runs OUT with skipping; other engines load it and skip nothing.

    Args:
        plan: prune or merge first, and calibrate the thresholds on the result; otherwise all experts stay.
        statistic: what the threshold is of the values on the calibration tokens: "median" (the paper), "mean", or a `quantile`.
        active: instead, the wanted mean number of experts a token runs (top_k > 2).
        eval_data: held-out text for the quality with and without skipping; none: the calibration text.
        measure: False leaves quality and speed out.

    Raises:
        UserError: a model with one expert a token, or whose router scales the experts' inputs; see also `apply`.
    """
    from expertsmith.calibration.ratios import collect_ratios, thresholds
    from expertsmith.checkpoint.writer import prepare_target, swap
    from expertsmith.engine.loading import transformers_config
    from expertsmith.engine.skipping import check_rule
    from expertsmith.evaluation.skipping import with_and_without
    from expertsmith.surgery import skip as surgery
    from expertsmith.surgery.mask import in_force

    model = pinned(model, revision)
    progress = progress or Silent()
    target = Path(out)
    inventory = take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    source = inventory.checkpoint
    prepare_target(target, source.path, overwrite)
    run: dict[str, Any] = {"device": device, "dtype": dtype, "memory": memory}
    rule = surgery.rule_for(inventory)
    check_rule(transformers_config(source), inventory.architecture, rule)
    made = surgery.keep_all(inventory) if plan is None else plan if isinstance(plan, Plan) else load_plan(plan)
    tokens = token_data(source.path, source.config, data, progress, **calibration)
    texts = list(eval_data) or list(data)
    shape: dict[str, Any] = {key: calibration[key] for key in ("samples", "seq_len", "seed") if key in calibration}
    held_out = None
    if measure:
        held_out = token_data(source.path, source.config, texts, progress, overlap=1, pack=True, overlong="truncate", **shape)
    pruned = target.with_name(f".{target.name}.pruned-{os.getpid()}")
    with ExitStack() as stack:
        if plan is not None:  # nothing stands under the name of the output before its thresholds are known
            stack.callback(shutil.rmtree, pruned, ignore_errors=True)
            notes = apply(inventory, made, pruned, progress=progress)
        loaded = open_model(inventory if plan is None else take_inventory(open_checkpoint(pruned)), progress, **run)
        found = thresholds(
            collect_ratios(loaded, tokens, batch_tokens=calibration.get("batch_tokens", 8192), progress=progress),
            rule,
            statistic=statistic,
            quantile=quantile,
            active=active,
        )
        word = (
            f"{active:g} active experts"
            if active is not None
            else f"quantile {quantile:g}"
            if statistic == "quantile"
            else statistic
        )
        made = surgery.with_thresholds(made, found, rule, word, tokens)
        if plan is None:
            apply(inventory, made, target, overwrite=overwrite, progress=progress)
        else:
            surgery.refresh(pruned, made, inventory, notes)
            swap(pruned, target)
    result: dict[str, Any] = {"out": str(target), "plan": made, "rule": rule, "quality": None, "speed": None}
    if held_out is not None:
        written = take_inventory(open_checkpoint(target))
        models = [open_model(written, progress, **run) for _ in range(2)]
        result |= with_and_without(models[0], models[1], in_force, held_out.batches(4096), progress)
        result["quality"]["held_out"] = bool(eval_data)
    return result


def convert(
    dense: str | Path,
    method: str,
    out: str | Path,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A dense model as a Mixture of Experts, in a stock architecture and without weight updates; measured and proved.

    Args:
        dense: directory or hub id of a Llama, Mistral, Qwen2/2.5 or Qwen3 model; with `gguf_file` the folder of that file.
        method: "random", "moefication", "cmoe", "expertweaver" (training-free) or "tomoe" (learned masks).
        options: the fields of `conversion.settings.Request`, which are the options of `expertsmith convert`.

    Raises:
        UserError: a model that cannot be converted, numbers that do not go together, no data, an interrupted training of other settings.
    """
    from expertsmith.conversion.convert import run as run_conversion
    from expertsmith.conversion.settings import Request

    known = Request.__dataclass_fields__
    for name in options:
        if name not in known:
            raise unknown("option of convert", name, known)
    request = Request(dense=str(pinned(dense, revision)), method=method, out=Path(out), **options)
    return run_conversion(request, progress or Silent())


@_treating()
def analyze(
    model: str | Path,
    out: str | Path,
    *,
    data: Sequence[str] = (),
    stats: str | Path | Statistics | None = None,
    all_experts: int = 0,
    dense: str | Path | None = None,
    reference: str | Path | None = None,
    plan: str | Path | Plan | None = None,
    reference_stats: str | Path | Statistics | None = None,
    neurons: int = 128,
    pairs: int = 32,
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    progress: Progress | None = None,
    **calibration: Any,
) -> dict[str, Any]:
    """What the experts do: `out/measures.json` with every number, and `out/report.html`, one page that needs no network. Returns the measures.

    The weights are always measured. With `data` (calibrated into `out/stats`) or `stats` also how experts are used, and what a cut would lose.

    Args:
        all_experts: also run every expert on this many sampled tokens a domain of `data`: compares outputs, tests observation 2.
        dense: a dense model of the same hidden size, whose FFNs the experts are compared with.
        reference: `model` was made of this one: also what went, and how routing moved (with `data`, both are calibrated).
        plan: the plan that did it; None: the one inside `model`.
        reference_stats: statistics of `reference` on the same text, instead of calibrating it.
        neurons, pairs: neurons an expert, and expert pairs a layer, that neuron matching samples.
        calibration: options of `calibrate`, used with `data`.

    Raises:
        UserError: a dense model, experts that cannot be compared, statistics or a plan of other models, NaN in a weight. Nothing is written then.
    """
    from expertsmith.analysis import folder, study
    from expertsmith.analysis.cutting import check_plan
    from expertsmith.analysis.sources import dense_model
    from expertsmith.analysis.static import Sampling
    from expertsmith.calibration.all_experts import sample_layers
    from expertsmith.calibration.data import load_tokenizer
    from expertsmith.calibration.spec import refuse_missing
    from expertsmith.planning import matching_statistics

    model = pinned(model, revision)
    progress, target = progress or Silent(), Path(out)
    folder.prepare(target)
    refuse_missing(data)
    inventory = take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    study.refuse_single(inventory)
    material = study.Material(inventory, Sampling(neurons, pairs, calibration.get("seed", 42)), progress=progress)
    if all_experts and not data:
        raise UserError("--all-experts runs the model on text", "pass --data FILE")
    if reference is None and (plan is not None or reference_stats is not None):
        raise UserError("a plan or statistics of a reference were given, but no reference", "pass --reference MODEL")
    if dense is not None:
        hidden = int(inventory.config.get("hidden_size") or inventory.config.get("d_model") or 0)
        material.dense = dense_model(open_checkpoint(dense, allow_pickle=allow_pickle), hidden)
    run: dict[str, Any] = {"device": device, "dtype": dtype, "memory": memory}
    base = None
    if reference is not None:
        base = take_inventory(open_checkpoint(reference, allow_pickle=allow_pickle))
        made = (
            plan
            if isinstance(plan, Plan)
            else load_plan(plan if plan is not None else Path(model) / "expertsmith" / "plan.json")
        )
        if made.model.fingerprint != base.checkpoint.fingerprint:
            raise UserError(f"the plan was not made for {reference}", "give the original model of this plan as --reference")
        made = made.of_decoder_layers()
        check_plan(made, str(reference), base.counts, inventory.counts, str(model))
        material.plan, material.reference_name = made, str(reference)
        if reference_stats is not None:
            material.reference = matching_statistics(base, reference_stats)
    if stats is not None:
        material.statistics = matching_statistics(inventory, stats)
    options: dict[str, Any] = {**run, **calibration, "allow_pickle": allow_pickle, "progress": progress}
    if data and stats is None:
        material.statistics = matching_statistics(inventory, calibrate(model, data, target / "stats", **options))
    if data and base is not None and reference_stats is None:
        material.reference = matching_statistics(
            base, calibrate(base.checkpoint.source, data, target / "reference.stats", **options)
        )
    texts = {part.header["data"]["fingerprint"] for part in (material.statistics, material.reference) if part is not None}
    if len(texts) > 1:
        raise UserError(
            "the statistics of the reference are of other text, so that routing cannot be compared",
            "calibrate both on the same data with the same options, or pass --data and neither --stats nor --reference-stats",
        )
    if all_experts:
        tokens_of = {key: value for key, value in calibration.items() if key != "resume"}
        loaded, tokens = _model_and_tokens(inventory, data, progress, {**run, **tokens_of}, "keep")
        tokenizer = load_tokenizer(inventory.checkpoint.path)
        material.decode = None if tokenizer is None else lambda token: str(tokenizer.decode([token]))
        material.samples = sample_layers(
            loaded,
            tokens,
            rules={layer: inventory.rules_of(layer) for layer in inventory.layers},
            max_tokens=all_experts,
            batch_tokens=calibration.get("batch_tokens", 8192),
            seed=calibration.get("seed", 42),
            progress=progress,
        )
    measures: dict[str, Any] = study.plain(study.study(material))
    folder.write(target, measures)
    return measures


@_treating(headers_only=True)
def load(path: str | Path, *, as_type: str | None = None, **kwargs: Any) -> Any:
    """A transformers model of any checkpoint that expertsmith writes, ready to run: layers with different numbers of experts are built,
    and skip thresholds of its config.json are put in force. No code from the checkpoint is run.

    Quantised weights are decoded as they are read: transformers 5.23 runs some formats (modelopt, NVFP4 experts) without their scales, and
    others only with a package or GPU of their own. To run packed weights, load the checkpoint with an engine or with transformers itself.

    Args:
        kwargs: for `AutoModelForCausalLM.from_pretrained`; of a quantised checkpoint `dtype` and a `device_map` of one device.

    Raises:
        UserError: quantised weights that cannot be decoded, or another argument with them.
    """
    from expertsmith.arch import family_of, record_of
    from expertsmith.checkpoint.floats import quantisation_of
    from expertsmith.engine.loading import load_decoded
    from expertsmith.engine.skipping import install
    from expertsmith.engine.uneven import load as load_module
    from expertsmith.surgery.skip import skip_of

    name, _, revision = str(path).partition("@")
    if revision and not Path(path).exists():  # owner/name@REVISION
        path, kwargs["revision"] = name, revision
    checkpoint = open_checkpoint(path, headers_only=True, revision=kwargs.get("revision"))
    if quantisation_of(checkpoint) is None:
        module = load_module(path, **kwargs)
    else:
        module = load_decoded(
            open_checkpoint(path, revision=kwargs.pop("revision", None)), record_of(checkpoint.config), **kwargs
        )
    config = checkpoint.config  # the module's own may be the text part only
    found = skip_of(config)
    if found is not None:
        install(module, family_of(config, str(path)), found[1], found[0])
    return module


@_treating()
def heal(
    model: str | Path,
    teacher: str | Path,
    data: Sequence[str],
    out: str | Path,
    *,
    method: str = "least_squares",
    options: Mapping[str, Any] | None = None,
    requantise: bool = False,
    eval_data: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "float32",
    memory: str = "auto",
    resume: bool = True,
    overwrite: bool = False,
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    **calibration: Any,
) -> dict[str, Any]:
    """Recover a compressed model towards the one that it came from; returns the report that also stands in `OUT/expertsmith/heal.json`.

    Nothing is accepted that is worse on a held-out part of the data. Finished layers stay in `<out>.healing` until the end, so that an
    interrupted run goes on from there.

    Args:
        model: a pruned, merged or converted checkpoint.
        teacher: the original, or the dense model that a converted one was made of.
        method: "least_squares" (down projections in closed form, layer by layer) or "layer_local" (the same, then router, gate, up and down
            projections by gradients within each layer).
        options: of the method, see `healing.options`.
        requantise: write healed weights of a quantised model in its own format, and measure what that costs; otherwise all weights are
            written in bfloat16.
        eval_data: further held-out text, on which the model is measured before and after.

    Raises:
        UserError: teacher and student that do not match, too little data, or an unknown method or option.
    """
    from expertsmith.healing.options import parse_healer
    from expertsmith.healing.run import Healing
    from expertsmith.healing.run import heal as run_healing

    model = pinned(model, revision)
    progress = progress or Silent()
    chosen = parse_healer(method, options or {})
    inventory = take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    source, batch_tokens = inventory.checkpoint, calibration.get("batch_tokens", 8192)
    tokens = token_data(source.path, source.config, data, progress, **calibration)
    original = open_checkpoint(teacher, allow_pickle=allow_pickle)
    run: dict[str, Any] = {"device": device, "dtype": dtype, "memory": memory}
    job = Healing(
        inventory,
        original,
        tokens,
        method,
        chosen,
        Path(out),
        batch_tokens,
        requantise=requantise,
        resume=resume,
        overwrite=overwrite,
        **run,
    )
    report = run_healing(job, progress)
    if eval_data:
        shape = {key: calibration[key] for key in ("samples", "seq_len", "seed") if key in calibration}
        report["quality"] = {
            name: evaluate(
                path, eval_data, reference=teacher, allow_pickle=allow_pickle, progress=progress, **run, **shape
            ).to_json()
            for name, path in (("before", model), ("after", out))
        }
    return {"out": str(out), **report}


@_treating()
def compress(
    model: str | Path,
    method: str,
    keep: Keep | None,
    out: str | Path,
    *,
    data: Sequence[str] = (),
    stats: str | Path | Statistics | None = None,
    domains: Sequence[str] = (),
    budget: str | None = None,
    uniform: bool = False,
    options: Mapping[str, Any] | None = None,
    router_groups: Literal["keep", "flatten"] = "keep",
    mtp: Literal["keep", "drop"] = "keep",
    eval_data: Sequence[str] = (),
    measure: bool = True,
    heal: str | None = None,
    requantise: bool = False,
    overwrite: bool = False,
    as_type: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    progress: Progress | None = None,
    **calibration: Any,
) -> dict[str, Any]:
    """calibrate + plan + apply + verify (+ heal) + evaluate in one go; returns what was done, found and measured.

    The statistics stay in `<out>.stats` (measured weights and searches in `<out>.measured`), so that an interrupted run resumes and further
    plans need no calibration.

    Args:
        eval_data: held-out text to measure quality on; without it, the calibration text is used (which flatters the result).
        measure: False leaves the quality measurement out.
        heal: a layer-wise way of healing on the same data, after the unhealed checkpoint was verified.
        requantise: write merged or healed weights of a quantised model in its own format; otherwise all weights are then bfloat16.
    """
    from expertsmith.calibration.spec import refuse_missing
    from expertsmith.checkpoint.writer import prepare_target
    from expertsmith.surgery.card import model_card, quality_line

    model = pinned(model, revision)
    progress = progress or Silent()
    seconds: dict[str, float] = {}
    target = Path(out)
    inventory = take_inventory(open_checkpoint(model, allow_pickle=allow_pickle))
    prepare_target(target, inventory.checkpoint.path, overwrite)
    chosen = _request(inventory, method, keep, budget, options, router_groups)[0]
    if not chosen.data_free or heal is not None or (measure and (eval_data or data)):
        refuse_without_class(inventory.architecture, f"{inventory.checkpoint.source}/config.json")
    refuse_missing([*data, *(eval_data if measure else ())])
    if heal is not None:
        _check_heal(heal, data)
    written = target if heal is None else beside(out, "unhealed")
    run: dict[str, Any] = {"device": device, "memory": memory}
    if stats is None and data and chosen.reads == "statistics":
        with timed(seconds, "calibrate"):
            stats = calibrate(
                model,
                data,
                beside(out, "stats"),
                all_outputs=chosen.all_outputs,
                dtype=dtype,
                allow_pickle=allow_pickle,
                progress=progress,
                **run,
                **calibration,
            )
    with timed(seconds, "plan"):
        made = plan(
            inventory,
            method,
            keep,
            stats=stats,
            domains=domains,
            data=data,
            budget=budget,
            uniform=uniform,
            options=options,
            router_groups=router_groups,
            mtp=mtp,
            work=beside(out, "measured"),
            allow_pickle=allow_pickle,
            progress=progress,
            dtype=dtype,
            **run,
            **calibration,
        )
    with timed(seconds, "apply"):
        if requantise and not (made.merges or heal):
            raise UserError("--requantise has nothing to do: no expert is merged or healed", "leave it out")
        again = requantise and bool(made.merges)
        notes = apply(inventory, made, written, requantise=again, overwrite=overwrite or heal is not None, progress=progress)
    with timed(seconds, "verify"):
        verdict = verify(inventory, written, plan=made, progress=progress, **run)
    report = None
    if heal is not None:
        with timed(seconds, "heal"):
            report = _heal(
                written,
                model,
                data,
                out,
                method=heal,
                requantise=requantise,
                overwrite=overwrite,
                allow_pickle=allow_pickle,
                progress=progress,
                **run,
                **calibration,
            )
        shutil.rmtree(written)
    quality = None
    texts = list(eval_data) or list(data)
    if measure and texts:
        shape = {key: calibration[key] for key in ("samples", "seq_len", "seed") if key in calibration}
        with timed(seconds, "evaluate"):
            quality = evaluate(
                target,
                texts,
                reference=inventory.checkpoint.path,
                dtype=dtype,
                allow_pickle=allow_pickle,
                progress=progress,
                **run,
                **shape,
            ).to_json()
        quality["held_out"] = bool(eval_data)
        card = model_card(made, inventory, notes, quality_line(quality))
        if report is not None:
            from expertsmith.healing.run import healed_card

            card = healed_card(card, report, measured_after=True)
        (target / "README.md").write_text(card, encoding="utf-8")
    result = {"out": str(target), "plan": made, "notes": notes, "verify": verdict, "quality": quality, "seconds": seconds}
    return result if report is None else {**result, "heal": report}


_heal = heal  # `compress` has a parameter of that name


def _check_heal(method: str, data: Sequence[str]) -> None:
    """What can be known of a healing before anything is computed."""
    from expertsmith.healing.options import LAYERWISE, parse_healer

    parse_healer(method, {})
    if method not in LAYERWISE:
        raise UserError(
            f"compress heals layer by layer, but --heal is {method}",
            f"choose {' or '.join(LAYERWISE)}, or run `expertsmith heal`",
        )
    if not data:
        raise UserError("healing needs text", "pass --data FILE")


@_treating()
def compare(
    model: str | Path,
    methods: Sequence[str],
    keep: Sequence[Keep],
    data: Sequence[str],
    eval_data: Sequence[str],
    out: str | Path,
    *,
    as_type: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Methods × ratios × budgets from one calibration, judged on held-out text: one table and one picture. Returns what comparison.json holds.

    A cell's plan stands in `out/plans` (apply it to get that model); it is judged on the loaded original with the plan's experts masked and merged,
    which is what `verify` holds a written checkpoint to. Three draws of `random` are always in. Finished cells are kept, and are not made
    again for the same model, text, method and options. Leaves comparison.json, .html, .svg and .md.

    Args:
        methods: `NAME[:KEY=VALUE,…]` each, or "all".
        keep: ratios or counts.
        eval_data: held-out text, `[DOMAIN=]SOURCE[:N]` each.
        options: `budgets` ("uniform", "global", "threshold": the methods' own, without keep), `heal` (ways of healing, `NAME[:KEY=VALUE,…]`,
            each beside the cell without), `tasks`, `task_path` and `limit` as in `evaluate`, `resume`, and those of `calibrate`: `samples`, `seq_len`, `seed`, `pack`, `overlong`, `batch_tokens`, `device`, `dtype`, `memory`.

    Raises:
        UserError: an unknown method, option, budget or way of healing, a keep that the router cannot work with, no data, a folder with other files.
    """
    from expertsmith.comparison.run import compare as run_comparison

    return run_comparison(pinned(model, revision), methods, keep, data, eval_data, out, **options)


def run(recipe: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Run the steps of a recipe file in order; every fault of the file is reported before anything runs."""
    from expertsmith.recipe import load_recipe, run_recipe

    return run_recipe(load_recipe(recipe), progress)
