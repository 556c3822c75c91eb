"""Different numbers of experts a layer: written, loaded by both loaders, filled up; against the masked original, for every family."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from conftest import CALIBRATION, DEVICE, SUPPORTED, save_tiny
from expertsmith.arch import families
from expertsmith.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from expertsmith.engine import load, load_model
from expertsmith.engine.uneven import SHIM, is_uneven
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, per_layer_counts, take_inventory
from expertsmith.planning.plan import LayerPlan, Method, Plan, Source
from expertsmith.surgery.apply import output_tensors
from expertsmith.surgery.mask import masked
from expertsmith.surgery.uneven import check_padding, check_uneven, code_for, pad, routing_biases, write_counts
from tiny import tiny_config

UNEVEN = [name for name in SUPPORTED if families()[name].uneven is None]
EVERY = pytest.mark.parametrize("model_type", UNEVEN)
ALONE = ["mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "dbrx", "nemotron_h"]  # loaded where expertsmith is not
UNGROUPED = (
    """afmoe deepseek_v4 gpt_oss hy_v3 inkling_text inkling2_text kolibri1 laguna lfm2_moe minimax_m2 minimax_m3_vl_text"""
)
GROUPED = """dots3_note_text axk1 axk2 beam deepseek_v3 deepseek_v32 dots1 exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa hy_v4 mimo_v2_flash nemotron_h
    solar_open"""
PADDED = {  # family → overrides of its tiny config, without which it has expert_groups
    **{model_type: {} for model_type in UNGROUPED.split()},
    **{model_type: {"n_group": 1, "topk_group": 1} for model_type in GROUPED.split()},
    **{model_type: {"num_expert_group": 1, "topk_group": 1} for model_type in ("bailing_hybrid", "kimi_linear")},
}
CLOSE = 2e-5


def choose(inventory: Inventory, seed: int = 0) -> dict[int, list[int]]:
    """Kept experts: another number in every layer, the same in every expert_group, at least what the router needs."""
    rng = random.Random(f"{inventory.architecture.model_type}/{seed}")
    least, groups = inventory.rules.least // inventory.rules.groups, inventory.rules.groups
    kept = {}
    for place, layer in enumerate(inventory.layers):
        size = inventory.experts_in(layer) // groups
        each = [count for count in range(least, size + 1) if count < size or size == least]
        count = each[(place + seed) % len(each)]
        kept[layer] = sorted(e for g in range(groups) for e in rng.sample(range(g * size, (g + 1) * size), count))
    return kept


def plan_of(inventory: Inventory, kept: dict[int, list[int]]) -> Plan:
    return Plan(
        method=Method(name="by_hand"),
        model=Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint),
        layers=[LayerPlan(layer=layer, num_experts=inventory.experts_in(layer), keep=ids) for layer, ids in kept.items()],
    )


def write(inventory: Inventory, kept: dict[int, list[int]], out: Path, padded: bool = False) -> Path:
    counts = {layer: len(ids) for layer, ids in kept.items()}
    tensors = output_tensors(plan_of(inventory, kept), inventory)
    if padded:
        check_padding(inventory, counts, inventory.rules.groups)
        tensors = pad(tensors, counts, inventory)
        counts = dict.fromkeys(counts, max(counts.values()))
    config = copy.deepcopy(dict(inventory.checkpoint.config))
    write_counts(config, counts, inventory)
    write_checkpoint(out, tensors, config, source=inventory.checkpoint, texts=code_for(counts, inventory))
    return out


IDS = torch.randint(3, 120, (2, 17), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(module: torch.nn.Module) -> torch.Tensor:
    return module.eval()(IDS, use_cache=False).logits.float()


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def written(checkpoints, tmp_path_factory):
    """model_type → (inventory, kept, written checkpoint, logits of the masked original)."""
    root = tmp_path_factory.mktemp("uneven")

    @cache
    def get(model_type: str):
        inventory = take_inventory(open_checkpoint(checkpoints(model_type)))
        kept = choose(inventory)
        out = write(inventory, kept, root / model_type)
        original = load_model(inventory.checkpoint, inventory.architecture)
        with masked(original, kept, inventory.num_experts):
            wanted = logits(original.module)
        assert difference(logits(original.module), wanted) > 1e-3  # the mask matters
        return inventory, kept, out, wanted

    return get


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Remote code is cached below the test's own folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    held = (
        transformers.AutoModelForCausalLM._model_mapping._extra_content
    )  # classes of code that was loaded are registered here
    for config in [config for config, kind in held.items() if kind.__module__.startswith("transformers_modules.")]:
        del held[config]


@EVERY
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_the_engine_loads_it(model_type, memory, written):
    inventory, kept, out, wanted = written(model_type)
    found = take_inventory(open_checkpoint(out))
    assert found.counts == {layer: len(ids) for layer, ids in kept.items()}
    assert found.num_experts == max(found.counts.values())
    model = load_model(found.checkpoint, found.architecture, memory=memory)
    for index in range(len(model.layers)):
        model.bring(index)
    assert difference(logits(model.module), wanted) < CLOSE
    implementation = load_model(inventory.checkpoint, inventory.architecture).config._experts_implementation
    assert model.config._experts_implementation == implementation


@EVERY
def test_plain_transformers_loads_it_with_remote_code(model_type, written, modules, tmp_path):
    """Logits, generate, and save_pretrained: the same tensors, the code, and a checkpoint that loads again."""
    _, _, out, wanted = written(model_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    first = logits(model)
    assert difference(first, wanted) < CLOSE
    assert model.generate(IDS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 20)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / SHIM).read_bytes() == (out / SHIM).read_bytes()
    same_tensors(open_checkpoint(tmp_path / "saved"), open_checkpoint(out))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(logits(again), first)


@EVERY
def test_load(model_type, written, tmp_path):
    """No code of the checkpoint is needed, what is saved can be loaded by both, implementations can be changed."""
    _, _, out, wanted = written(model_type)
    model = load(out)
    assert type(model).__module__.startswith("transformers.models.")
    assert difference(logits(model), wanted) < CLOSE
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / SHIM).read_bytes() == (out / SHIM).read_bytes()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"] == json.loads((out / "config.json").read_text())["auto_map"]
    same_tensors(open_checkpoint(tmp_path / "saved"), open_checkpoint(out))
    the_layers_follow(model, wanted)


def the_layers_follow(model: torch.nn.Module, wanted: torch.Tensor) -> None:
    """Implementations that are changed afterwards are changed in the layers' own configs too."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    whole = model.config.get_text_config()
    held = [module.config for module in model.modules() if type(getattr(module, "config", None)) is type(whole)]
    assert any(own is not whole for own in held) or not model._can_set_experts_implementation()
    seen = {(own._attn_implementation, own._experts_implementation) for own in held}
    assert seen == {(model.config._attn_implementation, model.config._experts_implementation)}
    assert difference(logits(model), wanted) < CLOSE


