"""Quantised checkpoints that contradict themselves are refused; what is not quantised is left alone."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantise
from conftest import SUPPORTED, run_cli, save_tiny
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.floats import floats, quantisation_of
from expertsmith.errors import UserError
from one_weight import NAME, store, view, weight
from quantise import KINDS, WIDE, quantise_checkpoint

BLOCKS = quantise.BLOCKS
pytest.importorskip("compressed_tensors")


@cache
def quantised(kind: str, root: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and config.json of a small Mixture of Experts in a format."""
    family = "gpt_oss" if kind == "mxfp4" else "deepseek_v3" if kind == "fp8_fused" else "mixtral"
    if not (root / family).exists():
        save_tiny(family, root / family, **WIDE[family], num_hidden_layers=1 if family == "mixtral" else 2)
    if kind == "fp8_fused":  # the names that transformers has in memory
        fuse(root / family)
    quantise_checkpoint(root / family, root / f"{family}-{kind}", kind)
    folder = root / f"{family}-{kind}"
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def fuse(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for layer in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        held = {
            leaf: [tensors.pop(f"{layer}.experts.{e}.{leaf}_proj.weight") for e in range(8)] for leaf in ("gate", "up", "down")
        }
        tensors[f"{layer}.experts.down_proj"] = torch.stack(held["down"])
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(held["gate"], held["up"], strict=True)]
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


W1 = "model.layers.0.block_sparse_moe.experts.3.w1"


def put(name, value):
    """An edit: a tensor gets another value."""
    return lambda tensors, config: tensors.update({name: value(tensors[name])})


def drop(name):
    return lambda tensors, config: tensors.pop(name)


def add(name, value):
    return lambda tensors, config: tensors.update({name: value})


def say(**keys):
    """An edit of quantization_config."""
    return lambda tensors, config: config["quantization_config"].update(keys)


def say_weights(**keys):
    return lambda tensors, config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(keys)


def fill(value, count=1):
    def edit(tensor):
        flat = tensor.clone()
        raw = flat.view(torch.uint8) if isinstance(value, int) else flat
        raw.reshape(-1)[:count] = value
        return flat

    return edit


def two_configs(tensors, config):
    config["text_config"] = {**config, "quantization_config": {**config["quantization_config"], "weight_block_size": [8, 8]}}


