"""As many experts as fit: sizes of memories, KV caches held to those that transformers fills, the largest count, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from conftest import RUN, loaded_plainly, run_cli
from expertsmith import api
from expertsmith.arch import families
from expertsmith.arch.attention import LayerCache, UnknownCacheError, caches
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory
from expertsmith.planning.fit import Fit, cache_account, cache_bytes, largest, layer_caches, parse_memory
from expertsmith.planning.job import rules_of
from expertsmith.planning.plan import Merge, Plan
from expertsmith.verbs.recipe import load_recipe
from mtp import save_with_mtp
from quantise import quantise_checkpoint


def opened(path: Path | str) -> Inventory:
    return take_inventory(open_checkpoint(path))


def fitted(inventory: Inventory, room: int, mtp: str = "keep", groups: str = "keep") -> Fit:
    """What fits into `room` bytes of weights: the memory of which they, without a KV cache, are 95 %."""
    memory = next(size for size in range(int(room / 0.95) - 2, int(room / 0.95) + 4) if size - round(0.05 * size) == room)
    return largest(inventory, rules_of(inventory, groups), f"{memory / 1000:.3f}kB", 0, mtp)


# ---- memories


@pytest.mark.parametrize(
    ("text", "machine", "usable"),
    [
        ("24GB", 24 * 10**9, 24 * 10**9),
        ("80GiB", 80 * 2**30, 80 * 2**30),
        ("1.5 tb", 15 * 10**11, 15 * 10**11),
        ("vllm:24GB", 24 * 10**9, 216 * 10**8),
        ("SGLang: 24 GB", 24 * 10**9, 204 * 10**8),
        ("640MiB", 640 * 2**20, 640 * 2**20),
    ],
)
def test_a_memory_is_a_size_with_its_unit_and_perhaps_an_engine_s_share_of_it(text, machine, usable):
    memory = parse_memory(text)
    assert (memory.machine, memory.usable) == (machine, usable)
    assert memory.allowance == usable // 20  # 5 %


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("24", "no unit"), ("24Gb/s", "not a size"), ("24G", "unknown unit"), ("0GB", "no memory"), ("much", "not a size"),
        ("-3GB", "not a size"), ("llama.cpp:24GB", "engine"), ("vllm:", "not a size"), ("", "not a size"),
    ],
)  # fmt: skip
def test_another_form_is_refused_with_an_example(text, found):
    with pytest.raises(UserError, match=found) as error:
        parse_memory(text)
    assert "24GB or 80GiB" in error.value.remedy


# ---- the KV cache: worked by hand from published configs

QWEN3 = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 2048}
QWEN3 |= {"sliding_window": None, "use_sliding_window": False, "max_position_embeddings": 40960}
DEEPSEEK = {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 7168}
DEEPSEEK |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
MIXTRAL = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
QWEN2 = MIXTRAL | {"use_sliding_window": False, "sliding_window": 32768, "max_position_embeddings": 131072}
GPT_OSS = {"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_size": 2880}
GPT_OSS |= {"layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128}
LLAMA4 = {"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 5120}
LLAMA4 |= {"attention_chunk_size": 8192, "no_rope_layers": []}
MIMO = {"num_hidden_layers": 6, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128}
MIMO |= {"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0], "sliding_window_size": 128, "hidden_size": 4096}
MIMO |= {"swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128}
GEMMA = {"num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "hidden_size": 2816}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 1024, "global_head_dim": 512}
GEMMA |= {"num_global_key_value_heads": 2, "attention_k_eq_v": True}
DBRX = {"n_layers": 40, "d_model": 6144, "n_heads": 48, "attn_config": {"kv_n_heads": 8}}
LONGCAT = {"num_layers": 28, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("config", "tokens", "wanted"),
    [
        (QWEN3, 1, 48 * 4 * (128 + 128) * 2),  # 98 304
        (QWEN3, 1000, 98_304_000),
        (DEEPSEEK, 1, 61 * (512 + 64) * 2),  # 70 272
        (DEEPSEEK | {"index_head_dim": 128, "index_topk": 2048}, 1, 61 * (576 + 128) * 2),  # V3.2
        (MIXTRAL, 1, 32 * 8 * (128 + 128) * 2),  # heads of 4096 / 32
        (QWEN2, 100_000, 100_000 * 32 * 8 * 256 * 2),  # a window that is not in use
        (GPT_OSS, 100, 24 * 8 * 128 * 2 * 100),
        (GPT_OSS, 32768, 8 * 128 * 2 * (12 * 32768 + 12 * 128)),
        (LLAMA4, 10_000, 8 * 256 * 2 * (12 * 10_000 + 36 * 8192)),  # every fourth layer sees all tokens
        (MIMO, 1000, 2 * (2 * 4 * 320 * 1000 + 4 * 8 * 320 * 128)),
        (GEMMA, 2000, 2 * (8 * 512 * 1024 + 2 * 1024 * 2000)),
        (
            GEMMA | {"layer_types": ["full_attention", "sliding_attention"], "num_kv_shared_layers": 1},
            2000,
            2 * 2 * 1024 * 2000,
        ),
        (DBRX, 1, 40 * 8 * (128 + 128) * 2),
        (LONGCAT, 1, 2 * 28 * 576 * 2),
    ],
)
def test_bytes_of_the_cache(config, tokens, wanted):
    assert cache_bytes(caches(config), tokens, config) == wanted


QWEN3_NEXT = {
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_size": 2048,
}
QWEN3_NEXT |= {"full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128}
QWEN3_NEXT |= {"linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32}
KIMI = {"num_hidden_layers": 27, "num_attention_heads": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "hidden_size": 2304}
KIMI["linear_attn_config"] = {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "num_heads": 32, "head_dim": 128}
KIMI["linear_attn_config"] |= {"short_conv_kernel_size": 4}
NEMOTRON = {"hybrid_override_pattern": "MEM*E-", "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128}
NEMOTRON |= {"mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4}
JAMBA = {"num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
JAMBA |= {"attn_layer_period": 8, "attn_layer_offset": 4, "mamba_expand": 2, "mamba_d_conv": 4, "mamba_d_state": 16}


@pytest.mark.parametrize(
    ("model_type", "config", "token", "state"),
    [
        # channels 2·2048 + 4096 over 4 tokens, and 32 states of 128 · 128
        ("qwen3_next", QWEN3_NEXT, 12 * 2 * 512, 36 * (8192 * 4 + 32 * 128 * 128)),
        ("kimi_linear", KIMI, 7 * 576, 20 * (3 * 4096 * 4 + 32 * 128 * 128)),
        ("nemotron_h", NEMOTRON, 2 * 256, 2 * ((4096 + 2 * 8 * 128) * 4 + 4096 * 128)),
        ("jamba", JAMBA, 8 * 256, 7 * (8192 * 4 + 8192 * 16)),
    ],
)
def test_layers_with_a_state_take_the_same_however_long_the_text_is(model_type, config, token, state):
    found = caches(config, families()[model_type].state)
    assert sum(entry.token for entry in found) == token
    assert sum(entry.state for entry in found) == state
    assert cache_bytes(found, 1000, config) == 2 * 1000 * token + 4 * state
    assert cache_bytes(found, 1000, {**config, "mamba_ssm_cache_dtype": "bfloat16"}) == 2 * 1000 * token + 2 * state
    assert cache_bytes(found, 0, config) == 0


@pytest.mark.parametrize(
    ("config", "state", "why"),
    [
        ({"num_hidden_layers": 2}, None, "no num_attention_heads"),
        ({**QWEN3, "num_hidden_layers": None}, None, "num_hidden_layers None"),
        ({**QWEN3, "layer_types": ["full_attention", "retention"]}, None, "'retention'"),
        ({**QWEN3, "layer_types": ["linear_attention"]}, None, "size is not known"),
        ({**MIXTRAL, "sliding_window": 4096, "max_position_embeddings": 32768}, None, "for which layers"),
        ({**GPT_OSS, "sliding_window": None}, None, "sliding_window None"),
        ({**DEEPSEEK, "qk_rope_head_dim": None}, None, "qk_rope_head_dim None"),
        ({key: value for key, value in QWEN3_NEXT.items() if key != "full_attention_interval"}, "qwen3_next", "which a state"),
        (
            {key: value for key, value in QWEN3_NEXT.items() if key != "linear_key_head_dim"},
            "qwen3_next",
            "linear_key_head_dim",
        ),
    ],
)
def test_what_the_config_does_not_tell_is_not_guessed(config, state, why):
    with pytest.raises(UnknownCacheError, match=why):
        caches(config, families()[state].state if state else None)


# ---- the KV cache: held to transformers

UNTOLD = {
    "deepseek_v4": "compressed",
    "qwen4_exp_text": "n-gram",
    "mimo_v2_flash": "decoder layer 1",  # transformers writes no key for the heads of its sliding layers; published configs have one
}


def numbers_in(value: Any, seen: set[int]) -> int:
    """Floating-point numbers in a cache object of transformers."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.numel() if value.is_floating_point() else 0
    if isinstance(value, list | tuple):
        return sum(numbers_in(entry, seen) for entry in value)
    if isinstance(value, dict):
        return sum(numbers_in(entry, seen) for entry in value.values())
    held = type(value).__module__.startswith("transformers") and "Config" not in type(value).__name__
    return numbers_in(vars(value), seen) if held and hasattr(value, "__dict__") else 0