def same_tensors(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted.tensors)


@pytest.mark.slow
def test_without_expertsmith(written, tmp_path):
    """Another process, in which expertsmith cannot be imported."""
    script = tmp_path / "load.py"
    script.write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'expertsmith':\n"
        "            raise ImportError('expertsmith is not here')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "try:\n"
        "    import expertsmith\n"
        "except ImportError:\n"
        "    pass\n"
        "else:\n"
        "    raise SystemExit('expertsmith is here')\n"
        "import torch, transformers\n"
        "from safetensors.torch import load_file, save_file\n"
        "ids, out = load_file(sys.argv[1])['ids'], {}\n"
        "for folder in sys.argv[3:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "    with torch.no_grad():\n"
        "        out[folder] = model(ids, use_cache=False).logits\n"
        "save_file(out, sys.argv[2])\n"
    )
    from safetensors.torch import load_file, save_file

    save_file({"ids": IDS}, tmp_path / "ids")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    folders = [str(written(model_type)[2]) for model_type in ALONE]
    arguments = [sys.executable, script, tmp_path / "ids", tmp_path / "logits", *folders]
    subprocess.run(arguments, check=True, env=environment, cwd=tmp_path, capture_output=True)
    found = load_file(tmp_path / "logits")
    for model_type, folder in zip(ALONE, folders, strict=True):
        assert difference(found[folder], written(model_type)[3]) < CLOSE, model_type


