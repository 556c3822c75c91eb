"""The quality of the student on the held-out tokens of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from expertsmith.calibration.distributed import gathered, share
from expertsmith.engine import Batch, LoadedModel
from expertsmith.evaluation.quality import DomainQuality, Quality, measure
from expertsmith.views.progress import Progress


def measured(student: LoadedModel, batches: Sequence[Batch], teacher: LoadedModel, progress: Progress) -> Quality:
    """The quality of the student against the teacher; every rank runs its share of the batches, and all get the sums.

    Raises:
        UserError: see `evaluation.quality.measure`.
    """
    own = share(batches)
    if any(map(_predicts, own)) or not any(map(_predicts, batches)):  # without a token to predict anywhere, `measure` refuses
        return summed(measure(student, own, teacher, progress))
    return summed(Quality(has_reference=True))


def summed(quality: Quality) -> Quality:
    """The sums over all ranks of what each has measured, on sequences of its own."""
    parts = [part.domains for part in gathered(quality)]
    total = Quality(has_reference=quality.has_reference)
    for name in sorted(set().union(*parts)):
        entry = total.domains[name] = DomainQuality()
        for part in (part[name] for part in parts if name in part):
            for key in vars(entry):
                mine, theirs = getattr(entry, key), getattr(part, key)
                setattr(entry, key, mine | theirs if key == "rises" else mine + theirs)
    return total


def _predicts(batch: Batch) -> bool:
    return bool((batch.mask[:, 1:] & batch.mask[:, :-1]).any())
