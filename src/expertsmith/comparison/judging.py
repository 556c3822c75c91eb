"""Evaluation inputs other than text, for a model and its original: lm-eval tasks and prompts to continue, checked before loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.calibration.opening import window_of
from expertsmith.checkpoint import Checkpoint
from expertsmith.errors import UserError
from expertsmith.views.progress import Progress

if TYPE_CHECKING:
    from expertsmith.engine import LoadedModel
    from expertsmith.evaluation.tasks import Tasks

WHOLE = "tasks and generation run the model many times, so the whole model must be in memory"


def asking(
    opened: Sequence[Checkpoint],
    tasks: tuple[Sequence[str], Sequence[str | Path], int | None],
    prompts: tuple[Sequence[str], int, Sequence[str], Mapping[str, Any]],
    where: Mapping[str, str],
    keeping: Mapping[str, Any],
) -> Callable[[], dict[str, Any]]:
    """Check and prepare the questions for a model and its reference, before a model is loaded. Calling the result asks them."""
    names, folders, limit = tasks
    data, new_tokens, formats, drawing = prompts
    if not names and not new_tokens:
        return dict
    refuse_stream(where["memory"])
    from expertsmith.arch import text_config
    from expertsmith.calibration.prompts import load_prompts
    from expertsmith.evaluation import generation
    from expertsmith.evaluation.questions import Questions, Subject, ask

    tokenizer, fingerprint = _tokenizer_of(opened)
    questions = Questions(new_tokens=new_tokens)
    if names:
        questions.tasks = tasks_for(tokenizer, names, folders, limit, keeping["progress"])
    if new_tokens:
        config = opened[0].config
        room, vocab = min(window_of(entry.config) for entry in opened) - new_tokens, text_config(config).get("vocab_size")
        said: list[str] = []
        drawn = load_prompts(data, tokenizer, room=room, vocab_size=vocab, said=said, **drawing)
        for note in dict.fromkeys(said):
            keeping["progress"].note(note)
        questions.prompts = {domain: [prompt.ids for prompt in held] for domain, held in drawn.items()}
        questions.formats = generation.formats_of(formats, list(drawn))
        questions.responses = {
            domain: [prompt.response for prompt in held if prompt.response] for domain, held in drawn.items()
        }
        for domain in questions.formats:
            if tokenizer is None or not questions.responses[domain]:
                raise UserError(
                    f"--format checks answers, but the data of domain {domain} has none", "its records need prompt + response"
                )
    subjects = [
        Subject(
            name,
            {"model": entry.fingerprint, "tokenizer": fingerprint, "device": where["device"], "dtype": where["dtype"]},
            partial(resident, entry, **where),
        )
        for name, entry in zip(("model", "reference"), opened, strict=False)
    ]
    return partial(ask, questions, subjects, tokenizer, **keeping)


def refuse_stream(memory: str) -> None:
    """Refuse `memory` "stream": tasks and generation cannot run one layer at a time.

    Raises:
        UserError: `memory` is "stream".
    """
    if memory == "stream":
        raise UserError(WHOLE, "remove --memory stream, or use --data only")


def tasks_for(
    tokenizer: Any | None, names: Sequence[str], folders: Sequence[str | Path], limit: int | None, progress: Progress
) -> Tasks:
    """lm-eval tasks for a model with this tokenizer.

    Raises:
        UserError: no tokenizer; as `evaluation.tasks.find`.
    """
    from expertsmith.evaluation.tasks import find

    if tokenizer is None:
        raise UserError(
            "lm-eval tasks are text, but the model directory has no tokenizer (code from a checkpoint is not run)",
            "add the tokenizer files",
        )
    return find(names, folders, limit, progress)


def _tokenizer_of(opened: Sequence[Checkpoint]) -> tuple[Any | None, str]:
    """(common tokenizer of a model and its reference, fingerprint of its vocabulary and special tokens); None if neither has one.

    Raises:
        UserError: the two have different vocabularies.
    """
    from expertsmith.arch import text_config
    from expertsmith.calibration.data import load_tokenizer

    sizes = [text_config(entry.config).get("vocab_size") for entry in opened]
    if len(set(sizes)) > 1:
        raise UserError(f"the model predicts {sizes[0]} tokens, the reference {sizes[1]}", "they need the same vocabulary")
    found = [tokenizer for entry in opened if (tokenizer := load_tokenizer(entry.path)) is not None]
    if len(found) > 1 and found[0].get_vocab() != found[1].get_vocab():
        raise UserError(f"the tokenizers of {opened[0].source} and {opened[1].source} differ", "they need the same vocabulary")
    if not found:
        return None, ""
    text = json.dumps([sorted(found[0].get_vocab().items()), found[0].special_tokens_map], default=str)
    return found[0], f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@contextmanager
def resident(entry: Checkpoint, *, device: str, dtype: str, memory: str) -> Iterator[LoadedModel]:
    """Yield a whole model in memory, with its weights checked and its skip thresholds applied."""
    from expertsmith.arch import record_of
    from expertsmith.engine.devices import choose_device, choose_memory
    from expertsmith.engine.loading import load_model
    from expertsmith.surgery.mask import in_force

    where = choose_device(device)
    if choose_memory(memory, [entry], where, dtype) == "stream":
        raise UserError(f"{WHOLE}, and {entry.source} does not fit", "use a larger machine, or --data only")
    loaded = load_model(entry, record_of(entry.config), device=where, dtype=dtype)
    for index in range(len(loaded.layers)):
        loaded.bring(index)
    with in_force(loaded):
        yield loaded
