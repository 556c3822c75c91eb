"""`plan`: which experts stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from expertsmith.calibration.opening import inventory_of, open_model, token_data
from expertsmith.checkpoint.work import work_beside, work_of
from expertsmith.errors import UsageError, UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.experts.rules import Rules, keep_count, parse_keep
from expertsmith.ranks import current
from expertsmith.verbs.calibrate import calibrate
from expertsmith.verbs.definition import FLOW, Opt, out_and, verb
from expertsmith.verbs.options import (
    Budget,
    Calibrating,
    Context,
    Data,
    Domains,
    Fit,
    Groups,
    Keep,
    Model,
    Mtp,
    Options,
    Overwrite,
    Running,
    Stats,
    Text,
    Uniform,
    part,
)
from expertsmith.views import show

JUDGED_TOKENS = 4096  # tokens that run at once when logits over the vocabulary are in memory

if TYPE_CHECKING:
    from expertsmith.methods.base import Budget as BudgetName
    from expertsmith.methods.base import Method
    from expertsmith.planning.budgets import Judge
    from expertsmith.planning.fit import Fit as Fitted
    from expertsmith.planning.plan import Plan


def _show(made: Any, given: Mapping[str, Any]) -> None:
    show.show_plan(made)
    if given["out"] is not None:
        show.line(f"[bold]{show.escape(str(given['out']))}[/bold]")


@verb(FLOW, show=_show, plain=lambda made, given: made.to_json(), keeps=out_and("work"), ranks=True)
def plan(  # noqa: C901  (a case a kind of method)
    model: Model,
    method: Annotated[str | None, Opt("How experts are scored; see `expertsmith methods`.", "--method", "-m")] = None,
    keep: Keep = None,
    *,
    from_file: Annotated[
        str | Path | None,
        Opt(
            "Read the choice from a file instead of a method: ordered lists (JSONL, with --keep), a mask or retained experts (JSON).",
            "--from",
            kind=Path,
        ),
    ] = None,
    out: Annotated[
        str | Path | None,
        Opt("Output file for the plan.", "--out", "-o", metavar="OUT", kind=Path, cli=Path("plan.json"), writes="file"),
    ] = None,
    fit: Fit = None,
    context: Context = None,
    stats: Stats = None,
    data: Data = (),
    domains: Domains = (),
    budget: Budget = None,
    uniform: Uniform = False,
    options: Options = None,
    router_groups: Groups = "keep",
    mtp: Mtp = "keep",
    work: Annotated[
        str | Path | None,
        Opt(
            "Keep statistics or measured weights in this folder, for plans with other options. Default: OUT.work, removed when the plan is written.",
            "--work",
            metavar="FOLDER",
            kind=Path,
            shown=False,
            writes="into",
        ),
    ] = None,
    overwrite: Overwrite = False,
    **given: Unpack[Calibrating],
) -> Plan:
    """Choose which experts are kept and which are merged → plan.json, small enough to read and review.

    Seconds from statistics; with --data instead of --stats the calibration runs first. Until the plan is written, costly results (statistics,
    measured weights, searches) are in OUT.work, and an interrupted run resumes from there; --work FOLDER keeps them.
    Over several processes: torchrun --nproc-per-node N -m expertsmith plan …

    Args:
        keep: a ratio (0.5, "50%") or a count (4, "4"); None for methods with a threshold of their own.
        from_file: instead of a method, another tool's choice of experts; see `interchange`.
        fit: instead of `keep`, a memory ("24GB", "vllm:24GB"): the largest number of experts whose weights fit into it with the KV cache.
        context: tokens of that KV cache; 0 counts the weights only.
        stats: statistics of `calibrate`; without them `data` is calibrated first.
        domains: use only these domains of the statistics.
        budget: "uniform" (every layer alike), "global" (the layers share one total), "threshold" (the method's own), "sensitivity" (from what each
            layer costs alone, measured on `data`) or "esap" (an evolutionary search on `data`); None: the method's usual.
        uniform: of a budget that leaves layers different numbers, make the nearest plan with one number, and note what that costs.
        options: the method's own options, see `expertsmith methods`, and those of a searched budget.
        router_groups: "keep" drops the same number from every expert_group; "flatten" gives up the groups (n_group = 1).
        mtp: "keep" prunes multi-token-prediction layers with the others, to the same number of experts; "drop" leaves them out.
        work: folder that keeps what is costly to compute again (statistics of `data`, measured weights, finished searches); default: in
            `<out>.work`, which is removed when the plan is written.

    Raises:
        UserError: unknown method or option, a keep that the router cannot work with, a memory into which nothing or everything fits, statistics of another model, a file that fits no format.
    """
    from expertsmith.planning.budgets import Search
    from expertsmith.planning.build import make_plan
    from expertsmith.planning.given import statistics_for
    from expertsmith.planning.job import Job

    current().wait()  # until every rank has found that the output is not there yet
    if (method is None) == (from_file is None):
        raise UsageError("plan needs a method or a file", "pass --method NAME or --from FILE")
    if from_file is not None:
        _refuse_fit(fit, context, "--from: the file says how many experts are kept")
    progress = given["progress"]
    inventory = inventory_of(model, given["allow_pickle"])
    if method is None:
        assert from_file is not None
        made = _from_file(inventory, from_file, keep, router_groups, mtp, progress)
        _save(made, out)
        return made
    fitted = fitting(inventory, method, fit, context, keep, budget, uniform, router_groups, mtp)
    keep = fitted.keep if fitted else keep
    chosen, values, share, chosen_budget, rules, searching = request(inventory, method, keep, budget, options, router_groups)
    if share is not None:
        progress.note(f"keep: {share:.0%} of every layer's neurons" if chosen.cut else _said(share, rules.values()))
    calibrates = chosen.reads == "statistics" and stats is None
    _check_inputs(chosen, calibrates, data, domains)
    check_search(inventory, chosen_budget, data, uniform)
    job = Job(inventory, chosen, values, share, chosen_budget, rules, progress, mtp=mtp, device=given["device"])
    job.batch_tokens, job.resume = given["batch_tokens"], given["resume"]
    if chosen.reads == "model":
        job.open = partial(model_and_tokens, inventory, data, given, router_groups)
    with ExitStack() as held:
        place = held.enter_context(_work("statistics" if calibrates else "measured", calibrates, work, out, progress))
        if calibrates:
            assert place is not None
            options = {
                **given,
                "all_outputs": chosen.all_outputs,
                "output_moments": chosen.output_moments,
                "neurons": chosen.neurons,
                "overwrite": overwrite,
            }
            stats = calibrate(inventory.checkpoint.source, data, place, **options)
        else:
            job.work = place
        if searching is not None:
            place = held.enter_context(_work("searched", calibrates, work and Path(work) / "searched", out, progress))
            judge = partial(_judge, inventory, data, given, router_groups)
            job.search = Search(searching, given["seed"], judge, given["dtype"], place)
        if chosen.reads == "statistics":
            assert stats is not None
            job.statistics = statistics_for(inventory, chosen, stats, domains)
        said: dict[str, Any] = {"domains": list(domains)} if domains else {}
        if fitted:
            said |= {"fit": fitted.memory.text, "context": fitted.tokens}
        made = make_plan(job, router_groups, uniform, said)
        if fitted:
            fitted.check(made, inventory)
        _save(made, out)
    return made


def _save(made: Plan, out: str | Path | None) -> None:
    if out is not None and current().first:
        made.save(out)


@contextmanager
def _work(part: str, always: bool, work: str | Path | None, out: str | Path | None, progress: Any) -> Iterator[Path | None]:
    """Where a plan's costly results lie: statistics of its data, what its method measures, or scores of a search. The first rank makes and removes
    it. `always`: also for a plan that is not written."""
    if work is not None or (out is None and not always):
        yield None if work is None else Path(work)
        return
    target = Path(out or "plan.json")
    with ExitStack() as held:
        if current().first:
            held.enter_context(work_beside(target, part, progress.note))
        yield work_of(target) / part
        current().wait()  # no rank reads it any more


def _from_file(inventory: Inventory, file: str | Path, keep: Any, router_groups: Any, mtp: Any, progress: Any) -> Plan:
    from expertsmith.planning import interchange
    from expertsmith.surgery.apply import check_plan

    made = interchange.plan_from(file, inventory, keep, router_groups, mtp, progress)
    check_plan(made, inventory)
    return made


def fitting(
    inventory: Inventory,
    method: str,
    fit: str | None,
    context: int | None,
    keep: Any,
    budget: str | None,
    uniform: bool,
    router_groups: str,
    mtp: str,
) -> Fitted | None:
    """What --fit comes to; None without it.

    Raises:
        UserError: another option says how many experts are kept, or nothing or everything fits.
    """
    from expertsmith import methods as registered
    from expertsmith.planning.fit import largest
    from expertsmith.planning.job import rules_of

    if fit is None:
        _refuse_fit(None, context, "")
        return None
    for given, flag in ((keep is not None, "--keep"), (budget == "threshold", "--budget threshold"), (uniform, "--uniform")):
        if given:
            _refuse_fit(fit, context, flag)
    chosen = registered.find(method)
    if chosen.constants or chosen.cut:
        what = "whose constants it does not count" if chosen.constants else "which keeps all experts"
        _refuse_fit(fit, context, f"method {method}, {what}")
    return largest(inventory, rules_of(inventory, router_groups), fit, context, mtp)


def _refuse_fit(fit: str | None, context: int | None, other: str) -> None:
    if fit is not None:
        raise UsageError(f"--fit sets the number of experts and does not go with {other}", "leave one of them out")
    if context is not None:
        raise UsageError("--context has no effect without --fit", "pass --fit SIZE")


def plan_from(model: str | Path | Inventory, file: str | Path, keep: Any = None, **options: Any) -> Plan:
    """`plan` with `from_file`: another tool's choice of experts as a plan."""
    return plan(model, None, keep, from_file=file, **options)