@EVERY
def test_inventory_counts_every_layer_by_itself(model_type, written):
    """Sizes against the tensors that are there, and against what the source's inventory predicted."""
    source, kept, out, _ = written(model_type)
    found = take_inventory(open_checkpoint(out))
    counts = {layer: len(ids) for layer, ids in kept.items()}
    assert found.size() == source.size(counts) == found.size(counts)
    assert found.size()[0] == sum(info.numel for info in found.checkpoint.tensors.values())
    routed = active = 0
    for layer, count in counts.items():
        claims = found.expert_claims(layer)
        assert len(claims) == count
        one = sum(routed_numel(claim, count) for claim in claims[0])
        assert one == sum(routed_numel(claim, source.num_experts) for claim in source.expert_claims(layer)[0])
        routed += one * count
        active += one * found.top_k
        assert found.rules_of(layer) == replace(source.rules, num_experts=count)
    assert found.routed_parameters == routed
    assert found.active_parameters == found.size()[0] - routed + active
    assert found.size(dict.fromkeys(counts, min(counts.values())))[0] < found.size()[0]


def routed_numel(claim, experts: int) -> int:
    """Numbers of one expert in a claim."""
    if claim.kind == "expert":
        return claim.info.numel
    return claim.info.numel // (experts * claim.rows + claim.extra) * claim.rows


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "dbrx", "deepseek_v3", "gpt_oss"])
def test_a_second_round(model_type, written, tmp_path):
    """From an uneven checkpoint to another, and to an even one, which is a stock checkpoint again."""
    inventory, first, out, _ = written(model_type)
    half = take_inventory(open_checkpoint(out))
    second = choose(half, seed=1)
    original = load_model(inventory.checkpoint, inventory.architecture)
    for name, kept in (("uneven", second), ("even", even(half))):
        write(half, kept, tmp_path / name)
        both = {layer: [first[layer][e] for e in ids] for layer, ids in kept.items()}
        with masked(original, both, inventory.num_experts):
            wanted = logits(original.module)
        assert difference(logits(load(tmp_path / name)), wanted) < CLOSE
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "even")
    assert difference(logits(stock), wanted) < CLOSE
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    assert config.keys() == inventory.checkpoint.config.keys()
    assert not (tmp_path / "even" / SHIM).exists()


def even(inventory: Inventory) -> dict[int, list[int]]:
    """As many experts everywhere as the router needs, from the end of every expert_group."""
    rules = inventory.rules
    kept = {}
    for layer, count in inventory.counts.items():
        size, each = count // rules.groups, rules.least // rules.groups
        kept[layer] = [g * size + e for g in range(rules.groups) for e in range(size - each, size)]
    return kept


@pytest.mark.parametrize(
    ("model_type", "padded"), [("mixtral", False), ("deepseek_v3", False), ("gpt_oss", False), ("gpt_oss", True)]
)
def test_apply_verify_and_lint(model_type, padded, written, tmp_path):
    """Through the verbs: the written checkpoint is proven, and lint tells what takes it."""
    from expertsmith import api

    inventory, kept, _, _ = written(model_type)
    source = inventory.checkpoint.path
    notes = api.apply(source, plan_of(inventory, kept), tmp_path / "out", pad=padded)
    assert any("dead experts" in note if padded else "expertsmith.load" in note for note in notes)
    verdict = api.verify(source, tmp_path / "out", tokens=128, device=DEVICE)
    assert verdict.passed, verdict
    assert verdict.largest < CLOSE
    found = {finding.rule.id for finding in api.lint(tmp_path / "out")}
    engines = ("vllm", "sglang", "llama.cpp")
    assert {f"{engine}-padded" for engine in engines} <= found if padded else "transformers-uneven" in found
    assert {f"{engine}-uneven" for engine in engines} <= found or padded
    assert "transformers-count" not in found