def filled(path: Path, tokens: int) -> int:
    """Numbers in the cache of a forward pass."""
    ids = torch.randint(3, 60, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return numbers_in(loaded_plainly(path)(ids, use_cache=True).past_key_values, set())


def counted(found: list[LayerCache], tokens: int) -> int:
    """The same by our count. transformers keeps a window's tokens but for the current one, which `LayerCache` counts."""
    windows = [tokens if entry.window is None else min(tokens, entry.window - 1) for entry in found]
    return sum(entry.token * held + entry.index * tokens + entry.state for entry, held in zip(found, windows, strict=True))


@pytest.mark.parametrize("model_type", RUN)
def test_every_family_s_cache_is_as_large_as_that_of_its_class_or_declared_unknown(checkpoints, model_type):
    inventory = opened(checkpoints(model_type))
    if model_type in UNTOLD:
        with pytest.raises(UnknownCacheError, match=UNTOLD[model_type]):
            layer_caches(inventory)
        assert UNTOLD[model_type] in cache_account(inventory)["unknown"]
        return
    found = layer_caches(inventory)
    for tokens in (6, 40):
        assert counted(found, tokens) == filled(checkpoints(model_type), tokens)


def edited(source: Path, target: Path, **keys: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | keys))
    return target


def test_heads_of_sliding_layers_as_published_configs_of_mimo_tell_them(checkpoints, tmp_path):
    source = checkpoints("mimo_v2_flash")
    found = layer_caches(opened(edited(source, tmp_path / "m", swa_num_key_value_heads=4, swa_head_dim=12, swa_v_head_dim=8)))
    assert counted(found, 40) == filled(source, 40)