def request(
    inventory: Inventory,
    method: str,
    keep: float | int | str | None,
    budget: str | None,
    options: Mapping[str, Any] | None,
    router_groups: str,
) -> tuple[Method, dict[str, Any], float | int | None, BudgetName, dict[int, Rules], dict[str, Any] | None]:
    """Everything that was asked for, checked before anything is computed. The last are the options of a searched budget, None with another."""
    from expertsmith import methods as registered
    from expertsmith.planning import budgets
    from expertsmith.planning.job import choose_budget, rules_of
    from expertsmith.surgery.neurons import check_neurons
    from expertsmith.surgery.novices import check_novices
    from expertsmith.surgery.uneven import refuse_padded

    chosen = registered.find(method)
    own, searching = budgets.parse_options(budget, options or {})
    values = chosen.parse_options(own)
    share = None if keep is None else parse_keep(keep)
    refuse_padded(inventory)
    chosen_budget = choose_budget(chosen, budget, share)
    if chosen.constants:
        check_novices(inventory)
        if router_groups == "flatten":
            raise UserError(f"method {method} leaves the router unchanged, so its groups stay", "leave --router-groups out")
    if chosen.cut:
        if not isinstance(share, float):
            raise UserError(f"method {method} keeps a share of every expert's neurons, not {share} experts", "e.g. --keep 0.75")
        check_neurons(inventory, values["width"])
        if router_groups == "flatten":
            raise UserError(f"method {method} leaves the router unchanged, so its groups stay", "leave --router-groups out")
    rules = rules_of(inventory, "flatten" if chosen.constants else router_groups)
    if share is not None and not chosen.cut:
        where = inventory.checkpoint.source
        for layer, entry in rules.items():
            keep_count(share, entry, where if len(set(rules.values())) == 1 else f"decoder layer {layer} of {where}")
    return chosen, values, share, chosen_budget, rules, searching


