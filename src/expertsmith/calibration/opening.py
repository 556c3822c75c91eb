"""Turn the user's paths, data specifications and options into token data and loaded models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.arch import record_of, refuse_without_class, text_config, treated_as
from expertsmith.calibration.spec import other_reading
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory
from expertsmith.ranks import ALONE, Ranks
from expertsmith.views.progress import Progress

if TYPE_CHECKING:
    from expertsmith.calibration.data import TokenData
    from expertsmith.engine import LoadedModel

ENDLESS = 2**31  # the window if config.json gives none


def inventory_of(model: Any, allow_pickle: bool = False, *, novices: bool = False) -> Inventory:
    """The inventory of a checkpoint; an `Inventory` is returned unchanged. `novices`: as in `take_inventory`."""
    if isinstance(model, Inventory):
        return model
    return take_inventory(open_checkpoint(model, allow_pickle=allow_pickle), novices=novices)


def window_of(config: Mapping[str, Any]) -> int:
    """The longest sequence that the model has positions for."""
    for key in ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions"):
        value = text_config(config).get(key)
        if isinstance(value, int) and value > 1:
            return value
    return ENDLESS


@contextmanager
def opened_as(model: Any, as_type: str | None, **opening: Any) -> Iterator[None]:
    """Within the context, treat MODEL and every checkpoint of its model_type as the family `as_type`; `opening` goes to `open_checkpoint`.

    Raises:
        UserError: an unknown family, or one whose class has other tensors or shapes than MODEL.
    """
    if as_type is None:
        yield
        return
    if isinstance(model, Inventory):
        raise UserError(f"the model is already open and cannot be treated as {as_type}", "pass its path")
    checkpoint = open_checkpoint(model, **opening)
    where = f"{checkpoint.source}/config.json"
    with treated_as(checkpoint.config, as_type, _text_prefix(checkpoint.config, checkpoint.tensors), where) as record:
        from expertsmith.engine.checks import check_fits

        check_fits(checkpoint, record)
        yield


def _text_prefix(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """The prefix of the language model's tensor names in a composite, such as "language_model."; empty for any other model."""
    if text_config(config) is config:
        return ""
    found = (re.match(r"(.*?)model\.layers\.\d+\.", name) for name in names)
    return next((match[1] for match in found if match), "")


def token_data(
    path: Path,
    config: Mapping[str, Any],
    data: Sequence[str],
    progress: Progress,
    *,
    seq_len: int | None = None,
    overlap: int = 0,
    **options: Any,
) -> TokenData:
    """Token ids of `data` for the model in `path`; `options` are other fields of `calibration.data.DataOptions`.

    Raises:
        UserError: a model that cannot be run, or data that cannot be read.
    """
    refuse_without_class(record_of(config), f"{path}/config.json")
    from expertsmith.calibration.data import DataOptions, load_tokenizer, load_tokens

    for said in filter(None, map(other_reading, data)):
        progress.note(said)
    window = window_of(config)
    length = seq_len if seq_len is not None else min(2048, window)
    if length != window:  # a full window has no position for the token that is only predicted
        length += overlap
    settings = DataOptions(seq_len=length, overlap=overlap, **options)
    vocab = text_config(config).get("vocab_size")
    tokens = load_tokens(
        data, load_tokenizer(path), settings, None if window == ENDLESS else window, vocab if isinstance(vocab, int) else None
    )
    counts = ", ".join(
        f"{name} {number:,} in {len(tokens.sequences[name])} sequences" for name, number in tokens.tokens.items()
    )
    for said in tokens.notes:
        progress.note(said)
    progress.note(f"tokens: {counts}")
    return tokens


def open_model(
    inventory: Inventory,
    progress: Progress,
    *,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    router_groups: str = "keep",
    mtp: bool = False,
    ranks: Ranks = ALONE,
) -> LoadedModel:
    """Load the model of a checkpoint, resident or streamed. `router_groups` "flatten" removes the router's expert_groups; `mtp` adds the
    multi-token-prediction layer, if it can be run; `ranks`: all of these load it, in the same memory mode."""
    from expertsmith.engine.devices import choose_device, choose_memory
    from expertsmith.engine.loading import load_model

    where = choose_device(device)
    mode = choose_memory(memory, [inventory.checkpoint], where, dtype, ranks)
    progress.note(f"{inventory.architecture.title}: {mode} on {where}")
    record = inventory.architecture
    overrides = record.one_group if router_groups == "flatten" else {}
    made = load_model(inventory.checkpoint, record, memory=mode, device=where, dtype=dtype, config_overrides=overrides, mtp=mtp)
    if len(set(made.places)) > 1:
        progress.note(f"the model is spread over {len(set(made.places))} GPUs")
    return made


def beside(path: str | Path, suffix: str) -> Path:
    """`<path>.<suffix>`."""
    target = Path(path)
    return target.with_name(f"{target.name}.{suffix}")
