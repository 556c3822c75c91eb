"""`compress`: the whole flow in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Unpack

from expertsmith.arch import refuse_without_class
from expertsmith.calibration.opening import inventory_of
from expertsmith.checkpoint.work import work_beside, work_of
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.verbs.apply import apply
from expertsmith.verbs.calibrate import calibrate
from expertsmith.verbs.definition import FLOW, Opt, out_and, verb
from expertsmith.verbs.evaluate import evaluate
from expertsmith.verbs.heal import heal as heal_model
from expertsmith.verbs.lint import lint
from expertsmith.verbs.made import how_made, without_folders
from expertsmith.verbs.options import (
    SPECS,
    Budget,
    Calibrating,
    Calibration,
    Context,
    Data,
    Domains,
    Drawing,
    Fit,
    Groups,
    Measure,
    Mtp,
    Named,
    Opened,
    Options,
    Out,
    Overwrite,
    Placing,
    Progressive,
    Push,
    Ratio,
    Requantise,
    Running,
    Stats,
    Text,
    Uniform,
    part,
)
from expertsmith.verbs.plan import check_search, fitting, plan
from expertsmith.verbs.request import calibration_for, check_progressive, request
from expertsmith.verbs.verify import verify
from expertsmith.views import show
from expertsmith.views.progress import timed

REPORT = "expertsmith/report.html"  # in the output, beside plan.json and verify.json


def _show(result: Any, given: Mapping[str, Any]) -> None:
    show.show_plan(result["plan"])
    for note in result["notes"][len(result["plan"].notes) :]:
        show.line(f"[yellow]note[/yellow] {show.escape(note)}")
    show.show_verdict(result["verify"])
    if "heal" in result:
        show.show_healing({"out": result["out"], **result["heal"]})
    if result["quality"]:
        own = "the calibration text itself (too optimistic; pass --eval-data)"
        show.show_quality(result["quality"], "held-out text" if result["quality"]["held_out"] else own)
    show.line("seconds  " + ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items()))
    if "pushed" in result:
        show.line(f"uploaded to {result['pushed']}")
    show.line(f"[bold]{show.escape(result['report'])}[/bold]  (what was cut, its cost and proof, as a page)")
    show.line(
        f"[bold]{show.escape(result['out'])}[/bold]  (plan inside: expertsmith/plan.json; {show.escape(str(work_of(Path(result['out']))))} is removed)"
    )


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    return {**result, "plan": result["plan"].to_json(), "verify": result["verify"].to_json()}


@verb(
    FLOW,
    show=_show,
    plain=lambda result, given: _plain(result),
    passed=lambda result: result["verify"].passed,
    keeps=out_and("work"),
)
def compress(  # noqa: PLR0915  (the steps of the flow, one after another)
    model: Named,
    method: Annotated[
        str | None,
        Opt(
            "How experts are scored; see `expertsmith methods`. Default: easy_ep for data of one labelled domain, else reap.",
            "--method",
            "-m",
        ),
    ] = None,
    keep: Annotated[
        Ratio | None,
        Opt(
            "Routed experts to keep in each layer: a ratio (0.5, 50%) or a count (4). Default: the method's built-in threshold, or 0.5.",
            "--keep",
            "-k",
            kind=str,
        ),
    ] = None,
    *,
    out: Out,
    fit: Fit = None,
    context: Context = None,
    data: Data = (),
    stats: Stats = None,
    domains: Domains = (),
    progressive: Progressive = False,
    budget: Budget = None,
    uniform: Uniform = False,
    options: Options = None,
    router_groups: Groups = "keep",
    mtp: Mtp = "keep",
    eval_data: Annotated[
        Sequence[str],
        Opt(
            "Held-out text to measure quality on. Default: every eighth record of the data, which then does not calibrate. Repeatable.",
            "--eval-data",
            "-e",
            metavar=SPECS,
        ),
    ] = (),
    measure: Measure = True,
    heal: Annotated[
        str | None,
        Opt("Then heal on the same text: least_squares or layer_local (see `expertsmith heal`).", shown=False),
    ] = None,
    requantise: Requantise = False,
    overwrite: Overwrite = False,
    push: Push = None,
    **given: Unpack[Calibrating],
) -> dict[str, Any]:
    """Calibrate, plan, apply, verify and evaluate in one command.

    OUT/expertsmith/report.html shows the result on one page: what was cut, what it cost, whether it is proven, which engines serve it.

    Statistics, measured weights and the unhealed checkpoint are in OUT.work until the end; the same command resumes an interrupted run from there.
    To try several methods or ratios, run calibrate once and pass --stats.

    [dim]expertsmith compress mistralai/Mixtral-8x7B-v0.1 -d math=math.jsonl -o mixtral-math[/dim]

    [dim]expertsmith compress mistralai/Mixtral-8x7B-v0.1 -m easy_ep -k 0.5 -d math=math.jsonl -e math=heldout.jsonl -o mixtral-math[/dim]

    Args:
        method: None chooses easy_ep if `data` (or `domains`) has one labelled domain, and reap otherwise.
        keep: None is the method's own threshold if it has one, else 0.5.
        progressive: take a layer's statistics on inputs that the layers already chosen make, instead of the whole model's.
        eval_data: held-out text to measure quality on. Without it, every eighth record of `data` is held out (`SOURCE#heldout`) and the others
            calibrate; sources of fewer than eight records are measured on the calibration text itself, which flatters the result.
        measure: False leaves the quality measurement out.
        heal: a layer-wise way of healing on the same data, after the unhealed checkpoint was verified.
        requantise: write merged or healed weights of a quantised model in its own format; otherwise all weights are then bfloat16.

    Returns what was done, found and measured.
    """
    asked = {name: value for name, value in locals().items() if name != "given"} | given
    from expertsmith.calibration.spec import refuse_missing
    from expertsmith.checkpoint.hub import check_push
    from expertsmith.checkpoint.hub import push as upload
    from expertsmith.checkpoint.writer import prepare_target
    from expertsmith.surgery.card import model_card

    progress = given["progress"]
    seconds: dict[str, float] = {}
    target = Path(out)
    inventory = inventory_of(model, given["allow_pickle"])
    prepare_target(target, inventory.checkpoint.path, overwrite)
    refuse_missing([*data, *(eval_data if measure else ())])
    if push is not None:
        check_push(push, overwrite)
    said: list[str] = []
    method, keep = _usual(method, keep, fit, budget, data, stats, domains, said)
    fitted = fitting(inventory, method, fit, context, keep, budget, uniform, router_groups, mtp)
    count = fitted.keep if fitted else keep
    chosen, values, share, *_, searching = request(inventory, method, count, budget, options, router_groups)
    check_progressive(progressive, chosen, share, budget, router_groups, stats)
    check_search(inventory, budget or "", data, uniform)
    reads_text = not chosen.data_free or searching is not None
    if reads_text or heal is not None or (measure and (eval_data or data)):
        refuse_without_class(inventory.architecture, f"{inventory.checkpoint.source}/config.json")
    _check_heal(heal, data, inventory, requantise, fitted is not None)
    calibrates = heal is not None or searching is not None or (stats is None and not chosen.data_free)
    split = measure and calibrates and not eval_data
    texts, judged = _apart(data, said) if split else (list(data), list(eval_data))
    for line in said:
        progress.note(line)
    quiet = part(Opened, given) | {"as_type": None, "revision": None}  # both are in force
    run = part(Placing, given)
    report = None
    with ExitStack() as stack:
        work = {
            name: stack.enter_context(work_beside(target, name, progress.note))
            for name in ("statistics", "measured", "unhealed")
        }
        written = target if heal is None else work["unhealed"]
        if stats is None and texts and chosen.reads == "statistics":
            with timed(seconds, "calibrate"):
                stats = calibrate(
                    model,
                    texts,
                    work["statistics"],
                    overwrite=overwrite,
                    **calibration_for(chosen, share, values, progressive),
                    **given,
                )
        with timed(seconds, "plan"):
            made = plan(
                inventory,
                method,
                keep,
                stats=stats,
                domains=domains,
                data=texts,
                budget=budget,
                uniform=uniform,
                fit=fit,
                context=context,
                options=options,
                router_groups=router_groups,
                mtp=mtp,
                work=work["measured"],
                **part(Calibration, given),
                **quiet,
            )
        import torch  # noqa: F401  (`verify` needs it next, and `apply` looks at the model in this process where it is here)

        with timed(seconds, "apply"):
            _check_requantise(inventory, made, requantise, heal, fitted is not None)
            again = requantise and bool(made.merges)
            notes = apply(
                inventory, made, written, requantise=again, overwrite=overwrite or heal is not None, progress=progress
            )
        with timed(seconds, "verify"):
            verdict = verify(inventory, written, plan=made, progress=progress, **run)
        if heal is not None:
            with timed(seconds, "heal"):
                report = heal_model(
                    written,
                    model,
                    texts,
                    out,
                    method=heal,
                    requantise=requantise,
                    overwrite=overwrite,
                    resume=given["resume"],
                    **part(Text, given),
                    **run,
                    **quiet,
                )
    quality = None
    if measure and (judged or texts):
        held_out = bool(judged) or (heal is None and not reads_text)
        with timed(seconds, "evaluate"):
            found = evaluate(
                target,
                judged or texts,
                reference=inventory.checkpoint.path,
                **part(Drawing, given),
                **part(Running, given),
                **quiet,
            )
        quality = {**found.to_json(), "held_out": held_out}
        card = model_card(made, inventory, notes, quality)
        (target / "README.md").write_text(card if report is None else _healed(card, report), encoding="utf-8")
    result = {
        "out": str(target),
        "model": inventory.checkpoint.source,
        "plan": made,
        "notes": [*notes, *said],
        "verify": verdict,
        "quality": quality,
        "seconds": seconds,
    }
    result = _reported(result if report is None else {**result, "heal": report}, asked)
    if push is not None and verdict.passed:
        result["pushed"] = upload(target, push)
    elif push is not None:
        progress.note(f"not uploaded to {push}, because verify failed")
    return result


def _reported(result: dict[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The result with what lint finds, and the page that shows all of it. `asked`: the options of `compress`."""
    from expertsmith.lint import ENGINES
    from expertsmith.views.pages import compression, sheet

    page = Path(result["out"]) / REPORT
    findings = lint(result["out"], allow_pickle=asked["allow_pickle"])
    result["lint"] = {"engines": ENGINES, "findings": [finding.to_json() for finding in findings]}
    if not result["quality"]:
        result["not_measured"] = "no text was given" if asked["measure"] else "--no-measure"
    result["report"] = str(page)
    places = _places(asked)
    made = how_made("compress", without_folders(asked, places), result["seconds"])
    sheet.write(page, compression.page(without_folders(_plain(result), places), made))
    return result