def test_a_config_that_contradicts_the_tensors_is_not_believed(checkpoints, tmp_path):
    inventory = opened(edited(checkpoints("mixtral"), tmp_path / "m", num_key_value_heads=4))
    with pytest.raises(UnknownCacheError, match="gives decoder layer 0 64 numbers a token, its key and value weights 32"):
        layer_caches(inventory)
    without = json.loads((checkpoints("deepseek_v32") / "config.json").read_text())["num_hidden_layers"] * ["full_attention"]
    inventory = opened(edited(checkpoints("deepseek_v32"), tmp_path / "d", layer_types=without))
    with pytest.raises(UnknownCacheError, match="indexer"):
        layer_caches(inventory)


def test_quantised_attention_is_seen_through_the_float_view(checkpoints, tmp_path):
    quantise_checkpoint(checkpoints("mixtral"), tmp_path / "q", "fp8_block")
    assert layer_caches(opened(tmp_path / "q")) == layer_caches(opened(checkpoints("mixtral")))


# ---- the largest number of experts


@pytest.mark.parametrize(
    ("model_type", "counts"), [("mixtral", range(2, 8)), ("deepseek_v3", (4, 6)), ("gpt_oss", range(2, 8))]
)
def test_the_largest_count_that_fits_to_the_byte(checkpoints, model_type, counts):
    """DeepSeek's router has 2 expert_groups and takes 2 experts of one, with 2 at least in each."""
    inventory = opened(checkpoints(model_type))
    sizes = {count: inventory.size(dict.fromkeys(inventory.layers, count))[1] for count in counts}
    for smaller, count in zip((None, *counts), counts, strict=False):
        assert fitted(inventory, sizes[count]).keep == count
        if smaller is not None:
            assert fitted(inventory, sizes[count] - 1).keep == smaller
    with pytest.raises(UserError, match=rf"does not fit: with {counts[0]} experts per layer, the fewest"):
        fitted(inventory, sizes[counts[0]] - 1)
    with pytest.raises(UserError, match="fits as it is"):
        fitted(inventory, inventory.size()[1])
    assert fitted(inventory, inventory.size()[1] - 1).keep == counts[-1]


