"""What a model's attention keeps of the tokens it has seen (the KV cache), told from the text config: how many numbers, layer by layer.

A family's record names its states of linear attention, Mamba or convolution (`Architecture.state`), or says why the size cannot be told
(`Architecture.cache_unknown`). The tests hold every family's answer to the cache that transformers' class of it fills.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
FULL, SLIDING, CHUNKED, INDEXED, LINEAR, NONE = "full", "sliding", "chunked", "indexed", "linear", "none"
HYBRID, HYBRID_SLIDING = "hybrid", "hybrid_sliding"  # attention and a state of its own in one layer
WORDS = {  # the words of `layer_types` and of older lists
    "full_attention": FULL,
    "attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    "indexed_attention": INDEXED,
    "deepseek_sparse_attention": INDEXED,
    "minimax_m3_sparse": INDEXED,
    "linear_attention": LINEAR,
    "mamba": LINEAR,
    "conv": LINEAR,
    "hybrid": HYBRID,
    "hybrid_sliding": HYBRID_SLIDING,
    "moe": NONE,
    "mlp": NONE,
}
LETTERS = {"M": LINEAR, "*": FULL, "E": NONE, "-": NONE}  # Nemotron-H's `hybrid_override_pattern`


class UnknownCacheError(ValueError):
    """The config does not tell the size of the KV cache; the text says why."""


@dataclass(frozen=True)
class LayerCache:
    """How many numbers one layer keeps of a sequence.

    `token`: for each token, keys and values, or the latent that both are made from; `window`: of that many last tokens only (None: of all);
    `index`: for each token, the keys by which sparse attention finds its tokens; `state`: for the sequence, however long it is.
    """

    token: int = 0
    window: int | None = None
    index: int = 0
    state: int = 0


def caches(config: Config, state: Any = None) -> list[LayerCache]:
    """The `LayerCache` of every layer with attention or a state.

    With h key-value heads of width d (values: v), a layer of full attention keeps h·(d + v) numbers a token; with a latent of rank r (multi-head
    latent attention) and a rotary part of width p, r + p.

    Args:
        config: the text config.
        state: `Architecture.state` of its family.

    Raises:
        UnknownCacheError: a key is missing, or names a kind of attention that is not known here.
    """
    try:
        kinds = _kinds(config, state is not None)
        return [_layer(_of_layer(config, number, kind), number, kind, state) for number, kind in enumerate(kinds)]
    except KeyError as error:
        raise UnknownCacheError(f"config.json has no {error.args[0]}") from None
    except (TypeError, IndexError, AttributeError, ZeroDivisionError) as error:  # a key in an unheard-of form
        raise UnknownCacheError(f"config.json describes its attention in an unknown form ({error})") from None


def _number(config: Config, key: str) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnknownCacheError(f"config.json has the {key} {value!r}")
    return value


def _depth(config: Config) -> int:
    if "num_layers" in config and config.get("kv_lora_rank") is not None:  # LongCat has two attentions a layer
        return 2 * _number(config, "num_layers")
    return _number(config, "n_layers" if "n_layers" in config else "num_hidden_layers")


def _kinds(config: Config, has_state: bool) -> list[str]:
    """The kind of every layer: as the config lists them, or by the pattern that it gives."""
    listed = config.get("layer_types") or config.get("layers_block_type")
    if listed is None and config.get("hybrid_override_pattern"):
        return [LETTERS.get(letter) or _strange(letter) for letter in config["hybrid_override_pattern"]]
    if listed is None:
        return _patterned(config, has_state)
    if "layers_block_type" not in config:
        listed = listed[: _depth(config)]  # Step lists the layers of multi-token prediction as well
    return [WORDS.get(word) or _strange(word) for word in listed]


def _strange(word: Any) -> str:
    raise UnknownCacheError(f"config.json has layers of kind {word!r}")


def _patterned(config: Config, has_state: bool) -> list[str]:
    """Published configs without a list of layers."""
    layers = range(_depth(config))
    if has_state:
        return [_with_state(config, number) for number in layers]
    if isinstance(config.get("hybrid_layer_pattern"), list):  # MiMo: 1 is a layer with a window
        return [SLIDING if mark else FULL for mark in config["hybrid_layer_pattern"]]
    if config.get("attention_chunk_size"):  # Llama 4: layers without rotary positions see all tokens
        every = config.get("no_rope_layer_interval", 4)
        marks = config.get("no_rope_layers") or [(number + 1) % every for number in layers]
        return [CHUNKED if mark else FULL for mark in marks]
    sparse = config.get("sparse_attention_config")
    if isinstance(sparse, Mapping) and sparse.get("sparse_attention_freq"):  # MiniMax M3
        return [INDEXED if mark else FULL for mark in sparse["sparse_attention_freq"]]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < (config.get("max_position_embeddings") or 0):
        raise UnknownCacheError("config.json has a sliding_window, but does not say for which layers")
    return [INDEXED if config.get("index_head_dim") else FULL for _ in layers]


def _with_state(config: Config, number: int) -> str:
    """The kind of a layer in families of which some have a state."""
    if config.get("full_attention_interval"):  # Qwen3-Next
        return LINEAR if (number + 1) % _number(config, "full_attention_interval") else FULL
    if config.get("layer_group_size"):  # Ling 2.5
        return LINEAR if (number + 1) % _number(config, "layer_group_size") else FULL
    if config.get("attn_layer_period"):  # Jamba
        return FULL if number % _number(config, "attn_layer_period") == config["attn_layer_offset"] else LINEAR
    if isinstance(config.get("linear_attn_config"), Mapping):  # Kimi Linear counts its layers from 1
        return FULL if number + 1 in config["linear_attn_config"]["full_attn_layers"] else LINEAR
    if config.get("local_layer_ids") is not None:  # Inkling
        return HYBRID_SLIDING if number in config["local_layer_ids"] else HYBRID
    raise UnknownCacheError("config.json does not say which layers have attention and which a state")


def _of_layer(config: Config, number: int, kind: str) -> dict[str, Any]:
    """The config of one layer, under the usual names: with what `per_layer_config`, keys that begin with swa_ (layers with a window) and
    Gemma's for global layers say of it."""
    made = dict(config)
    if kind in (SLIDING, HYBRID_SLIDING):
        made |= {
            key.removeprefix("swa_"): value for key, value in config.items() if key.startswith("swa_") and value is not None
        }
    if kind == FULL and config.get("global_head_dim"):
        made["head_dim"] = config["global_head_dim"]
        if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads"):
            made["num_key_value_heads"] = config["num_global_key_value_heads"]
    own = config.get("per_layer_config") or {}
    return made | dict(own.get(str(number)) or own.get(number) or {})


