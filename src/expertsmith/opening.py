"""From what a user names (paths, specs, words) to what the stages work on: token data and loaded models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.arch import text_config
from expertsmith.inventory import Inventory
from expertsmith.progress import Progress

if TYPE_CHECKING:
    from expertsmith.calibration.data import TokenData
    from expertsmith.engine import LoadedModel

ENDLESS = 2**31  # the window of a model whose config.json names none


def window_of(config: Mapping[str, Any]) -> int:
    """The longest sequence that the model has positions for."""
    for key in ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions"):
        value = text_config(config).get(key)
        if isinstance(value, int) and value > 1:
            return value
    return ENDLESS


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
    """Token ids of `data` for the model in `path`; `options` are those of `calibration.data.DataOptions`."""
    from expertsmith.calibration.data import DataOptions, load_tokenizer, load_tokens

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
) -> LoadedModel:
    """The model of a checkpoint, resident or streamed; with `router_groups` "flatten" its router does without expert_groups."""
    from expertsmith.engine.loading import choose_device, choose_memory, load_model

    where = choose_device(device)
    mode = choose_memory(memory, [inventory.checkpoint], where, dtype)
    progress.note(f"{inventory.architecture.title}: {mode} on {where}")
    record = inventory.architecture
    overrides = record.one_group if router_groups == "flatten" else {}
    return load_model(inventory.checkpoint, record, memory=mode, device=where, dtype=dtype, config_overrides=overrides)


def beside(path: str | Path, suffix: str) -> Path:
    """`<path>.<suffix>`."""
    target = Path(path)
    return target.with_name(f"{target.name}.{suffix}")