NAN, INF = float("nan"), float("inf")
BAD = [
    # scales of a wrong shape
    ("fp8_block", put(f"{W1}.weight_scale_inv", lambda s: s[:, :1]), r"w1.weight_scale_inv has shape \[2, 1\], which does not fit .*w1.weight \[32, 32\]: one scale for blocks of 16 × 16"),
    ("fp8_block", put(f"{W1}.weight_scale_inv", lambda s: s.repeat(2, 2)), r"has shape \[4, 4\], which does not fit"),
    ("fp8_channel", put(f"{W1}.weight_scale", lambda s: s[:31]), r"w1.weight_scale has shape \[31, 1\], which does not fit"),
    ("fp8_tensor", put(f"{W1}.weight_scale", lambda s: s.repeat(3)), r"w1.weight_scale has shape \[3\], which does not fit"),
    ("fp8_fused", put("model.layers.1.mlp.experts.down_proj_scale_inv", lambda s: s[:7]), r"down_proj_scale_inv has shape \[7, 4, 2\], which does not fit"),
    ("int4", put(f"{W1}.weight_scale", lambda s: s[:, :3]), r"w1.weight_scale|group_size"),
    ("int4", put(f"{W1}.weight_scale", lambda s: s[:16]), r"w1.weight_scale has shape \[16, 4\], which does not fit"),
    ("int4_asymmetric", put(f"{W1}.weight_zero_point", lambda z: z[:3]), r"w1.weight_zero_point has shape \[3, 4\], which does not fit .*\[4, 4\] is expected"),
    ("int4_actorder", put(f"{W1}.weight_g_idx", lambda g: g[:16]), r"w1.weight_g_idx has shape \[16\], which does not fit"),
    ("nvfp4", put(f"{W1}.weight_scale", lambda s: s[:, :1]), r"w1.weight_scale has shape \[32, 1\], which does not fit .*one scale for 16 inputs"),
    ("nvfp4", put(f"{W1}.weight_global_scale", lambda s: s.repeat(3)), r"w1.weight_global_scale has shape \[3\].*one number is expected"),
    ("mxfp4", put("model.layers.1.mlp.experts.down_proj_scales", lambda s: s[:, :5]), r"down_proj_scales has shape \[8, 5, 1\], which does not fit"),
    ("mxfp4", put("model.layers.1.mlp.experts.down_proj_blocks", lambda b: b[..., :8]), r"down_proj_blocks has shape .*: blocks of 16 bytes are expected"),
    ("mxfp4_packed", put(f"{W1}.weight_scale", lambda s: s[:31]), r"w1.weight_(scale|packed)"),
    ("mxfp8", put(f"{W1}.weight_scale", lambda s: s[:, :0].reshape(0, 1)), r"w1.weight_scale"),
    ("gptq", put(f"{W1}.scales", lambda s: s[:, :7]), r"w1.scales has shape \[4, 7\], which does not fit"),
    ("gptq", put(f"{W1}.qzeros", lambda z: z[:, :3]), r"w1.qzeros has shape \[4, 3\], which does not fit"),
    ("awq", put(f"{W1}.scales", lambda s: s[:, :7]), r"w1.scales has shape \[4, 7\], which does not fit"),
    ("awq", put(f"{W1}.qzeros", lambda z: z[:3]), r"w1.qzeros has shape \[3, 4\], which does not fit"),
    ("bnb_nf4", put(f"{W1}.weight", lambda w: w[:100]), r"quant_state.bitsandbytes__nf4 says \[32, 32\], which does not fit"),
    ("bnb_nf4", put(f"{W1}.weight.absmax", lambda a: a[:3]), r"w1.weight.absmax has shape \[3\], which does not fit .*\[16\] is expected"),
    ("bnb_nf4", put(f"{W1}.weight.quant_map", lambda m: m[:8]), r"w1.weight.quant_map has shape \[8\], which does not fit"),
    ("bnb_int8", put(f"{W1}.SCB", lambda s: s[:31]), r"w1.SCB has shape \[31\], which does not fit"),
    ("int8_bytes", put(f"{W1}.weight_scale", lambda s: s[:31]), r"w1.weight_scale has shape \[31, 1\], which does not fit"),
    # a missing companion
    ("fp8_block", drop(f"{W1}.weight_scale_inv"), r"w1.weight is F8_E4M3, but it has no scales and no decoder"),
    ("int4", drop(f"{W1}.weight_scale"), r"w1.weight is quantised, but .*w1.weight_scale is missing"),
    ("int4", drop(f"{W1}.weight_shape"), r"w1.weight is quantised, but .*w1.weight_shape is missing"),
    ("int8_bytes", drop(f"{W1}.weight_scale"), r"w1.weight is quantised, but .*w1.weight_scale is missing"),
    ("nvfp4", drop(f"{W1}.weight_global_scale"), r"w1.weight is quantised, but .*w1.weight_global_scale is missing"),
    ("nvfp4", drop(f"{W1}.weight_scale"), r"w1.weight_(packed is U8, but nothing was found|global_scale belongs to a quantised weight)"),
    ("nvfp4_modelopt", drop(f"{W1}.weight_scale_2"), r"w1.weight is quantised, but .*w1.weight_scale_2 is missing"),
    ("nvfp4_modelopt", drop(f"{W1}.weight_scale"), r"w1.weight(_scale_2 belongs to a quantised weight| is U8, but nothing was found)"),
    ("mxfp4", drop("model.layers.1.mlp.experts.down_proj_scales"), r"down_proj is quantised, but .*down_proj_scales is missing"),
    ("gptq", drop(f"{W1}.scales"), r"w1.weight is quantised, but .*w1.scales is missing"),
    ("gptq", drop(f"{W1}.qzeros"), r"w1.weight is quantised, but .*w1.qzeros is missing"),
    ("awq", drop(f"{W1}.qzeros"), r"w1.weight is quantised, but .*w1.qzeros is missing"),
    ("bnb_nf4", drop(f"{W1}.weight.absmax"), r"w1.weight is quantised, but .*w1.weight.absmax is missing"),
    ("bnb_nf4", drop(f"{W1}.weight.nested_absmax"), r"w1.weight is quantised, but .*w1.weight.nested_absmax is missing"),
    ("bnb_nf4", drop(f"{W1}.weight.quant_state.bitsandbytes__nf4"), r"w1.weight(.nested_absmax belongs to a quantised weight| is U8, but nothing was found)"),
    ("bnb_nf4", put(f"{W1}.weight.quant_state.bitsandbytes__nf4", fill(7)), r"bitsandbytes__nf4 is not a description of a quantised weight"),
    ("bnb_int8", drop(f"{W1}.SCB"), r"w1.weight is quantised, but .*w1.SCB is missing"),
    # scales and codes that are no numbers
    ("fp8_block", put(f"{W1}.weight_scale_inv", fill(NAN)), r"w1.weight_scale_inv has NaN or inf"),
    ("fp8_block", put(f"{W1}.weight_scale_inv", fill(INF)), r"w1.weight_scale_inv has NaN or inf"),
    ("fp8_block", put(f"{W1}.weight", fill(0x7F)), r"w1.weight has NaN"),
    ("fp8_block", lambda t, c: (put(f"{W1}.weight", fill(0x7F))(t, c), put(f"{W1}.weight_scale_inv", fill(1000.0))(t, c)), r"w1.weight has NaN"),
    ("fp8_block_ue8m0", put(f"{W1}.weight_scale_inv", fill(0xFF)), r"w1.weight_scale_inv has NaN or inf"),
    ("fp8_fused", put("model.layers.1.mlp.experts.down_proj_scale_inv", fill(NAN)), r"down_proj_scale_inv has NaN or inf"),
    ("mxfp8", put(f"{W1}.weight_scale", fill(0xFF)), r"w1.weight_scale has NaN or inf"),
    ("int4", put(f"{W1}.weight_scale", fill(NAN)), r"w1.weight_scale has NaN or inf"),
    ("nvfp4", put(f"{W1}.weight_scale", fill(0x7F)), r"w1.weight_scale has NaN or inf"),
    ("nvfp4", put(f"{W1}.weight_global_scale", fill(INF)), r"w1.weight_global_scale has NaN or inf"),
    ("nvfp4", put(f"{W1}.weight_global_scale", fill(0.0)), r"w1.weight_global_scale is 0"),
    ("mxfp4", put("model.layers.1.mlp.experts.down_proj_scales", fill(0xFF)), r"down_proj_scales has NaN or inf"),
    ("mxfp4_packed", put(f"{W1}.weight_scale", fill(0xFF)), r"w1.weight_scale has NaN or inf"),
    ("gptq", put(f"{W1}.scales", fill(NAN)), r"w1.scales has NaN or inf"),
    ("awq", put(f"{W1}.scales", fill(INF)), r"w1.scales has NaN or inf"),
    ("bnb_nf4", put(f"{W1}.weight.nested_absmax", fill(NAN)), r"w1.weight.nested_absmax has NaN or inf"),
    ("bnb_int8", put(f"{W1}.SCB", fill(NAN)), r"w1.SCB has NaN or inf"),
    # blocks that do not divide, shapes that contradict each other
    ("fp8_block", say(weight_block_size=[12, 12]), r"which does not fit .*: one scale for blocks of 12 × 12 is expected"),
    ("fp8_block", say(weight_block_size=[128, 128]), r"one scale for blocks of 128 × 128 is expected"),
    ("int4", put(f"{W1}.weight_shape", lambda s: torch.tensor([32, 40])), r"w1.weight_packed|w1.weight_shape"),
    ("int4", put(f"{W1}.weight_shape", lambda s: torch.tensor([31, 32])), r"w1.weight_shape says \[31, 32\], which contradicts"),
    ("int4", put(f"{W1}.weight_shape", lambda s: torch.tensor([32])), r"w1.weight_shape says \[32\], which contradicts"),
    ("int4", put(f"{W1}.weight_shape", lambda s: torch.tensor([-32, 32])), r"w1.weight_shape says \[-32, 32\], which contradicts"),
    ("int4_actorder", put(f"{W1}.weight_g_idx", fill(9)), r"w1.weight_g_idx names a group that"),
    ("gptq", put(f"{W1}.g_idx", fill(9)), r"w1.g_idx refers to a group that does not exist"),
    ("gptq_order", say(desc_act=False), r"g_idx: its tensors say columns are in a custom order, but the quantisation config says desc_act false"),
    # a config that contradicts the tensors
    ("int4", say_weights(num_bits=8), r"its tensors say bits 4 .*, but the quantisation config says 8"),
    ("int4", say_weights(group_size=16), r"its tensors say group_size 8, but the quantisation config says 16"),
    ("int4", say_weights(symmetric=False), r"its tensors say symmetric True, but the quantisation config says False"),
    ("int4_asymmetric", say_weights(symmetric=True), r"its tensors say symmetric False, but the quantisation config says True"),
    ("int4", say_weights(strategy="channel"), r"its tensors say group_size 8, but the quantisation config says strategy channel"),
    ("int4_channel", say_weights(strategy="group", group_size=8), r"group_size|strategy"),
    ("int4", say_weights(type="float"), r"its tensors say codes of int, but the quantisation config says float"),
    ("int8_bytes", say_weights(type="float"), r"its tensors say codes of int, but the quantisation config says float"),
    ("int8_bytes", say_weights(symmetric=False), r"its tensors say symmetric True, but the quantisation config says False"),
    ("fp8_channel", say_weights(type="int"), r"its tensors say 8 bits of float"),
    ("fp8_channel", say_weights(strategy="block", block_structure=[16, 16]), r"its tensors say one scale per channel, but the quantisation config says one per block"),
    ("fp8_channel", say_weights(strategy="tensor"), r"its tensors say one scale per channel, but the quantisation config says one per tensor"),
    ("nvfp4", say_weights(num_bits=8), r"its tensors say 4 bits of float in groups of 16, but the quantisation config says 8 bits of float"),
    ("nvfp4", say_weights(type="int"), r"but the quantisation config says 4 bits of int"),
    ("mxfp4_packed", say_weights(num_bits=8), r"its tensors say 4 bits of float in groups of 32, but the quantisation config says 8 bits"),
    ("gptq", say(bits=8), r"its tensors say bits 4, but the quantisation config says 8"),
    ("gptq", say(bits=5), r"the quantisation config says 5 bits; GPTQ has 2, 3, 4, 8"),
    ("gptq", say(group_size=16), r"its tensors say groups 4, but the quantisation config says group_size 16, which is 2"),
    ("awq", say(bits=8), r"the quantisation config says 8 bits; AWQ has 4"),
    ("awq", say(group_size=16), r"its tensors say groups 4, but the quantisation config says group_size 16, which is 2"),
    ("gptq", say(checkpoint_format="marlin"), r"checkpoint_format 'marlin' is not supported; supported: gptq and gptq_v2"),
    ("awq", say(version="gemv"), r"AWQ of version 'gemv' packs its codes differently; only version gemm"),
    ("autoround", say(packing_format="auto_round:exllama"), r"packing_format 'auto_round:exllama' is not supported"),
    ("int4", say(quant_method="gptq"), r"is INT4, groups of 8, but .* says quant_method 'gptq'"),
    ("fp8_block", say(quant_method="mxfp4"), r"is FP8, blocks of 16 × 16, but .* says quant_method 'mxfp4'"),
    ("gptq", say(quant_method="awq"), r"w1|qzeros|scales|shape"),
    ("fp8_block", say(quant_method="hqq"), r"quant_method 'hqq' cannot be decoded; supported: auto-round, awq"),
    ("fp8_block", lambda tensors, config: config["quantization_config"].pop("quant_method"), r"quantization_config has no quant_method"),
    ("fp8_block", lambda tensors, config: config.update(quantization_config="fp8"), r"quantization_config is not an object"),
    ("int4", say(sparsity_config={"format": "sparse-24-bitmask"}), r"the quantisation has a sparsity_config, which changes weights"),
    ("int4", say(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), r"the quantisation has a transform_config"),
    ("fp8_block", two_configs, r"has two different quantization_configs, one at the top and one in text_config"),
    # what nothing claims
    ("fp8_block", add(f"{W1}.weight_scale_2", torch.ones(1)), r"w1.weight_scale_2 belongs to a quantised weight that cannot be decoded"),
    ("fp8_block", add(f"{W1}.weight_scale", torch.ones(2, 2)), r"w1.weight has two scales"),
    ("int4", add(f"{W1}.weight", torch.ones(32, 32)), r"w1.weight is in .* twice"),
    ("fp8_block", add("model.layers.0.self_attn.z_proj.weight_scale_inv", torch.ones(1, 1)), r"z_proj.weight_scale_inv belongs to a quantised weight"),
    ("gptq", add(f"{W1}.bitmask", torch.ones(4)), r"w1.bitmask belongs to a quantised weight"),
    ("gptq", drop(f"{W1}.qweight"), r"w1.(qzeros|scales|g_idx) belongs to a quantised weight"),
    ("awq", put(f"{W1}.qweight", lambda q: q.to(torch.int64)), r"w1.(qweight|qzeros|scales)"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "edit", "message"), BAD, ids=[f"{i}-{kind}" for i, (kind, _, _) in enumerate(BAD)])
