"""How many experts fit into the memory of a machine: weights as stored, KV cache, and an allowance for the engine."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertsmith.arch.attention import LayerCache, UnknownCacheError, caches
from expertsmith.calibration.opening import window_of
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Claim, Inventory
from expertsmith.experts.rules import Rules, keep_count
from expertsmith.views.show import byte_count, ranges

if TYPE_CHECKING:
    from expertsmith.planning.plan import Plan

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# the part of the memory that an engine takes for weights, KV cache and activations unless it is told otherwise: vLLM's
# gpu_memory_utilization (newer versions take 0.92), and SGLang's mem_fraction_static (0.83 to 0.91, by the size of the memory)
SHARES = {"vllm": 0.9, "sglang": 0.85}
# Activations, logits, graphs and the engine itself. They depend on the batch more than on the model: 1 to 5 GB on memories of 24 to 80 GB.
ALLOWANCE = 0.05
CONTEXT = 32768  # tokens of KV cache where nobody says how many
KV_BYTES, STATE_BYTES = 2, 4  # bfloat16; states of linear attention and Mamba are float32


@dataclass(frozen=True)
class Memory:
    """`text` as it was given, and what it comes to in bytes: of the machine, and of that the engine's `share`."""

    text: str
    machine: int
    engine: str | None = None

    @property
    def share(self) -> float:
        """The part that the engine uses."""
        return SHARES[self.engine] if self.engine else 1.0

    @property
    def usable(self) -> int:
        """Bytes for weights, KV cache and allowance."""
        return int(self.machine * self.share)

    @property
    def allowance(self) -> int:
        """Bytes that are left to the engine."""
        return round(ALLOWANCE * self.usable)

    @property
    def said(self) -> str:
        """ "21.60 GB (vllm: 0.9 of 24.00 GB)"."""
        return byte_count(self.usable) + (
            f" ({self.engine}: {self.share:g} of {byte_count(self.machine)})" if self.engine else ""
        )


@dataclass(frozen=True)
class Fit:
    """What fits: `keep` experts a layer (a ratio where layers have different numbers), `tokens` of context that take `cache` bytes."""

    keep: float | int
    memory: Memory
    tokens: int
    cache: int

    def line(self, weights: int, kept: Sequence[tuple[int, int]]) -> str:
        """The account of one plan; `kept`: (kept, before) of its decoder layers."""
        pairs = sorted(set(kept))
        told = ", ".join(f"{count} of {experts} experts per layer" for count, experts in pairs)
        if len(pairs) > 1:
            told = f"{sum(count for count, _ in kept)} of {sum(experts for _, experts in kept)} experts in all layers"
        total = weights + self.cache + self.memory.allowance
        return (
            f"fit: weights {byte_count(weights)} + {_cached(self.tokens, self.cache)} + allowance {byte_count(self.memory.allowance)} "
            f"= {byte_count(total)} of {self.memory.said} → {told}"
        )

    def check(self, made: Plan, inventory: Inventory) -> None:
        """Put the account of a plan into its notes.

        Raises:
            UserError: the plan needs more, because its layers differ in size.
        """
        assert made.summary is not None
        weights, kept = (
            made.summary.bytes[1],
            [(len(entry.keep), entry.num_experts) for entry in made.of_decoder_layers().layers],
        )
        if weights + self.cache + self.memory.allowance > self.memory.usable:
            raise UserError(
                f"the plan does not fit: {self.line(weights, kept)}",
                "use --budget uniform, or --keep with a smaller number",
            )
        made.notes.append(self.line(weights, kept))
        if made.merges and (rewritten := as_bfloat16(inventory, made)) is not None:
            made.notes.append(
                f"fit counts the weights as stored: apply with --requantise, as merged weights are written in bfloat16 otherwise, "
                f"and all others with them ({byte_count(rewritten)})"
            )


def as_bfloat16(inventory: Inventory, made: Plan | None = None) -> int | None:
    """Bytes of a quantised checkpoint as bfloat16, after a plan if there is one; None where nothing is quantised."""
    if inventory.floats is inventory:
        return None
    kept = None if made is None else {entry.layer: len(entry.keep) for entry in made.layers}
    return 2 * inventory.floats.size(kept, mtp=made is None or made.mtp != "drop")[0]


