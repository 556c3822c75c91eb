"""`verify`: proof that a checkpoint is the original without the plan's experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from expertsmith.calibration.opening import inventory_of, token_data, window_of
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.output import check_output
from expertsmith.ranks import current
from expertsmith.verbs.definition import FLOW, Opt, verb
from expertsmith.verbs.options import Columns, Data, Dtype, Model, Opened, Placing, PlanGiven, SeqLen
from expertsmith.views import show

if TYPE_CHECKING:
    from expertsmith.checkpoint import Checkpoint
    from expertsmith.engine import Batch
    from expertsmith.planning.plan import Plan
    from expertsmith.surgery.verify import Verdict


class Proving(Placing, Opened, total=False):
    """Where the two models run, and how they are opened."""


@verb(
    FLOW,
    show=lambda verdict, given: show.show_verdict(verdict, layers=True),
    plain=lambda verdict, given: verdict.to_json(),
    ranks=True,
    passed=lambda verdict: verdict.passed,
)
def verify(
    model: Model,
    out: Annotated[str | Path, Opt("The checkpoint to verify.", argument=True, metavar="OUT", kind=Path)],
    *,
    plan: Annotated[PlanGiven | None, Opt("plan.json; default: the one inside OUT.", "--plan", kind=Path)] = None,
    data: Data = (),
    tokens: Annotated[int, Opt("Number of tokens to compare on.", least=1)] = 1024,
    seq_len: SeqLen = None,
    columns: Columns = None,
    tolerance: Annotated[float, Opt("Largest difference allowed, relative to the largest value of the same layer.")] = 1e-4,
    dtype: Dtype = "float32",
    **given: Unpack[Proving],
) -> Verdict:
    """Prove that OUT is MODEL without the dropped experts: bytes, every layer, logits. Exit code 1 if not.

    Leaves `OUT/expertsmith/verify.json`. Data-parallel: torchrun --nproc-per-node N -m expertsmith verify …

    Args:
        plan: None: the plan inside OUT.
        data: text to compare on; none: seeded random tokens, which reach experts that a narrow text would not.
        tokens: how many tokens to compare on, about.
        tolerance: largest difference allowed, relative to the largest reference value of the same layer (and of the logits).
    """
    from expertsmith.engine.devices import choose_device, choose_memory
    from expertsmith.planning.plan import load_plan
    from expertsmith.surgery import verify as proof

    progress = given["progress"]
    inventory = inventory_of(model, given["allow_pickle"])
    output = open_checkpoint(out)
    check_output(Path(out) / proof.VERDICT, "file", overwrite=True)
    loaded = load_plan(plan if plan is not None else proof.find_plan(Path(out)))
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
            columns=columns,
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
    ranks = current()
    ranks.agree("model, plan or text", lambda: _seen(inventory.checkpoint, output, loaded, batches))
    where = choose_device(given["device"])
    mode = choose_memory(given["memory"], [inventory.checkpoint, output], where, dtype, ranks)
    options: dict[str, Any] = {"memory": mode, "device": where, "dtype": dtype, "tolerance": tolerance}
    verdict = proof.verify(loaded, inventory, output, batches, progress=progress, ranks=ranks, **options)
    ranks.leading(lambda: proof.save_verdict(verdict, Path(out)))
    return verdict


def _seen(source: Checkpoint, output: Checkpoint, plan: Plan, batches: Sequence[Batch]) -> list[Any]:
    """All that a verdict depends on, in a form that ranks can compare."""
    ids = [batch.input_ids.tolist() for batch in batches]
    return [source.fingerprint, output.fingerprint, plan.model_dump(), ids]
