"""Check that a teacher fits its student, from configs and headers, before anything is loaded."""

from __future__ import annotations

from expertsmith.arch import record_of
from expertsmith.checkpoint import Checkpoint
from expertsmith.engine.building import transformers_config
from expertsmith.errors import UserError
from expertsmith.planning.earlier import PLAN, originals

FACTS = {"decoder layers": "num_hidden_layers", "hidden size": "hidden_size", "vocabulary": "vocab_size"}


def check_pair(student: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher whose layers do not match the student's, or that is not a model from which the student was made: the one to which its plan
    was applied, or, as the plans of earlier steps inside it tell, one before that.

    A dense teacher is not compared with the plan: a plan does not record which dense model was converted.

    Raises:
        UserError: a different number of decoder layers, hidden size or vocabulary, or a different model.
    """
    mine, theirs = (transformers_config(entry).get_text_config() for entry in (student, teacher))
    for name, key in FACTS.items():
        ours, other = (getattr(config, key, None) for config in (mine, theirs))
        if ours != other:
            raise UserError(
                f"teacher and student do not match: {name} {other} of {teacher.source} and {ours} of {student.source}",
                "give the model that the student was made from",
            )
    wanted = originals(student.path) if record_of(teacher.config) is not None else []
    if wanted and teacher.fingerprint not in wanted:
        raise UserError(
            f"the teacher {teacher.source} is not the original of {student.source}: its fingerprint is {_short(teacher.fingerprint)}, "
            f"and {student.path / PLAN} names {', made from '.join(map(_short, wanted))}",
            "give the model that this plan was applied to",
        )


def _short(fingerprint: str) -> str:
    return fingerprint[:19]
