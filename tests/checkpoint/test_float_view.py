"""Everything that reads a quantised checkpoint sees the floats that its codes stand for; what is written holds its bytes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from conftest import DEVICE, SUPPORTED, run_cli, save_tiny
from expertsmith import api
from expertsmith.arch import families
from expertsmith.calibration.observers import Batch
from expertsmith.calibration.stats import layer_path
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.floats import floats, quantisation_of
from expertsmith.checkpoint.formats import formats
from expertsmith.engine import Walk, load_model
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from quantise import KINDS, WIDE, quantise_checkpoint

pytest.importorskip("compressed_tensors")
pytest.importorskip("bitsandbytes")

SMALL = {"seq_len": 16, "pack": False, "batch_tokens": 64, "device": DEVICE}
# every format once, and the common ones in families with shared experts, low-rank attention and fused experts
FUSED = ("mxfp4", "fp8_fused", "fp8_fused_tensor")
CASES = [(kind, "gpt_oss" if kind in FUSED else "mixtral") for kind in KINDS] + [
    ("fp8_block", "qwen3_moe"), ("int4", "qwen3_moe"), ("gptq_order", "qwen3_moe"), ("nvfp4", "qwen3_moe"),
    ("fp8_block_ue8m0", "deepseek_v3"), ("int4_asymmetric", "deepseek_v3"), ("awq", "deepseek_v3"),
    ("fp8_channel", "glm4_moe"), ("mxfp4_packed", "glm4_moe"), ("bnb_nf4", "glm4_moe"),
]  # fmt: skip
every_case = pytest.mark.parametrize(("kind", "family"), CASES, ids=[f"{family}-{kind}" for kind, family in CASES])


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> list[str]:
    """`--data` of a few tokens."""
    file = tmp_path_factory.mktemp("few") / "a.jsonl"
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 120, (length,), generator=generator).tolist() for length in (16, 11, 16, 16)]
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return [f"a={file}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(kind, family) → (quantised checkpoint, the same weights written out in float32)."""
    root = tmp_path_factory.mktemp("quantised")

    @cache
    def plain(family: str) -> Path:
        return save_tiny(family, root / family, **WIDE[family])

    @cache
    def build(kind: str, family: str) -> tuple[Path, Path]:
        source, written = root / f"{family}-{kind}", root / f"{family}-{kind}-floats"
        quantise_checkpoint(plain(family), source, kind)
        write_floats(source, written)
        return source, written

    return build


def write_floats(source: Path, target: Path) -> None:
    """The float32 view of a checkpoint as a checkpoint."""
    view = floats(open_checkpoint(source))
    target.mkdir()
    (target / "config.json").write_text(json.dumps(view.config))
    save_file({name: view.read(name).clone() for name in view.tensors}, target / "model.safetensors", metadata={"format": "pt"})


def assert_same_statistics(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.glob("layer_*.safetensors"))
    assert files
    for file in files:
        a, b = load_arrays(one / file), load_arrays(other / file)
        assert set(a) == set(b)
        for name, value in a.items():
            assert np.abs(value - b[name]).max() <= 1e-5 * np.abs(value).max(), (file, name)


@every_case
def test_statistics_and_plan_are_those_of_the_floats(kind, family, made, few, tmp_path):
    source, written = made(kind, family)
    for name, model, memory in (("stream", source, "stream"), ("resident", source, "resident"), ("floats", written, "stream")):
        api.calibrate(model, few, tmp_path / name, memory=memory, dtype="float32", **SMALL)
    for name in ("stream", "resident"):
        assert_same_statistics(tmp_path / "floats", tmp_path / name)
    want = api.plan(written, "reap", 0.5, stats=tmp_path / "floats")
    plan = api.plan(source, "reap", 0.5, stats=tmp_path / "stream")
    assert plan.kept == want.kept
    for a, b in zip(plan.layers, want.layers, strict=True):
        assert a.saliency == pytest.approx(b.saliency, rel=1e-5)
    aimer, plain = (api.plan(model, "aimer", 0.5) for model in (source, written))
    assert aimer.kept == plain.kept
    for a, b in zip(aimer.layers, plain.layers, strict=True):
        assert a.saliency == pytest.approx(b.saliency, rel=1e-5)