def test_a_layer_below_top_k_is_refused(written, tmp_path):
    from expertsmith import api

    inventory, kept, _, _ = written("mixtral")
    with pytest.raises(UserError, match=r"layer 1 keeps 1 of 8 experts, but the router needs 2"):
        api.apply(inventory.checkpoint.path, plan_of(inventory, {**kept, 1: [3]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_golden(written):
    """Mixtral with 2, 3 and 4 of 8 experts; Qwen3-MoE under the key that transformers stores; DBRX in its nested part."""
    counts = {"mixtral": {0: 2, 1: 3, 2: 4}, "qwen3_moe": {1: 4, 2: 2}, "dbrx": {0: 2, 1: 3, 2: 4}}
    found = {}
    for model_type, numbers in counts.items():
        inventory = written(model_type)[0]
        config = copy.deepcopy(inventory.checkpoint.config)
        if model_type == "qwen3_moe":  # as the original checkpoints spell it
            config["num_experts"] = config.pop("num_local_experts")
        write_counts(config, numbers, inventory)
        found[model_type] = config
        assert per_layer_counts(config, inventory.architecture) == numbers
    assert found["mixtral"]["num_local_experts"] == 4
    assert found["mixtral"]["per_layer_config"] == {str(i): {"num_local_experts": n} for i, n in counts["mixtral"].items()}
    assert found["mixtral"]["auto_map"] == {"AutoModelForCausalLM": "modeling_expertsmith.MixtralForCausalLM"}
    assert found["mixtral"]["allow_global_per_layer_attribute_access"] is True
    assert found["qwen3_moe"]["num_experts"] == 4
    assert found["qwen3_moe"]["per_layer_config"] == {"1": {"num_local_experts": 4}, "2": {"num_local_experts": 2}}
    assert found["dbrx"]["ffn_config"]["moe_num_experts"] == 4
    assert found["dbrx"]["per_layer_config"]["1"] == {"ffn_config": {"moe_num_experts": 3}}


def test_other_keys_of_per_layer_config_stay(written):
    inventory = written("mixtral")[0]
    config = copy.deepcopy(inventory.checkpoint.config)
    config["per_layer_config"] = {"01": {"sliding_window": 7}}
    write_counts(config, {0: 2, 1: 3, 2: 4}, inventory)
    assert config["per_layer_config"]["1"] == {"sliding_window": 7, "num_local_experts": 3}
    write_counts(config, {0: 4, 1: 4, 2: 4}, replace(inventory, overrides={0: 2}))
    assert "per_layer_config" in config


def test_composite_configs(tmp_path, modules):
    """A language model below text_config: per_layer_config goes there, auto_map to the top."""
    text = tiny_config("qwen3_5_moe_text")
    config = transformers.CONFIG_MAPPING["qwen3_5_moe"](text_config=dict(text))
    torch.manual_seed(0)
    save_tiny("qwen3_5_moe_text", tmp_path / "plain")
    whole = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps({**config.to_dict(), "text_config": whole}, default=str))
    inventory = take_inventory(open_checkpoint(tmp_path / "plain"))
    kept = choose(inventory)
    out = write(inventory, kept, tmp_path / "out")
    made = json.loads((out / "config.json").read_text())
    assert "per_layer_config" in made["text_config"]
    assert "per_layer_config" not in made
    assert "auto_map" in made
    original = load_model(inventory.checkpoint, inventory.architecture)
    with masked(original, kept, inventory.num_experts):
        wanted = logits(original.module)
    assert difference(logits(load_model(open_checkpoint(out), inventory.architecture).module), wanted) < CLOSE
    assert difference(logits(load(out)), wanted) < CLOSE
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert difference(logits(model), wanted) < CLOSE


# --- padded with dead experts ---


@pytest.mark.parametrize("model_type", PADDED)
def test_padded_checkpoints_load_in_the_stock_class(model_type, tmp_path):
    save_tiny(model_type, tmp_path / "source", **PADDED[model_type])
    inventory = take_inventory(open_checkpoint(tmp_path / "source"))
    kept = choose(inventory)
    out = write(inventory, kept, tmp_path / "out", padded=True)
    found = take_inventory(open_checkpoint(out))
    assert found.num_experts == max(len(ids) for ids in kept.values())
    assert not found.overrides
    original = load_model(inventory.checkpoint, inventory.architecture)
    with masked(original, kept, inventory.num_experts):
        wanted = logits(original.module)
    assert difference(logits(original.module), wanted) > 1e-3
    stock = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert difference(logits(stock), wanted) < CLOSE
    for memory in ("resident", "stream"):
        model = load_model(found.checkpoint, found.architecture, memory=memory)
        for index in range(len(model.layers)):
            model.bring(index)
        assert difference(logits(model.module), wanted) < CLOSE
    if found.architecture.selection_bias:
        hidden = {name: int(torch.isneginf(found.checkpoint.read(name)).sum()) for name in found.checkpoint.tensors}
        assert {name for name, count in hidden.items() if count} <= routing_biases(found)
        assert sum(hidden.values()) >= sum(found.num_experts - len(ids) for ids in kept.values())


def test_padding_golden(tmp_path):
    """gpt_oss with 2, 3 and 4 of 8 experts: every byte of what is filled in."""
    inventory = take_inventory(open_checkpoint(save_tiny("gpt_oss", tmp_path / "source")))
    kept = {0: [1, 6], 1: [0, 3, 7], 2: [1, 2, 3, 4]}
    found, source = open_checkpoint(write(inventory, kept, tmp_path / "out", padded=True)), inventory.checkpoint
    for name in source.tensors:
        if ".mlp." not in name:
            assert torch.equal(found.read(name), source.read(name))
            continue
        layer = int(name.split(".")[2])
        rows, whole = found.read(name), source.read(name)
        count = len(kept[layer])
        assert rows.shape[0] == 4
        assert torch.equal(rows[:count], whole[kept[layer]])
        fill = -1e30 if name.endswith("router.bias") else 0.0
        assert (rows[count:] == fill).all()
    assert found.read("model.layers.1.mlp.router.bias")[3] == np.float32(-1e30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_padding_in_other_dtypes(dtype, tmp_path):
    """The fill stands in the bias's own dtype: -inf, or the largest finite magnitude where -1e30 is out of reach."""
    import struct

    from expertsmith.surgery.uneven import _encoded

    name = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    read = lambda raw: torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).item()  # noqa: E731
    assert read(_encoded(float("-inf"), name)) == float("-inf")
    logit = read(_encoded(-1e30, name))
    assert logit == (-65504.0 if dtype == "float16" else pytest.approx(-1e30, rel=1e-2))
    assert struct.unpack("<d", _encoded(-1e30, "F64"))[0] == -1e30


@pytest.mark.parametrize("model_type", [name for name in SUPPORTED if name not in PADDED])
def test_padding_is_refused_with_the_reason(model_type, checkpoints):
    """Routers without a bias, and softmax over all experts."""
    inventory = take_inventory(open_checkpoint(checkpoints(model_type)))
    counts = {layer: inventory.num_experts - place % 2 for place, layer in enumerate(inventory.layers)}
    with pytest.raises(UserError, match=r"cannot be padded with dead experts: (its router|its routing weights|the router of)"):
        check_padding(inventory, counts, 1)


def test_padding_is_refused_with_expert_groups(checkpoints):
    inventory = take_inventory(open_checkpoint(checkpoints("deepseek_v3")))
    with pytest.raises(UserError, match="its router scores 2 expert_groups"):
        check_padding(inventory, {1: 4, 2: 6}, inventory.rules.groups)


def test_infinities_elsewhere_are_still_named(tmp_path):
    """-inf belongs into selection biases, and +inf or NaN not even there."""
    from safetensors.torch import load_file, save_file

    save_tiny("minimax_m2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    checkpoint = open_checkpoint(tmp_path)
    for name in ("model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.input_layernorm.weight"):
        save_file({**tensors, name: tensors[name].index_fill(0, torch.tensor([1]), float("-inf"))}, file, {"format": "pt"})
        with pytest.raises(UserError, match="decoder layer 1 has NaN or inf"):
            load_model(open_checkpoint(tmp_path), families()["minimax_m2"]).bring(1)
    assert routing_biases(take_inventory(checkpoint)) == {
        f"model.layers.{i}.block_sparse_moe.e_score_correction_bias" for i in range(3)
    }


# --- bad input ---


def test_families_that_cannot_be_uneven_are_refused_before_anything_is_written(checkpoints, tmp_path):
    refused = [name for name in SUPPORTED if name not in UNEVEN]
    assert refused == ["gemma4_text"]
    inventory = take_inventory(open_checkpoint(checkpoints("gemma4_text")))
    with pytest.raises(UserError, match=r"gemma4_text model cannot have different numbers of experts: .*--uniform"):
        check_uneven(inventory)
    with pytest.raises(UserError, match="gemma4_text"):
        write(inventory, choose(inventory), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"one": {}}, "per_layer_config has the entry 'one'"),
        ({"0": 3}, "per_layer_config has the entry '0'"),
        ([1, 2], r"per_layer_config has the entry \[1, 2\]"),
        ({"0": {"num_local_experts": 0}}, "decoder layer 0: num_local_experts is 0, but must be a positive number"),
        ({"1": {"num_local_experts": "4"}}, "decoder layer 1: num_local_experts is '4'"),
        ({"0": {"num_local_experts": 5}}, r"layers\.0\.\S+ has shape \[2, 32\], which does not fit 5 experts"),
    ],
)
def test_damaged_per_layer_config(entry, message, written, tmp_path):
    checkpoint = open_checkpoint(written("mixtral")[2], headers_only=True)
    checkpoint.config["per_layer_config"] = entry
    with pytest.raises(UserError, match=message):
        take_inventory(checkpoint)