def test_flattened_groups_allow_more_counts(checkpoints):
    inventory = opened(checkpoints("deepseek_v3"))
    sizes = {count: inventory.size(dict.fromkeys(inventory.layers, count))[1] for count in (5, 7)}
    assert [fitted(inventory, size, groups="flatten").keep for size in sizes.values()] == [5, 7]


def test_the_cache_and_the_allowance_take_their_part(checkpoints):
    inventory = opened(checkpoints("mixtral"))  # 3 layers, 2 heads of 8: 192 bytes a token
    size = inventory.size(dict.fromkeys(inventory.layers, 4))[1]
    memory = -(-(size + 192 * 100) * 100 // 95) + 2
    found = largest(inventory, rules_of(inventory, "keep"), f"{memory / 1000:.3f}kB", 100)
    assert (found.keep, found.cache, found.tokens) == (4, 19_200, 100)
    assert size + found.cache + found.memory.allowance <= found.memory.usable
    assert largest(inventory, rules_of(inventory, "keep"), f"{memory / 1000:.3f}kB", 110).keep == 3
    assert largest(inventory, rules_of(inventory, "keep"), f"{memory / 1000:.3f}kB").tokens == 256  # the model's window


def test_layers_of_multi_token_prediction_weigh_too(tmp_path):
    save_with_mtp("deepseek_v3", tmp_path / "mtp")
    inventory = opened(tmp_path / "mtp")
    assert inventory.mtp_layers
    counts = dict.fromkeys([*inventory.layers, *inventory.mtp_layers], 4)
    assert fitted(inventory, inventory.size(counts)[1]).keep == 4
    assert fitted(inventory, inventory.size(counts, mtp=False)[1], mtp="drop").keep == 4


def test_layers_with_different_numbers_keep_one_ratio(checkpoints, tmp_path):
    plan = api.plan(checkpoints("mixtral"), "aimer", 0.75)
    for number, count in enumerate((4, 8, 6)):
        plan.layers[number] = plan.layers[number].model_copy(update={"keep": list(range(count))})
    api.apply(checkpoints("mixtral"), plan, tmp_path / "uneven")
    inventory = opened(tmp_path / "uneven")
    assert inventory.uneven
    found = fitted(inventory, inventory.size({0: 2, 1: 4, 2: 3})[1])
    assert found.keep == 0.5  # of 4, 8 and 6
    assert [len(entry.keep) for entry in api.plan(tmp_path / "uneven", "aimer", found.keep).layers] == [2, 4, 3]


# ---- plans


def stored(path: Path) -> int:
    """Bytes of all tensors of a checkpoint."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as held:
            total += sum(held.get_tensor(name).nbytes for name in held.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "qwen3_next"])
def test_the_written_checkpoint_fits_and_one_more_expert_would_not(checkpoints, model_type, capsys, tmp_path):
    source, plan = checkpoints(model_type), tmp_path / "plan.json"
    inventory = opened(source)
    memory = int((inventory.size(dict.fromkeys(inventory.layers, 6))[1] + cache_account(inventory)["bytes"]) / 0.9) // 1000 + 1
    code, out, err = run_cli(capsys, "plan", source, "-m", "aimer", "--fit", f"vllm:{memory}kB", "-o", plan)
    assert code == 0, err
    made = json.loads(plan.read_text())
    kept = len(made["layers"][0]["keep"])
    assert 2 <= kept < 6  # the allowance takes its part
    assert made["method"]["options"]["fit"] == f"vllm:{memory}kB"
    assert made["method"]["options"]["context"] == 256
    line = made["notes"][-1]
    assert f"{kept} of 8 experts per layer" in line
    assert "for 256 tokens + allowance" in line
    assert "(vllm: 0.9 of" in line
    assert line in out
    assert run_cli(capsys, "apply", source, plan, "-o", tmp_path / "out")[0] == 0
    weights, room = stored(tmp_path / "out"), int(0.95 * int(0.9 * memory * 1000)) - cache_account(inventory)["bytes"]
    assert weights == made["summary"]["bytes"][1]
    assert weights <= room + 1
    step = inventory.rules.groups
    assert inventory.size(dict.fromkeys(inventory.layers, kept + step))[1] > room


def test_compress_fits_and_says_so(checkpoints, capsys, tmp_path):
    source, out = checkpoints("mixtral"), tmp_path / "out"
    memory = opened(source).size()[1] // 1000
    line = ["compress", source, "-m", "aimer", "--fit", f"{memory}kB", "--context", 0, "--no-measure", "-o", out]
    code, told, err = run_cli(capsys, *line, "--device", "cpu")
    assert code == 0, err
    assert "KV cache not counted (--context 0) + allowance" in told
    assert "7 of 8 experts per layer" in told
    assert stored(out) <= 0.95 * memory * 1000
    made = api.plan(str(source), "aimer", fit=f"{memory}kB", context=0)
    assert json.loads((out / "expertsmith" / "plan.json").read_text())["notes"] == made.notes


def test_a_shared_total_is_checked_against_the_memory(checkpoints):
    source = checkpoints("mixtral")
    inventory = opened(source)
    memory = f"{inventory.size()[1] / 1000:.3f}kB"
    made = api.plan(source, "aimer", fit=memory, context=0, budget="global")
    assert sum(made.counts) == 21
    assert "21 of 24 experts in all layers" in made.notes[-1] or "7 of 8 experts per layer" in made.notes[-1]
    over = api.plan(source, "aimer", 8)
    with pytest.raises(UserError, match="does not fit: fit: weights"):
        largest(inventory, rules_of(inventory, "keep"), memory, 0).check(over, inventory)


def merged(plan: Plan) -> Plan:
    first = plan.layers[0]
    gone = next(e for e in range(first.num_experts) if e not in first.keep)
    merge = Merge.model_validate({"into": first.keep[0], "from": [first.keep[0], gone], "weights": [1.0, 1.0]})
    return plan.model_copy(update={"layers": [first.model_copy(update={"merge": [merge]}), *plan.layers[1:]], "notes": []})


def test_merged_weights_of_a_quantised_model_are_counted_as_stored_and_the_plan_says_what_that_needs(
    checkpoints, capsys, tmp_path
):
    quantise_checkpoint(checkpoints("mixtral"), tmp_path / "q", "fp8_block")
    inventory = opened(tmp_path / "q")
    found = fitted(inventory, inventory.size(dict.fromkeys(inventory.layers, 4))[1])
    plan = merged(api.plan(tmp_path / "q", "aimer", 4))
    found.check(plan, inventory)
    floats = inventory.floats.size(dict.fromkeys(inventory.layers, 4))[0] * 2
    assert (
        f"--requantise, as merged weights are written in bfloat16 otherwise, and all others with them ({floats / 1e3:.2f} kB)"
        in (plan.notes[-1])
    )
    line = (
        "compress",
        tmp_path / "q",
        "-m",
        "aimer",
        "--fit",
        f"{inventory.size()[1] // 1000}kB",
        "--context",
        0,
        "-d",
        "x.txt",
    )
    (tmp_path / "x.txt").write_text("text")
    data = str(tmp_path / "x.txt")
    code, _, err = run_cli(capsys, *line[:-1], data, "--heal", "least_squares", "-o", tmp_path / "out")
    assert code == 2
    assert "--heal makes all of them bfloat16" in err
    assert "--requantise" in err


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--fit", "1MB", "--keep", "4"], "does not go with --keep"),
        (["--fit", "1MB", "--uniform"], "does not go with --uniform"),
        (["--fit", "1MB", "--budget", "threshold"], "does not go with --budget threshold"),
        (["--keep", "4", "--context", "100"], "--context has no effect without --fit"),
        (["--fit", "100"], "no unit"),
        (["--fit", "1kB"], "does not fit"),
        (["--fit", "1GB"], "fits as it is"),
        (["--fit", "1MB", "--context", "-1"], "--context"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "compress"])
def test_what_does_not_go_together_or_does_not_fit_is_refused(checkpoints, capsys, tmp_path, verb, options, found):
    method = "moeits" if "threshold" in options else "aimer"
    code, out, err = run_cli(capsys, verb, checkpoints("mixtral"), "-m", method, *options, "-o", tmp_path / "out")
    assert code == 2
    assert found in " ".join(err.replace("│", " ").split())  # without the box around usage errors
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_file_s_choice_is_not_fitted(checkpoints, capsys, tmp_path):
    (tmp_path / "kept.json").write_text(json.dumps([[0, 1, 2]] * 3))
    line = ("plan", checkpoints("mixtral"), "--from", tmp_path / "kept.json", "-o", tmp_path / "plan.json")
    code, _, err = run_cli(capsys, *line, "--fit", "1MB")
    assert code == 2
    assert "does not go with --from" in err
    code, _, err = run_cli(capsys, *line, "--context", 10)
    assert code == 2
    assert "--context has no effect" in err


def test_the_message_says_how_much_the_rest_of_the_model_takes(checkpoints):
    inventory = opened(checkpoints("mixtral"))
    rest = inventory.size(dict.fromkeys(inventory.layers, 0))[1]
    with pytest.raises(UserError, match=rf"without routed experts the weights are {rest / 1e3:.2f} kB"):
        api.plan(checkpoints("mixtral"), "aimer", fit="1kB", context=0)


def test_a_cache_of_unknown_size_is_refused_but_the_weights_alone_are_fitted(checkpoints, capsys, tmp_path):
    source = checkpoints("deepseek_v4")
    memory = f"{opened(source).size()[1] // 1000}kB"
    line = ("plan", source, "-m", "aimer", "--fit", memory, "-o", tmp_path / "plan.json")
    code, _, err = run_cli(capsys, *line)
    assert code == 2
    assert "cannot be counted: deepseek_v4: its layers keep compressed keys and values" in err
    assert "--context 0" in err
    code, out, _ = run_cli(capsys, *line, "--context", 0)
    assert code == 0
    assert "KV cache not counted" in out


def test_a_recipe_takes_fit_for_keep(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = "model: m\nplan: {method: reap, stats: s, out: p.json, %s}\n"
    recipe.write_text(text % "fit: 'vllm:24GB', context: 8192")
    found = load_recipe(recipe).plan
    assert (found.fit, found.context) == ("vllm:24GB", 8192)
    recipe.write_text(text % "context: 8192")
    with pytest.raises(UserError, match="keep is required"):
        load_recipe(recipe)


# ---- inspect


def test_inspect_counts_the_memory(checkpoints, capsys):
    facts = api.inspect(checkpoints("mixtral"))  # float32
    assert facts["bytes_bfloat16"] * 2 == facts["bytes"]
    assert facts["kv_cache"] == {"tokens": 256, "bytes": 256 * 192, "bytes_per_token": 192, "constant_bytes": 0}
    assert all(row["bytes_with_kv_cache"] == row["bytes"] + 256 * 192 for row in facts["keep_ratios"])
    text = run_cli(capsys, "inspect", checkpoints("mixtral"))[1]
    assert f"{facts['bytes'] / 1e3:.2f} kB as stored, {facts['bytes'] / 2e3:.2f} kB in bfloat16" in text
    assert "192 B per token: 49.15 kB for 256 tokens" in text
    assert f"{(facts['keep_ratios'][0]['bytes'] + 49152) / 1e3:.2f} kB" in text


def test_inspect_tells_windows_and_states_apart_and_what_it_cannot_count(checkpoints, capsys):
    # one layer of two sees all tokens: 2 heads of 8, 64 bytes a token; the others the last 8 of them
    assert api.inspect(checkpoints("gpt_oss"))["kv_cache"] == {
        "tokens": 256, "bytes": 64 * (256 + 2 * 8), "bytes_per_token": 64, "constant_bytes": 64 * 16,
    }  # fmt: skip
    assert "of windows and states" in run_cli(capsys, "inspect", checkpoints("gpt_oss"))[1]
    facts = api.inspect(checkpoints("deepseek_v4"))
    assert set(facts["kv_cache"]) == {"unknown"}
    assert facts["keep_ratios"][0]["bytes_with_kv_cache"] is None
    text = run_cli(capsys, "inspect", checkpoints("deepseek_v4"))[1]
    assert "cannot be counted" in text
    assert "with KV cache" not in text