def _layer(config: Config, number: int, kind: str, state: Any) -> LayerCache:
    shared = config.get("num_kv_shared_layers") or 0
    if kind == NONE or (shared and number >= _depth(config) - shared):  # Gemma's last layers read the cache of earlier ones
        return LayerCache()
    kept = 0
    if kind in (LINEAR, HYBRID, HYBRID_SLIDING):
        if state is None:
            raise UnknownCacheError(
                "config.json has layers with a state (linear attention, Mamba or convolution) whose size is not known"
            )
        kept = state(config)
    if kind == LINEAR:
        return LayerCache(state=kept)
    window = None
    if kind == CHUNKED:
        window = _number(config, "attention_chunk_size")
    elif kind in (SLIDING, HYBRID_SLIDING):
        window = _number(config, "sliding_window_size" if "sliding_window_size" in config else "sliding_window")
    return LayerCache(_of_token(config), window, _index(config, number) if kind == INDEXED else 0, kept)


def _of_token(config: Config) -> int:
    if config.get("kv_lora_rank") is not None:
        return _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")
    if isinstance(config.get("attn_config"), Mapping):  # DBRX
        return 2 * _number(config["attn_config"], "kv_n_heads") * (_number(config, "d_model") // _number(config, "n_heads"))
    groups = config.get("num_key_value_heads") or config.get("num_attention_groups")  # Step's name
    return (groups or _number(config, "num_attention_heads")) * (width(config) + (config.get("v_head_dim") or width(config)))


def width(config: Config) -> int:
    """Numbers of a key head."""
    return config.get("head_dim") or _number(config, "hidden_size") // _number(config, "num_attention_heads")


def _index(config: Config, number: int) -> int:
    """Numbers of a token's key in the indexer of sparse attention: none in a layer that takes over the choice of an earlier one."""
    kinds = config.get("indexer_types") or config.get("index_topk_pattern")
    if kinds:
        shared = kinds[number] in ("shared", "S")
    else:
        offset, every = config.get("index_skip_topk_offset", 2), max(config.get("index_topk_freq") or 1, 1)
        shared = max(number - offset + 1, 0) % every != 0
    sparse = config.get("sparse_attention_config")
    held = _number(sparse, "sparse_index_dim") if isinstance(sparse, Mapping) else _number(config, "index_head_dim")
    pooled = config.get("index_kpool") is not None  # GLM 5 keeps a score for each number, and whether the token counts
    return 0 if shared else 2 * held + 1 if pooled else held


# --- states of a layer, in numbers a sequence: that of a short convolution over the last tokens, and the recurrent one ---


def delta_state(config: Config) -> int:
    """Gated delta net: k heads of width d for queries and keys, v of width e, convolution over c tokens: (2kd + ve)·c + v·d·e."""
    key = _number(config, "linear_key_head_dim")
    value = _number(config, "linear_num_value_heads") * _number(config, "linear_value_head_dim")
    channels = 2 * _number(config, "linear_num_key_heads") * key + value
    return channels * _number(config, "linear_conv_kernel_dim") + value * key


def kda_state(config: Config) -> int:
    """Kimi delta attention: h heads of width d, convolution over c tokens: 3hd·c + h·d²."""
    own = config.get("linear_attn_config")
    if isinstance(own, Mapping):
        heads, wide, kernel = (_number(own, key) for key in ("num_heads", "head_dim", "short_conv_kernel_size"))
    else:
        heads, wide, kernel = (
            _number(config, key) for key in ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        )
    return 3 * heads * wide * kernel + heads * wide * wide


def bailing_state(config: Config) -> int:
    """`kda_state` with as many heads as attention; `head_dim` is theirs, but transformers writes that of the rotary part there."""
    named = "linear_head_dim" if "linear_head_dim" in config else "head_dim"
    heads, wide, kernel = (_number(config, key) for key in ("num_attention_heads", named, "short_conv_kernel_size"))
    return 3 * heads * wide * kernel + heads * wide * wide


def mamba_state(config: Config) -> int:
    """Mamba: i inner channels, states of s numbers, convolution over c tokens: i·c + i·s."""
    inner = _number(config, "mamba_expand") * _number(config, "hidden_size")
    return inner * (_number(config, "mamba_d_conv") + _number(config, "mamba_d_state"))


def mamba2_state(config: Config) -> int:
    """Mamba 2: i inner channels in g groups, states of s numbers, convolution over c tokens: (i + 2gs)·c + i·s."""
    inner = _number(config, "mamba_expand") * _number(config, "hidden_size")
    held = _number(config, "mamba_d_state")
    return (inner + 2 * _number(config, "mamba_n_groups") * held) * _number(config, "mamba_d_conv") + inner * held


def nemotron_state(config: Config) -> int:
    """`mamba2_state` under Nemotron-H's names."""
    inner = _number(config, "mamba_num_heads") * _number(config, "mamba_head_dim")
    held = _number(config, "ssm_state_size")
    return (inner + 2 * _number(config, "n_groups") * held) * _number(config, "conv_kernel") + inner * held


def convolution_state(config: Config) -> int:
    """LFM2's short convolution over c tokens: hidden size · c."""
    return _number(config, "hidden_size") * _number(config, "conv_L_cache")


def lightning_state(config: Config) -> int:
    """MiniMax's lightning attention: h heads of width d: h·d²."""
    return _number(config, "num_attention_heads") * width(config) ** 2


def inkling_state(config: Config) -> int:
    """Inkling's convolutions over c tokens, on keys, values and what attention and experts add to the stream: (keys and values of a token + 2 · hidden
    size)·c."""
    kernel = "sconv_kernel_size" if "sconv_kernel_size" in config else "conv_kernel_size"
    return (_of_token(config) + 2 * _number(config, "hidden_size")) * _number(config, kernel)


def zaya_state(config: Config) -> int:
    """Zaya's two convolutions over c1 and c2 tokens on queries and keys, and the half of the values that comes a token late:
    (queries + keys)·(c1 + c2 − 2) + values / 2."""
    heads = _number(config, "num_key_value_heads")
    channels = (_number(config, "num_attention_heads") + heads) * width(config)
    return channels * (_number(config, "cca_time0") + _number(config, "cca_time1") - 2) + heads * width(config) // 2