def _check_inputs(chosen: Method, calibrates: bool, data: Sequence[str], domains: Sequence[str]) -> None:
    """Refuse what the method cannot use, and what is missing for it."""
    if domains and (chosen.reads == "model" or chosen.data_free):
        raise UserError(f"method {chosen.name} reads no statistics, so --domain has no effect", "remove --domain")
    if calibrates and not data:
        raise UserError(
            f"method {chosen.name} needs calibration", "pass --stats STATS (made by `expertsmith calibrate`) or --data FILE"
        )
    if chosen.reads == "model" and not data:
        raise UserError(f"method {chosen.name} runs the model on text", "pass --data FILE")


def check_search(inventory: Inventory, budget: str, data: Sequence[str], uniform: bool) -> None:
    """Refuse a searched budget without text, or one whose plan could not be applied."""
    from expertsmith.planning.budgets import SEARCHED
    from expertsmith.surgery.uneven import check_uneven

    if budget not in SEARCHED:
        return
    if not data:
        raise UserError(f"budget {budget} runs the model on text", "pass --data FILE (the calibration text will do)")
    if not uniform:
        check_uneven(inventory)


def _judge(inventory: Inventory, data: Sequence[str], given: Mapping[str, Any], router_groups: str, samples: int) -> Judge:
    """What scores plans of a searched budget: the model with routers masked, held against itself on `samples` sequences of the text."""
    from expertsmith.evaluation.overlap import Overlap
    from expertsmith.planning.budgets import Judge
    from expertsmith.surgery.mask import masked

    model, tokens = model_and_tokens(inventory, data, given, router_groups)
    text = tokens.first(samples)
    ranks = current()
    ranks.agree("text", lambda: text.fingerprint)
    given["progress"].note(f"search: {sum(map(len, text.sequences.values()))} of its sequences")
    size = min(given["batch_tokens"] or JUDGED_TOKENS, JUDGED_TOKENS)
    overlap = Overlap(model, text.batches(size), ranks)
    counts = {layer: inventory.experts_in(layer) for layer in inventory.layers}

    def score(kept: Mapping[int, Sequence[int]]) -> float:
        return overlap.of(masked(model, kept, counts))

    return Judge(score, text.fingerprint, tokens.fingerprint, overlap.tokens, overlap.exact)


def _said(share: float | int, rules: Iterable[Rules]) -> str:
    """What a --keep comes to, in words: `-k 50` is 50 experts, not half."""
    pairs = sorted({(keep_count(share, entry), entry.num_experts) for entry in rules})
    if all(count == experts for count, experts in pairs):
        return "keep: all experts of every layer, so nothing is removed"
    told = ", ".join(f"{count} of {experts} experts per layer ({count / experts:.0%})" for count, experts in pairs)
    return f"keep: {told}"


def model_and_tokens(inventory: Inventory, data: Sequence[str], given: Mapping[str, Any], router_groups: str = "keep") -> Any:
    """(model, token data) for what runs the model on text."""
    source, progress = inventory.checkpoint, given["progress"]
    tokens = token_data(source.path, source.config, data, progress, **part(Text, given))
    return open_model(inventory, progress, router_groups=router_groups, **part(Running, given)), tokens