def _cached(tokens: int, cache: int) -> str:
    return f"KV cache {byte_count(cache)} for {tokens:,} tokens" if tokens else "KV cache not counted (--context 0)"


def parse_memory(text: str) -> Memory:
    """ "24GB", "80 GiB", "vllm:24GB": GB is 10⁹ bytes, GiB 2³⁰.

    Raises:
        UserError: another form, an engine without a usual share, or no unit.
    """
    remedy = (
        f"give a size such as 24GB or 80GiB, for an engine vllm:24GB (GB is 10^9 bytes, GiB 2^30; engines: {', '.join(SHARES)})"
    )
    match = re.fullmatch(r"\s*(?:(\w[\w.]*)\s*:)?\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None:
        raise UserError(f"--fit {text!r} is not a size of memory", remedy)
    engine = match[1].lower() if match[1] else None
    if engine is not None and engine not in SHARES:
        raise UserError(f"--fit {text!r} names the engine {match[1]!r}, of which no usual share of memory is known", remedy)
    factor = {unit.lower(): size for unit, size in UNITS.items()}.get(match[3].lower())
    if factor is None:
        raise UserError(f"--fit {text!r} has {'no unit' if not match[3] else f'the unknown unit {match[3]!r}'}", remedy)
    size = round(float(match[2]) * factor)
    if size <= 0:
        raise UserError(f"--fit {text!r} is no memory at all", remedy)
    return Memory(str(text).strip(), size, engine)


def usual_context(inventory: Inventory) -> int:
    """Tokens of KV cache where nobody says how many: 32,768, or the model's window if that is less."""
    return min(CONTEXT, window_of(inventory.checkpoint.config))


# --- the KV cache ---


def layer_caches(inventory: Inventory) -> list[LayerCache]:
    """What every layer keeps of a sequence, from config.json and held to the tensors: the rows of a layer's key and value projections are the numbers
    that it keeps of a token. Layers of multi-token prediction are not counted.

    Raises:
        UnknownCacheError: the config does not tell, or the tensors tell something else.
    """
    record = inventory.architecture
    if record.cache_unknown:
        raise UnknownCacheError(f"{record.model_type}: {record.cache_unknown}")
    found = caches(inventory.config, record.state)
    parts, rest = divmod(len(found), inventory.num_layers)
    if rest:
        raise UnknownCacheError(f"config.json has {len(found)} layers, the tensors {inventory.num_layers}")
    try:
        claims = inventory.floats.by_layer
    except UserError:  # codes that cannot be decoded have shapes of their own
        return found
    for layer in range(inventory.num_layers):
        held, own = found[layer * parts : (layer + 1) * parts], claims.get(layer, [])
        rows = _rows(own)
        if rows and all(entry.token for entry in held) and rows != sum(entry.token for entry in held):
            raise UnknownCacheError(
                f"config.json gives decoder layer {layer} {sum(entry.token for entry in held)} numbers a token, its key and value weights {rows}"
            )
        if any(entry.index for entry in held) != any("index" in claim.rest for claim in own):
            raise UnknownCacheError(
                f"config.json and the tensors of decoder layer {layer} disagree about an indexer of sparse attention"
            )
    return found


def _rows(claims: Iterable[Claim]) -> int:
    """Rows of the weights that make keys and values of a token, or the latent; where keys are used as values, twice those. 0: not told, as
    they are stored with others."""
    rows = {"k_proj": 0, "v_proj": 0, "kv_a_proj_with_mqa": 0}
    for claim in claims:
        name, _, leaf = claim.rest.rpartition(".")
        name = name.rpartition(".")[2]
        if leaf == "weight" and name in rows and "index" not in claim.rest:
            rows[name] += claim.info.shape[0]
    return rows["kv_a_proj_with_mqa"] or rows["k_proj"] + (rows["v_proj"] or rows["k_proj"])


def cache_bytes(found: Iterable[LayerCache], tokens: int, config: Mapping[str, Any]) -> int:
    """Bytes that one sequence of `tokens` keeps: a layer with t numbers a token (i of an indexer), a window of w tokens and a state of s numbers
    takes 2·(t·min(tokens, w) + i·tokens) + 4·s bytes, as keys and values are bfloat16 and states float32, unless the config says otherwise."""
    if not tokens:
        return 0
    named = config.get("mamba_ssm_cache_dtype") or config.get("mamba_ssm_dtype")
    state = 2 if named in ("bfloat16", "float16") else STATE_BYTES
    return sum(
        KV_BYTES * (entry.token * min(tokens, entry.window or tokens) + entry.index * tokens) + state * entry.state
        for entry in found
    )


def counted(inventory: Inventory, tokens: int) -> int:
    """`cache_bytes` of a model.

    Raises:
        UnknownCacheError: it cannot be told.
    """
    return cache_bytes(layer_caches(inventory), tokens, inventory.config) if tokens else 0


def cache_account(inventory: Inventory) -> dict[str, Any]:
    """The KV cache in numbers: `bytes` for `tokens`, which are `bytes_per_token` for each of them and `constant_bytes` of windows and states; or why
    it is `unknown`."""
    tokens = usual_context(inventory)
    try:
        found = layer_caches(inventory)
    except UnknownCacheError as error:
        return {"unknown": str(error)}
    every = KV_BYTES * sum(entry.index + (0 if entry.window else entry.token) for entry in found)
    total = cache_bytes(found, tokens, inventory.config)
    return {"tokens": tokens, "bytes": total, "bytes_per_token": every, "constant_bytes": total - every * tokens}


# --- the number of experts ---


def largest(
    inventory: Inventory, rules: Mapping[int, Rules], memory: str, context: int | None = None, mtp: str = "keep"
) -> Fit:
    """The largest number of experts with which weights as stored + KV cache + allowance are no more than the memory.

    Args:
        rules: what every layer's router needs.
        context: tokens of KV cache; 0 counts weights only, None takes the usual number.

    Raises:
        UserError: no size, a KV cache of unknown size, a model that fits as it is, or one that does not fit with the fewest experts.
    """
    given, tokens, where = (
        parse_memory(memory),
        usual_context(inventory) if context is None else context,
        inventory.checkpoint.source,
    )
    try:
        cache = counted(inventory, tokens)
    except UnknownCacheError as error:
        raise UserError(
            f"the KV cache of {where} cannot be counted: {error}",
            "--context 0 counts the weights only; leave room for the cache",
        ) from None
    room = given.usable - given.allowance - cache
    whole = inventory.size(mtp=mtp == "keep")[1]
    account = f"{_cached(tokens, cache)} + allowance {byte_count(given.allowance)}"
    if whole <= room:
        raise UserError(
            f"{where} fits as it is: weights {byte_count(whole)} + {account} are within {given.said}",
            "nothing has to be removed; to remove experts anyway, pass --keep",
        )
    choices = _choices(inventory, rules)

    def size(entry: tuple[float | int, dict[int, int]]) -> int:
        return inventory.size(entry[1], mtp=mtp == "keep")[1]

    fitting = bisect_right(choices, room, key=size)
    if not fitting:
        rest = inventory.size(dict.fromkeys([*inventory.layers, *inventory.mtp_layers], 0), mtp=mtp == "keep")[1]
        least = (
            f"with {ranges(sorted(set(choices[0][1].values())))} experts per layer, the fewest for its router, "
            if choices
            else ""
        )
        raise UserError(
            f"{where} does not fit: {least}weights {byte_count(size(choices[0]) if choices else whole)} + {account} are more than "
            f"{given.said} (without routed experts the weights are {byte_count(rest)})",
            "give more memory, or less --context",
        )
    return Fit(choices[fitting - 1][0], given, tokens, cache)


def _choices(inventory: Inventory, rules: Mapping[int, Rules]) -> list[tuple[float | int, dict[int, int]]]:
    """(keep, experts by layer) for every keep that all routers can work with, the smallest first. Layers of multi-token prediction get the largest
    number, as in a plan."""
    most, alike = max(entry.num_experts for entry in rules.values()), len(set(rules.values())) == 1
    made = []
    for count in range(1, most):
        keep = count if alike else count / most
        try:
            counts = {layer: keep_count(keep, entry) for layer, entry in rules.items()}
        except UserError:  # fewer than a router needs, or not as many in every expert_group
            continue
        made.append((keep, counts | dict.fromkeys(inventory.mtp_layers, max(counts.values()))))
    return made