@every_case
def test_logits_are_those_of_the_floats(kind, family, made):
    """Stream and resident against plain transformers on the floats."""
    import transformers

    source, written = made(kind, family)
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()(ids).logits
    for memory in ("stream", "resident"):
        model = load_model(open_checkpoint(source), families()[family], memory=memory, dtype="float32")
        with Walk(model, [Batch(ids, torch.ones_like(ids, dtype=torch.bool), "a", [0, 1])]) as walk:
            list(walk.layers())
            found = next(walk.outputs()).logits
        assert (found - want).abs().max() <= 1e-5 * want.abs().max(), memory


@every_case
def test_load_gives_the_floats(kind, family, made):
    """Also where transformers' own loading would run codes without their scales."""
    import transformers

    source, written = made(kind, family)
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    model = api.load(source, dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()(ids).logits
        found = model(ids).logits
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_load_of_quantised_weights_takes_what_it_can_keep(made):
    source = made(*CASES[0])[0]
    with pytest.raises(UserError, match="attn_implementation"):
        api.load(source, attn_implementation="eager")
    with pytest.raises(UserError, match="on one device"):
        api.load(source, device_map={"a": "cpu", "b": "cuda:0"})
    assert api.load(source, dtype="bfloat16", device_map={"": "cpu"}).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "family"), CASES[:1] + CASES[-6:])
def test_dtype_means_what_it_says(kind, family, made):
    """A quantised model runs in the dtype that was asked for, its weights rounded once."""
    source, written = made(kind, family)
    record, view = families()[family], open_checkpoint(written)
    model = load_model(open_checkpoint(source), record, memory="resident", dtype="bfloat16")
    plain = load_model(view, record, memory="resident", dtype="bfloat16")
    wanted = dict(plain.module.named_parameters())
    for name, value in model.module.named_parameters():
        assert value.dtype == wanted[name].dtype, name
        assert torch.equal(value, wanted[name]), name


def assert_bytes_of_the_source(source: Path, out: Path, kept: dict[int, list[int]]) -> None:
    """Every tensor of the output is one of the source under its old expert id, or the kept rows of one, bit for bit."""
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    used = set()
    for name, value in after.items():
        layer = next((int(number) for number in re.findall(r"layers\.(\d+)\.", name)), None)
        keep = kept.get(layer, [])
        old = re.sub(r"\.experts\.(\d+)\.", lambda m, keep=keep: f".experts.{keep[int(m[1])]}.", name)
        want = before[old]
        if value.shape != want.shape:
            want = want[keep]
        assert value.dtype == want.dtype
        assert torch.equal(value.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)), name
        used.add(old)
    for name in set(before) - used:  # what went are whole experts
        layer, expert = re.search(r"layers\.(\d+)\..*\.experts\.(\d+)\.", name).groups()
        assert int(expert) not in kept[int(layer)], name


@every_case
def test_pruned_and_proved(kind, family, made, few, tmp_path):
    source, _ = made(kind, family)
    api.calibrate(source, few, tmp_path / "stats", memory="stream", dtype="float32", **SMALL)
    plan = api.plan(source, "reap", 0.5, stats=tmp_path / "stats")
    api.apply(source, plan, tmp_path / "out")
    assert_bytes_of_the_source(source, tmp_path / "out", plan.kept)
    verdict = api.verify(source, tmp_path / "out", tokens=32, memory="stream", device=DEVICE)
    assert verdict.passed
    assert verdict.largest < 1e-5
    found, before = (quantisation_of(open_checkpoint(path)) for path in (tmp_path / "out", source))
    assert found.title == before.title
    assert found.config == before.config