def test_groups_of_a_single_layer_have_to_divide(written):
    checkpoint = open_checkpoint(written("deepseek_v3")[2], headers_only=True)
    checkpoint.config["per_layer_config"]["2"]["n_routed_experts"] = 5
    with pytest.raises(UserError, match="decoder layer 2"):
        take_inventory(replace_rows(checkpoint, 2, 5))


def replace_rows(checkpoint: Checkpoint, layer: int, rows: int) -> Checkpoint:
    """The checkpoint with other row counts in the router's headers of a layer."""
    for name, info in checkpoint.tensors.items():
        if f"layers.{layer}.mlp.gate." in name:
            checkpoint.tensors[name] = replace(info, shape=(rows, *info.shape[1:]))
    return checkpoint


def test_a_missing_expert_of_an_uneven_layer_is_named(written):
    _, kept, out, _ = written("mixtral")
    checkpoint = open_checkpoint(out, headers_only=True)
    last = len(kept[2]) - 1
    for name in [name for name in checkpoint.tensors if f"layers.2.block_sparse_moe.experts.{last}." in name]:
        del checkpoint.tensors[name]
    with pytest.raises(UserError, match=f"decoder layer 2 lacks w1.weight of expert {last} "):
        take_inventory(checkpoint)


def test_load_refuses_remote_code(written):
    with pytest.raises(UserError, match="load runs no code"):
        load(written("mixtral")[2], trust_remote_code=True)


