"""Whether a teacher can be one: known from configs and headers, before anything is loaded."""

from __future__ import annotations

from expertsmith.arch import record_of
from expertsmith.checkpoint import Checkpoint
from expertsmith.engine.loading import transformers_config
from expertsmith.errors import UserError
from expertsmith.planning.plan import load_plan

FACTS = {"decoder layers": "num_hidden_layers", "hidden size": "hidden_size", "vocabulary": "vocab_size"}


def check_pair(student: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher that the student cannot follow layer by layer, or that is not the model which the student's plan was applied to.

    A dense teacher is taken as it is: a plan does not know what a converted model was made of.

    Raises:
        UserError: another number of decoder layers, another hidden size, another vocabulary, or another model.
    """
    mine, theirs = (transformers_config(entry).get_text_config() for entry in (student, teacher))
    for name, key in FACTS.items():
        ours, other = (getattr(config, key, None) for config in (mine, theirs))
        if ours != other:
            raise UserError(
                f"teacher and student do not match: {name} {other} of {teacher.source} and {ours} of {student.source}",
                "give the model that the student was made from",
            )
    plan = student.path / "expertsmith" / "plan.json"
    if record_of(teacher.config) is not None and plan.is_file():
        wanted = load_plan(plan).model.fingerprint
        if teacher.fingerprint != wanted:
            raise UserError(
                f"the teacher {teacher.source} is not the original of {student.source}: its fingerprint is {_short(teacher.fingerprint)}, "
                f"and {plan} names {_short(wanted)}",
                "give the model that this plan was applied to",
            )


def _short(fingerprint: str) -> str:
    return fingerprint[:19]