def _places(asked: Mapping[str, Any]) -> list[str]:
    """The files and folders that the options of `compress` name; names on the hub and of the demo are none."""
    from expertsmith.calibration.spec import parse_spec

    named = [asked["model"], asked["out"], asked["stats"]]
    named += [parse_spec(text).source for text in (*asked["data"], *asked["eval_data"])]
    given = [str(place) for place in named if isinstance(place, (str, Path))]
    texts = {*given, *(str(Path(text)) for text in given)}  # also without a slash at the end
    return [text for text in texts if Path(text).name not in ("", text) and Path(text).exists()]


def _healed(card: str, report: Mapping[str, Any]) -> str:
    from expertsmith.healing.run import healed_card

    return healed_card(card, report, measured_after=True)


def _usual(
    method: str | None,
    keep: Any,
    fit: str | None,
    budget: str | None,
    data: Sequence[str],
    stats: Any,
    domains: Sequence[str],
    said: list[str],
) -> tuple[str, Any]:
    """Method and keep, with the usual ones for what is not given."""
    method = method or _usual_method(data, stats, domains, said)
    return method, _usual_keep(method, budget, said) if keep is None and fit is None else keep


def _usual_method(data: Sequence[str], stats: Any, domains: Sequence[str], said: list[str]) -> str:
    """The method if none is given; the reason is appended to `said` (docs/choosing-a-method.md, "What you have").

    Raises:
        UserError: no text and no statistics.
    """
    from expertsmith.calibration.spec import DEFAULT_DOMAIN, parse_spec

    if not data and stats is None:
        raise UserError("compress needs text", "pass --data FILE, or a method that needs none, e.g. --method aimer")
    names = sorted(set(domains) or {parse_spec(text).domain for text in data})
    if len(names) == 1 and names[0] != DEFAULT_DOMAIN:
        said.append(f"method easy_ep, because the data has one labelled domain ({names[0]}); --method chooses another")
        return "easy_ep"
    said.append(
        f"method reap, because the data has {f'{len(names)} domains' if len(names) > 1 else 'no labelled domain'}; --method chooses another"
    )
    return "reap"