@pytest.mark.parametrize("kind", ["fp8_block", "int4"])
def test_a_code_that_is_another_is_found(kind, made, tmp_path):
    """The byte half of verify reads codes, and the other half outputs."""
    source, _ = made(kind, "mixtral")
    api.apply(source, api.plan(source, "aimer", 0.5), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = next(name for name in tensors if ".experts.0.w2.weight" in name and "scale" not in name and "shape" not in name)
    tensors[name].view(torch.uint8).reshape(-1)[0] ^= 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    verdict = api.verify(source, tmp_path / "out", tokens=32, memory="stream", device=DEVICE)
    assert not verdict.passed
    assert name in verdict.wrong_tensors


@every_case
def test_weights_are_counted(kind, family, made):
    """inspect names the quantisation; parameters are those of the floats, bytes those on disk."""
    source, written = made(kind, family)
    found, plain = api.inspect(source), api.inspect(written)
    assert found["quantisation"] == {"formats": quantisation_of(open_checkpoint(source)).title, "cannot_be_decoded": None}
    assert plain["quantisation"] is None
    assert found["parameters"] == plain["parameters"]
    assert found["bytes"] == open_checkpoint(source).nbytes < plain["bytes"]
    assert found["num_experts"] == plain["num_experts"]


@every_case
def test_written_as_plain_bfloat16(kind, family, made, tmp_path):
    source, written = made(kind, family)
    result = api.dequantise(source, tmp_path / "out")
    plain, view = open_checkpoint(tmp_path / "out"), open_checkpoint(written)
    stored = quantisation_of(open_checkpoint(source)).stored
    assert quantisation_of(plain) is None
    assert result["weights"] == len(stored)
    assert set(plain.tensors) == set(view.tensors)
    for name in plain.tensors:
        want = view.read(name)
        assert torch.equal(plain.read(name), want.bfloat16() if name in stored else want), name
    assert "quantization_config" not in plain.config
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize(("kind", "family"), [("fp8_block", "mixtral"), ("mxfp4", "gpt_oss")])
def test_moeits_and_analyze(kind, family, made, few, tmp_path):
    source, written = made(kind, family)
    options = {"seq_len": 16, "pack": False, "device": DEVICE, "memory": "stream", "dtype": "float32"}
    one, other = (api.plan(model, "moeits", 0.5) for model in (source, written))
    assert one.kept == other.kept
    found, plain = (
        api.analyze(model, tmp_path / model.name, data=few, all_experts=8, **options) for model in (source, written)
    )
    for part in ("layers", "summary"):
        assert_close(found[part], plain[part])


def assert_close(one, other, where="") -> None:
    """The same numbers."""
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for key, value in one.items():
            assert_close(value, other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{where}[{index}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5, nan_ok=True), where


MERGED = [("fp8_block", "mixtral"), ("int4", "mixtral"), ("mxfp4", "gpt_oss"), ("fp8_fused", "gpt_oss"), ("nvfp4", "qwen3_moe"),
          ("gptq", "mixtral"), ("bnb_nf4", "mixtral")]  # fmt: skip


@pytest.mark.parametrize(("kind", "family"), MERGED)
def test_merged_in_bfloat16(kind, family, made, few, tmp_path):
    source, _ = made(kind, family)
    plan = api.plan(source, "hc_smoe", 0.5, data=few, out=tmp_path / "plan.json", **SMALL)
    api.apply(source, plan, tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    assert quantisation_of(out) is None
    assert api.verify(source, tmp_path / "out", tokens=32, memory="stream", device=DEVICE).passed


@pytest.mark.parametrize(("kind", "family"), MERGED)
def test_merged_and_quantised_again(kind, family, made, few, tmp_path):
    source, _ = made(kind, family)
    plan = api.plan(source, "hc_smoe", 0.5, data=few, out=tmp_path / "plan.json", **SMALL)
    found = quantisation_of(open_checkpoint(source))
    if any(formats()[entry.format].encode is None for entry in found.stored.values()):
        with pytest.raises(UserError, match="cannot be re-quantised without calibration data; remove --requantise"):
            api.apply(source, plan, tmp_path / "out", requantise=True)
        assert not (tmp_path / "out").exists()
        return
    notes = api.apply(source, plan, tmp_path / "out", requantise=True)
    assert any("quantised" in note for note in notes)
    assert quantisation_of(open_checkpoint(tmp_path / "out")).title == found.title
    assert api.verify(source, tmp_path / "out", tokens=32, memory="stream", device=DEVICE).passed


def test_requantise_where_it_means_nothing(made, tmp_path):
    source, written = made("fp8_block", "mixtral")
    with pytest.raises(UserError, match="--requantise has no effect: no expert is merged"):
        api.apply(source, api.plan(source, "aimer", 0.5), tmp_path / "out", requantise=True)
    with pytest.raises(UserError, match="is not quantised; there is nothing to do"):
        api.dequantise(written, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands_on_a_quantised_checkpoint(made, few, tmp_path, capsys):
    """compress and dequantise as they are typed."""
    source, _ = made("fp8_block", "qwen3_moe")
    options = ["--seq-len", "16", "--no-pack", "--device", DEVICE, "--memory", "stream", "-q"]
    arguments = ["compress", source, "-m", "reap", "-k", "0.5", "-d", few[0], "-o", tmp_path / "out", *options]
    code, _, err = run_cli(capsys, *arguments)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "expertsmith" / "verify.json").read_text())["passed"]
    code, _, err = run_cli(capsys, "dequantise", tmp_path / "out", "-o", tmp_path / "plain", "-q")
    assert code == 0, err
    assert quantisation_of(open_checkpoint(tmp_path / "plain")) is None


# ------------------------------------------------------------------------------------------------------------ every family
def routed(path: Path) -> tuple[int, int]:
    """(routed weights that are quantised, all of them)."""
    inventory = take_inventory(open_checkpoint(path))
    names = {claim.info.name for claim in inventory.floats.claims if claim.routed and not claim.info.name.endswith("bias")}
    return len(names & set(quantisation_of(inventory.checkpoint).stored)), len(names)


def can_be_int4(path: Path) -> bool:
    """pack-quantized knows matrices, one a module, of whole groups of 8 inputs: a family whose experts are stored in one tensor has none."""
    inventory = take_inventory(open_checkpoint(path))
    held = [claim for claim in inventory.claims if claim.kind == "expert" and claim.info.name.endswith(".weight")]
    return bool(held) and all(len(c.info.shape) == 2 and c.info.shape[1] % 8 == 0 for c in held)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_family(model_type, kind, checkpoints, few, tmp_path):
    """FP8 blocks in every family (fused where its experts are), INT4 where experts are matrices of their own."""
    plain = checkpoints(model_type)
    if kind == "int4" and not can_be_int4(plain):
        pytest.skip("experts are stored in one tensor, which pack-quantized does not know")
    quantise_checkpoint(plain, tmp_path / "source", "fp8_fused" if kind == "fp8" else kind)
    quantised, all_of_them = routed(tmp_path / "source")
    assert quantised == all_of_them > 0
    source = tmp_path / "source"
    api.calibrate(source, few, tmp_path / "stats", memory="stream", dtype="float32", **SMALL)
    plan = api.plan(source, "reap", 0.5, stats=tmp_path / "stats")
    api.apply(source, plan, tmp_path / "out")
    verdict = api.verify(source, tmp_path / "out", tokens=16, memory="stream", device=DEVICE)
    assert verdict.passed
    assert verdict.largest < 2e-5
    assert layer_path(tmp_path / "stats", plan.layers[0].layer).exists()


def test_families_without_int4(checkpoints):
    """Those whose experts are stored in one tensor, and no others."""
    left = {name for name in SUPPORTED if not can_be_int4(checkpoints(name))}
    fused = {name for name in SUPPORTED if any(entry.role == "expert" for entry in families()[name].stacked) and
             all(claim.kind != "expert" for claim in take_inventory(open_checkpoint(checkpoints(name))).claims)}  # fmt: skip
    assert left == fused
    assert len(left) < len(SUPPORTED) / 3
