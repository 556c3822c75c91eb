"""Bytes: every dtype and layout, shards, keys of config.json, multi-token prediction, interruptions, memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import expertsmith
from conftest import DEVICE, SUPPORTED, random_model
from expertsmith import api
from expertsmith.arch import families, text_config
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.reader import DTYPE_BITS, TORCH_DTYPES, read_header
from expertsmith.checkpoint.writer import OutputTensor
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.surgery.apply import FINITE_LIMITS, _Finite, apply_plan
from tiny import tiny_config


def kept_of(plan) -> dict[int, list[int]]:
    return plan.kept


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_kept_tensors_keep_their_bytes_whatever_the_dtype(dtype, checkpoints, tmp_path):
    """Expert weights of another dtype with block scales beside them: whole experts are moved with their scales."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("deepseek_v3"), source)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if ".mlp.experts." in n]:
        tensors[name] = (20 * torch.randn(tensors[name].shape, generator=generator)).clamp(-100, 100).to(dtype)
        tensors[f"{name}_scale_inv"] = torch.rand(1, 1, generator=generator)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = api.plan(source, "random", 4)
    api.apply(source, plan, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for layer, keep in plan.kept.items():
        for new, old in enumerate(keep):
            for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "down_proj.weight_scale_inv"):
                a, b = (
                    tensors[f"model.layers.{layer}.mlp.experts.{old}.{part}"],
                    after[f"model.layers.{layer}.mlp.experts.{new}.{part}"],
                )
                assert a.dtype == b.dtype
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        router = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        assert torch.equal(after[f"model.layers.{layer}.mlp.gate.weight"], router[keep])
        bias = tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert torch.equal(
            after[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"], bias[keep]
        )  # EASY-EP golden check 12


def test_aimer_reads_fp8_through_its_scales(checkpoints, tmp_path):
    """Scores of dequantised weights: block scales of very different size change the order, raw codes do not see them."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("deepseek_v3"), source)
    tensors = load_file(source / "model.safetensors")
    plain = api.plan(source, "aimer", 4)
    for name in [n for n in tensors if ".mlp.experts." in n]:
        scale = 0.01
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), scale)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantised = api.plan(source, "aimer", 4)
    for a, b in zip(plain.layers, quantised.layers, strict=True):
        assert a.saliency is not None
        assert b.saliency == pytest.approx(a.saliency, rel=0.02)
    for name in [n for n in tensors if n.endswith("experts.1.gate_proj.weight_scale_inv")]:
        tensors[name] *= 1000
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    uneven = api.plan(source, "aimer", 4).layers[1].saliency  # one matrix far larger than the others: peaky, so it stays
    assert uneven[1] == max(uneven)
    assert uneven[1] > quantised.layers[1].saliency[1] + 0.1


def test_packed_codes_are_not_scored(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    for n in [n for n in tensors if ".experts." in n]:
        tensors[n] = torch.zeros(tensors[n].shape, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is U8, but it has no scales and no decoder"):
        api.plan(source, "aimer", 4)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe", "dbrx", "llama4_text"])
def test_output_in_several_shards(model_type, checkpoints, tmp_path):
    source = checkpoints(model_type)
    inventory = take_inventory(open_checkpoint(source))
    plan = api.plan(source, "random", 4)
    apply_plan(plan, inventory, tmp_path / "many", max_shard=20_000)
    api.apply(source, plan, tmp_path / "one")
    many, one = open_checkpoint(tmp_path / "many"), open_checkpoint(tmp_path / "one")
    assert len({info.file for info in many.tensors.values()}) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.nbytes == one.nbytes
    assert all(torch.equal(many.read(name), one.read(name)) for name in one.tensors)
    assert api.verify(source, tmp_path / "many", tokens=64, device=DEVICE).passed
    for file in (tmp_path / "many").glob("*.safetensors"):  # stock readers want the format in the metadata
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        assert header["__metadata__"] == {"format": "pt"}
        assert read_header(file)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_fused_checkpoints_are_sliced_too(model_type, tmp_path):
    """A checkpoint that holds the in-memory layout ([experts, …] tensors) gives the same model as the per-expert one."""
    model = random_model(model_type)
    model.save_pretrained(tmp_path / "per_expert")
    shutil.copytree(tmp_path / "per_expert", tmp_path / "fused")
    save_file(
        {
            k: v.contiguous()
            for k, v in model.state_dict().items()
            if k != "lm_head.weight" or not model.config.tie_word_embeddings
        },
        tmp_path / "fused" / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name in ("per_expert", "fused"):
        plan = api.plan(tmp_path / name, "random", 4)
        api.apply(tmp_path / name, plan, tmp_path / f"{name}-out")
        assert api.verify(tmp_path / name, tmp_path / f"{name}-out", tokens=64, device=DEVICE).passed
    assert any(".experts.gate_up_proj" in n for n in open_checkpoint(tmp_path / "fused-out").tensors)


def test_config_keeps_the_sources_key_names(checkpoints, tmp_path):
    """qwen3_moe: original checkpoints say num_experts, transformers writes num_local_experts; the output says what the source says."""
    for key in ("num_experts", "num_local_experts"):
        source = tmp_path / key
        shutil.copytree(checkpoints("qwen3_moe"), source)
        config = json.loads((source / "config.json").read_text())
        config.pop("num_local_experts", None)
        config.pop("num_experts", None)
        config |= {key: 8, "something_unknown": [1, {"x": None}], "torch_dtype": config.pop("dtype")}
        (source / "config.json").write_text(json.dumps(config))
        api.apply(source, api.plan(source, "random", 4), tmp_path / f"{key}-out")
        after = json.loads((tmp_path / f"{key}-out" / "config.json").read_text())
        assert after == {**config, key: 4}
        assert list(after) == list(config)
        assert api.verify(source, tmp_path / f"{key}-out", tokens=64, device=DEVICE).passed


@pytest.mark.parametrize(
    "model_type", [t for t in SUPPORTED if families()[t].group_key and tiny_config(t).get(families()[t].group_key, 1) > 1]
)
def test_expert_groups_stay_equal_or_are_flattened(model_type, checkpoints, tmp_path):
    """EASY-EP card, "Required behaviour" (i) and (ii)."""
    source = checkpoints(model_type)
    plan = api.plan(source, "random", 4)
    assert all(sum(e < 4 for e in entry.keep) == 2 for entry in plan.layers)
    flat = api.plan(source, "random", 5, router_groups="flatten")
    notes = api.apply(source, flat, tmp_path / "flat")
    assert any("n_group" in note for note in notes)
    record = families()[model_type]
    config = text_config(json.loads((tmp_path / "flat" / "config.json").read_text()))
    assert config[record.group_key] == config[record.top_group_key] == 1
    assert api.verify(source, tmp_path / "flat", tokens=128, device=DEVICE).passed


def test_global_budget_is_planned_and_its_unequal_counts_are_refused(checkpoints, data, tmp_path):
    from conftest import CALIBRATION

    source = checkpoints("mixtral")
    stats = api.calibrate(source, data, tmp_path / "s", **CALIBRATION)
    plan = api.plan(source, "reap", 0.5, stats=stats, budget="global")
    assert sum(plan.counts) == 12
    assert min(plan.counts) >= 2
    if plan.uniform_count is None:
        with pytest.raises(UserError, match="budget uniform"):
            api.apply(source, plan, tmp_path / "out")


def test_what_travels_with_a_checkpoint(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    for name, text in {
        "tokenizer.json": "{}",
        "chat_template.jinja": "x",
        "LICENSE": "l",
        "README.md": "theirs",
        "modeling_x.py": "evil",
        "pytorch_model.bin": "p",
        ".secret": "s",
    }.items():
        (source / name).write_text(text)
    api.apply(source, api.plan(source, "random", 4), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "expertsmith",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 of 8 experts" in card
    assert "random" in card
    assert "not measured yet" in card


def test_an_interrupted_apply_leaves_nothing_that_loads(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("mixtral")
    plan = api.plan(source, "random", 4)
    from expertsmith.checkpoint import writer

    calls = 0

    def stop(sink, data, position):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return position + os.pwrite(sink, data, position)

    monkeypatch.setattr(writer, "write_all", stop)
    with pytest.raises(KeyboardInterrupt):
        api.apply(source, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_keeps_the_old_checkpoint_until_the_new_one_is_whole(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("mixtral")
    api.apply(source, api.plan(source, "random", 4), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    from expertsmith.checkpoint import writer

    monkeypatch.setattr(writer, "_header", lambda tensors: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        api.apply(source, api.plan(source, "random", 2), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_apply_and_plan_do_not_import_torch(checkpoints, tmp_path):
    code = (
        "import sys; from expertsmith import api; s, o = sys.argv[1:];"
        "api.apply(s, api.plan(s, 'random', 4), o); assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoints("mixtral")), str(tmp_path / "out")], check=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_inspect_of_a_hub_id_fetches_headers_only(checkpoints, monkeypatch):
    """The hub client is replaced by one that serves a local directory."""
    import huggingface_hub

    source = checkpoints("qwen2_moe")

    class Entry:
        def __init__(self, info):
            self.dtype, self.shape, self.data_offsets = info.dtype, list(info.shape), (info.start, info.start + info.nbytes)

    part = SimpleNamespace(tensors={n: Entry(i) for n, i in open_checkpoint(source).tensors.items()})
    metadata = SimpleNamespace(files_metadata={"model.safetensors": part})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, revision=None: str(Path(source) / name))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repo, revision=None: metadata)
    remote, local = api.inspect("some/model"), api.inspect(source)
    assert {**remote, "model": ""} == {**local, "model": ""}


def test_wheel_contains_the_demo_model():
    root = Path(expertsmith.__file__).parent
    assert (root / "demo" / "model" / "config.json").exists()
    size = sum(p.stat().st_size for p in (root / "demo" / "model").iterdir())
    assert size <= 8e6
    assert sys.version_info >= (3, 11)


def test_missing_group_keys_mean_the_librarys_default(checkpoints, tmp_path):
    """A DeepSeek-V3 config without n_group has 8 groups, of which 4 are used, in transformers."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("deepseek_v3"), source)
    config = json.loads((source / "config.json").read_text())
    del config["n_group"], config["topk_group"]
    (source / "config.json").write_text(json.dumps(config))
    rules = take_inventory(open_checkpoint(source)).rules
    assert (rules.groups, rules.top_groups) == (8, 4)
    flat = api.plan(source, "random", 4, router_groups="flatten")
    api.apply(source, flat, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["n_group"] == after["topk_group"] == 1


def test_scales_of_fused_fp8_weights_are_sliced_and_read(tmp_path):
    """[experts, …] FP8 tensors with [experts, …] block scales: rows go together, and aimer sees dequantised values."""
    model = random_model("deepseek_v3")
    model.save_pretrained(tmp_path / "m")
    fused = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(fused, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    plain = api.plan(tmp_path / "m", "aimer", 4)
    for name in [name for name in fused if ".experts." in name]:
        scale = torch.linspace(0.01, 0.05, 8).reshape(8, 1, 1)
        fused[name] = (fused[name] / scale).to(torch.float8_e4m3fn)
        fused[f"{name}_scale_inv"] = scale
    save_file(fused, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    plan = api.plan(tmp_path / "m", "aimer", 4)
    for a, b in zip(plain.layers, plan.layers, strict=True):
        assert b.saliency == pytest.approx(a.saliency, rel=0.02)
    api.apply(tmp_path / "m", plan, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for layer, keep in plan.kept.items():
        name = f"model.layers.{layer}.mlp.experts.down_proj_scale_inv"
        assert torch.equal(after[name], fused[name][keep])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integers_of_no_known_format_are_refused(dtype, checkpoints, tmp_path):
    """Codes with a scale beside them that no decoder claims: what they are worth is a guess."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("deepseek_v3"), source)
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if ".mlp.experts." in n]:
        tensors[name] = (20 * tensors[name]).clamp(0, 100).to(dtype)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is [UI]8, but it has no scales and no decoder"):
        api.plan(source, "random", 4)


def words_of(dtype: str) -> torch.Tensor:
    """Every code of a dtype of 8 or 16 bits; of a wider one, its limits and their neighbours."""
    bits = DTYPE_BITS[dtype] if dtype != "C64" else 32
    if bits == 8:
        return torch.arange(256, dtype=torch.uint8)
    if bits == 16:
        return torch.arange(-(2**15), 2**15, dtype=torch.int16)
    kind = torch.int32 if bits == 32 else torch.int64
    inf = torch.tensor(float("inf"), dtype=torch.float32 if bits == 32 else torch.float64).view(kind).item()
    codes = [0, 1, inf - 1, inf, inf + 1, 2 ** (bits - 1) - 1]
    return torch.tensor([*codes, *(code - 2 ** (bits - 1) for code in codes)], dtype=kind)


@pytest.mark.parametrize("dtype", FINITE_LIMITS)
def test_every_code_that_is_no_number_is_found(dtype):
    """As torch reads the codes, one by one; and in a tensor where -inf has a meaning, that alone passes."""
    kind = torch.float32 if dtype == "C64" else getattr(torch, TORCH_DTYPES[dtype])
    codes = words_of(dtype)
    values = codes.view(kind).to(torch.float64)
    tensor = OutputTensor("w", dtype, (1,), ())

    def passes(check: _Finite, code: torch.Tensor) -> bool:
        try:
            check(tensor, memoryview(code.reshape(1).view(torch.uint8).numpy()))
        except UserError:
            return False
        return True

    plain, biases = _Finite(), _Finite(frozenset({"w"}))
    found = [passes(plain, code) for code in codes]
    assert found == values.isfinite().tolist()
    assert [passes(biases, code) for code in codes] == (values.isfinite() | values.isneginf()).tolist()
    assert not all(found)
    with pytest.raises(UserError, match="w has NaN or inf"):  # one among many
        plain(tensor, memoryview(codes.view(torch.uint8).numpy()))
    good = codes[values.isfinite()].contiguous()
    plain(tensor, memoryview(good.view(torch.uint8).numpy()))


def test_what_else_safetensors_holds_has_no_such_codes():
    assert set(DTYPE_BITS) - set(FINITE_LIMITS) == {
        *("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"),
        *("F4", "F6_E2M3", "F6_E3M2"),  # OCP's formats of 4 and 6 bits: every code is a number
    }


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_routing_bias_may_hold_minus_infinity_only(checkpoints, tmp_path, value):
    """And what stops there leaves nothing, not even the folders above the output."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("deepseek_v3"), source)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "e_score_correction_bias" in name)
    tensors[name][:] = float(value)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made, out = api.plan(source, "random", 4), tmp_path / "a" / "b" / "out"
    if value == "-inf":
        api.apply(source, made, out)
        assert out.exists()
        return
    with pytest.raises(UserError, match=f"{name} has NaN or inf"):
        api.apply(source, made, out)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_config_that_transformers_refuses_is_refused_before_anything_is_written(checkpoints, tmp_path):
    """By a process of its own where torch is not loaded, in this one where it is: with the same words."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    config = json.loads((source / "config.json").read_text())
    code = "import sys; from expertsmith import api; s, o = sys.argv[1:]; api.apply(s, api.plan(s, 'random', 4), o)"
    for key, value, says in (("num_key_value_heads", 0, "modulo by zero"), ("intermediate_size", "48", "'intermediate_size'"), ("vocab_size", 7, "wrong shape")):  # fmt: skip
        (source / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=says) as caught:
            api.apply(source, api.plan(source, "random", 4), tmp_path / "a" / "out")
        assert not (tmp_path / "a").exists()
        done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "a" / "out"], capture_output=True, text=True, check=False)  # fmt: skip
        assert done.stderr.splitlines()[-1] == f"expertsmith.errors.UserError: {caught.value}"
        assert not (tmp_path / "a").exists()


def test_a_config_that_leaves_tensors_without_a_place_is_refused_before_anything_is_written(checkpoints, tmp_path):
    """Without layer_types, transformers builds a MiniMax-M3 without indexers: it would run, and be another model."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("minimax_m3_vl_text"), source)
    config = json.loads((source / "config.json").read_text())
    assert "minimax_m3_sparse" in config.pop("layer_types")
    (source / "config.json").write_text(json.dumps(config))
    made = api.plan(source, "random", 4)
    with pytest.raises(
        UserError, match=r"has no parameter for .*self_attn\.indexer\..*does it lack a key .* such as layer_types"
    ):
        api.apply(source, made, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