def test_contradictions_are_refused(kind, edit, message, tmp_path, tmp_path_factory, capsys):
    """One line, exit code 2, nothing written: by a command that reads the experts, from the first look to the result."""
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.getbasetemp() / "bad"
    tensors, config = quantised(kind, root)
    tensors, config = dict(tensors), json.loads(json.dumps(config))
    edit(tensors, config)
    write(tmp_path / "source", tensors, config)
    code, _, err = run_cli(capsys, "compress", tmp_path / "source", "-m", "aimer", "-k", "0.5", "-o", tmp_path / "out", "-q")
    assert code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("said", [None, {"quant_method": "fp8"}, {"quant_method": "compressed-tensors"}])
def test_codes_alone_are_refused(dtype, said, tmp_path):
    """Weights that are codes, and nothing that says what they are worth, with and without a config."""
    checkpoint = store(tmp_path, {".weight": torch.ones(8, 16).to(dtype)}, said or {})
    with pytest.raises(UserError, match=rf"{NAME}.weight(_scale)? is"):
        quantisation_of(checkpoint)


def test_floats_that_are_said_to_be_quantised(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints("mixtral"), tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "quantization_config": BLOCKS}))
    arguments = ("compress", tmp_path / "source", "-m", "random", "-k", "0.5", "-o", tmp_path / "out", "-q")
    code, _, err = run_cli(capsys, *arguments)
    assert code == 2
    assert (
        "says quant_method 'fp8', but no tensor is quantised; if the weights are plain floats, remove quantization_config"
        in err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_unquantised_checkpoints_are_not_touched(model_type, checkpoints):
    """Learned scales, buffers of integers and the like are no quantisation: the view is the checkpoint itself."""
    checkpoint = open_checkpoint(checkpoints(model_type))
    assert quantisation_of(checkpoint) is None
    assert floats(checkpoint) is checkpoint


def test_parameters_that_look_like_scales(tmp_path):
    """In an unquantised model, a float that ends in _scale is a parameter, and integers are tables; in a quantised one, too."""
    others = {
        "router.per_expert_scale": torch.rand(8),
        "norm.scale": torch.rand(8),
        "attn.logit_scale": torch.tensor(2.0),
        "layer_scalar": torch.ones(1),
        "tid2eid": torch.arange(32, dtype=torch.int32).reshape(4, 8),
        "position_ids": torch.arange(12)[None],
    }
    plain = store(tmp_path / "plain", others, {}, name="")
    assert quantisation_of(plain) is None
    parts = {f"{NAME}{leaf}": part for leaf, part in quantise.fp8_block(weight(32, 32)).items()}
    found = floats(store(tmp_path / "fp8", {**others, **parts, f"{NAME}.input_scale": torch.ones(1)}, BLOCKS, name=""))
    assert set(found.tensors) == {*others, f"{NAME}.weight"}
    for name, value in others.items():
        assert torch.equal(found.read(name), value)


def test_config_beside_or_inside(tmp_path):
    """modelopt's file alone, and a quantization_config in text_config, say the same."""
    parts = quantise.fp8_modelopt(weight(24, 64))
    want = parts[".weight"].float() * parts[".weight_scale"]
    beside = store(tmp_path / "beside", parts, {}, KINDS["fp8_modelopt"].files)
    assert torch.equal(floats(beside).read(f"{NAME}.weight"), want)
    inside = store(tmp_path / "inside", parts, {})
    (tmp_path / "inside" / "config.json").write_text(
        json.dumps({"model_type": "outer", "text_config": {"quantization_config": KINDS["fp8_modelopt"].config}})
    )
    inside = open_checkpoint(tmp_path / "inside")
    assert torch.equal(floats(inside).read(f"{NAME}.weight"), want)
    assert floats(inside).config == {"model_type": "outer", "text_config": {}}
    assert inside.config["text_config"]["quantization_config"]


def test_bitsandbytes_missing(tmp_path, monkeypatch):
    """Named with its install line when it is needed; the other commands (plan without weights, apply) do not need it."""
    pytest.importorskip("bitsandbytes")
    found, name, _ = view(tmp_path, "bnb_nf4", weight(16, 64))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r'pip install "expertsmith\[bnb\]"'):
        found.read(name)