def _usual_keep(method: str, budget: str | None, said: list[str]) -> float | None:
    """The keep ratio if none is given: None for a method with a threshold of its own, unless another budget is asked for."""
    from expertsmith.methods import find

    if "threshold" in find(method).budgets and budget in (None, "threshold"):
        return None
    said.append("keep 0.5, because neither --keep nor --fit is given")
    return 0.5


def _apart(data: Sequence[str], said: list[str]) -> tuple[list[str], list[str]]:
    """Text to calibrate on and held-out text; what was set aside is appended to `said`."""
    from expertsmith.calibration.records import apart

    texts, held = apart(data)
    if held:
        said.append(f"held out: every eighth record of the data ({', '.join(held)}) measures quality and does not calibrate")
    if len(held) < len(data):
        few = [text for text in data if text in texts]
        said.append(f"nothing is held out from {', '.join(few)} (fewer than eight records, or a part); pass --eval-data")
    return texts, held


def _refuse_bfloat16(inventory: Inventory, requantise: bool, what: str) -> None:
    """--fit counts the weights as stored, so a quantised model must stay quantised."""
    if inventory.floats is not inventory and not requantise:
        raise UserError(
            f"--fit counts the quantised weights of {inventory.checkpoint.source}, but {what} makes all of them bfloat16",
            "pass --requantise",
        )


def _check_requantise(inventory: Inventory, made: Any, requantise: bool, heal: str | None, fitted: bool) -> None:
    """Whether --requantise has something to do, and is there where --fit needs it."""
    if requantise and not (made.merges or heal):
        raise UserError("--requantise has no effect: no expert is merged or healed", "leave it out")
    if fitted and made.merges:
        _refuse_bfloat16(inventory, requantise, "merging")


def _check_heal(method: str | None, data: Sequence[str], inventory: Inventory, requantise: bool, fitted: bool) -> None:
    """What can be known of a healing before anything is computed; None is none."""
    from expertsmith.healing.options import LAYERWISE, parse_healer

    if method is None:
        return
    parse_healer(method, {})
    if method not in LAYERWISE:
        raise UserError(
            f"compress heals layer by layer only, but --heal is {method}",
            f"choose {' or '.join(LAYERWISE)}, or run `expertsmith heal`",
        )
    if not data:
        raise UserError("healing needs text", "pass --data FILE")
    if fitted:
        _refuse_bfloat16(inventory, requantise, "--heal")