def test_load_takes_ordinary_checkpoints(checkpoints):
    model = load(checkpoints("olmoe"), dtype=torch.bfloat16)
    assert type(model) is transformers.OlmoeForCausalLM
    assert model.dtype == torch.bfloat16
    assert not is_uneven(model.config)


def test_nothing_of_the_checkpoint_is_run(written, tmp_path):
    """The module beside config.json is for others: here it may say what it likes."""
    import shutil

    shutil.copytree(written("mixtral")[2], tmp_path / "m")
    (tmp_path / "m" / SHIM).write_text("raise SystemExit('remote code ran')\n")
    load(tmp_path / "m")
    load_model(open_checkpoint(tmp_path / "m"), families()["mixtral"])


def test_stock_classes_are_left_as_they_were(written):
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

    before = MixtralDecoderLayer.__init__
    load(written("mixtral")[2])
    assert MixtralDecoderLayer.__init__ is before


def test_calibration_of_an_uneven_checkpoint(written, data, tmp_path):
    """Each layer's statistics have as many entries as the layer has experts, streamed as resident."""
    from expertsmith import api

    found = {}
    for memory in ("resident", "stream"):
        stats = api.calibrate(written("mixtral")[2], data, tmp_path / memory, memory=memory, **CALIBRATION)
        found[memory] = {layer: entry.total("selections").tolist() for layer, entry in stats.layers.items()}
    assert found["resident"] == found["stream"]
    assert {layer: len(values) for layer, values in found["resident"].items()} == {0: 2, 1: 3, 2: 4}
    tokens = sum(stats.tokens.values())
    assert all(sum(values) == 2 * tokens for values in found["resident"].values())
