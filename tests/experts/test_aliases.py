"""Families that transformers has under another name, or not at all; `--as`; code files and auto_map."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import expertsmith
from conftest import CALIBRATION, DEVICE, logits, random_model, run_cli, save_tiny
from expertsmith import api
from expertsmith.arch import families
from expertsmith.calibration.stats import layer_path
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine.loading import load_model
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.planning.plan import load_plan

BOOM = 'raise RuntimeError("code of a checkpoint was run")\n'
MOE = {"num_experts": 8, "num_shared_experts": 1, "num_experts_per_tok": 2}


def rewrite(folder: Path, **changes: object) -> Path:
    """Change keys of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def with_code(folder: Path, name: str) -> Path:
    """A checkpoint as it is published with code: auto_map in three files, modules that import one another, and one that nothing names."""
    (folder / f"modeling_{name}.py").write_text(f"from .configuration_{name} import Config\nfrom . import parts_{name}\n{BOOM}")
    for stem in ("configuration", "parts", "tokenization", "processing", "unrelated"):
        (folder / f"{stem}_{name}.py").write_text(BOOM)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [f"tokenization_{name}.Tokenizer", None]}})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoProcessor": f"processing_{name}.Processor"}})
    )
    named = {"AutoConfig": f"configuration_{name}.Config", "AutoModelForCausalLM": f"modeling_{name}.Model"}
    return rewrite(folder, auto_map={**named, "AutoModel": f"someone/else--modeling_{name}.Model", "Odd": "../../etc.passwd"})


def composite(folder: Path, model_type: str) -> Path:
    """The same language model inside a vision-language checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {f"language_model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    tensors["vision_tower.encoder.layers.0.mlp.gate.weight"] = torch.randn(8, 6)
    tensors["multi_modal_projector.linear_1.weight"] = torch.randn(32, 6)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = config.pop("dtype")
    outer = {"model_type": model_type, "architectures": ["Vision"], "dtype": dtype, "text_config": config}
    (folder / "config.json").write_text(json.dumps({**outer, "vision_config": {"model_type": "eyes", "hidden_size": 6}}))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name → (checkpoint, what --as needs); and "plain" ones, which have the same weights under the family's own name."""
    root = tmp_path_factory.mktemp("aliases")
    made: dict[str, tuple[Path, str | None]] = {}
    for plain in ("deepseek_v3", "qwen3_moe"):
        made[plain] = (save_tiny(plain, root / plain), None)
    for name, plain, as_type in (
        ("kimi_k2", "deepseek_v3", None),
        ("kimi_vl", "deepseek_v3", None),
        ("foo_moe", "qwen3_moe", "qwen3_moe"),
        ("foo_vl", "qwen3_moe", "qwen3_moe"),
    ):
        shutil.copytree(root / plain, root / name)
        (composite if name.endswith("_vl") else rewrite_type)(root / name, name)
        made[name] = (with_code(root / name, "foo"), as_type)
    return made


def rewrite_type(folder: Path, model_type: str) -> Path:
    return rewrite(folder, model_type=model_type)


PLAIN = {"kimi_k2": "deepseek_v3", "kimi_vl": "deepseek_v3", "foo_moe": "qwen3_moe", "foo_vl": "qwen3_moe"}
ALIASES = pytest.mark.parametrize("name", list(PLAIN))


@ALIASES
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_statistics_are_those_of_the_family(name, memory, sources, data, tmp_path):
    source, as_type = sources[name]
    made = api.calibrate(source, data, tmp_path / "a", memory=memory, as_type=as_type, **CALIBRATION)
    plain = api.calibrate(sources[PLAIN[name]][0], data, tmp_path / "b", memory=memory, **CALIBRATION)
    assert list(made.layers) == list(plain.layers)
    for layer in made.layers:
        assert filecmp.cmp(layer_path(tmp_path / "a", layer), layer_path(tmp_path / "b", layer), shallow=False)


@ALIASES
def test_the_result_is_what_the_family_gives_and_loads_as_the_source_did(name, sources, data, tmp_path, capsys):
    source, as_type = sources[name]
    more = ["--as", as_type] if as_type else []
    code, out, err = run_cli(
        capsys, "compress", source, *more, "-m", "reap", "-k", "0.5", *(f"--data={entry}" for entry in data), "--no-pack",
        "--seq-len", "24", "--memory", "stream", "-o", tmp_path / "out", "-q",
    )  # fmt: skip
    assert code == 0, err
    assert "verify: passed" in out
    assert "bytes only" not in out
    assert "not run" in out
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.config["model_type"] == name
    assert after.config["auto_map"] == before.config["auto_map"]
    came = {file.name for file in (tmp_path / "out").glob("*.py")}
    assert came == {f"{stem}_foo.py" for stem in ("configuration", "modeling", "parts", "tokenization", "processing")}
    for file in came:
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    for tensor in ("vision_tower.encoder.layers.0.mlp.gate.weight", "multi_modal_projector.linear_1.weight"):
        if name.endswith("_vl"):
            assert torch.equal(before.read(tensor), after.read(tensor))
    # the same plan on the same weights under the family's own name
    plain = sources[PLAIN[name]][0]
    made = api.plan(plain, "reap", 0.5, data=data, work=tmp_path / "w", out=tmp_path / "plan.json", **CALIBRATION)
    api.apply(plain, made, tmp_path / "plain")
    assert made.kept == load_plan(tmp_path / "out" / "expertsmith" / "plan.json").kept
    ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(5))
    loaded = expertsmith.load(tmp_path / "out", as_type=as_type)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits.float(), logits(tmp_path / "plain"))


@ALIASES
def test_merging_healing_skipping_and_evaluation(name, sources, data, tmp_path):
    source, as_type = sources[name]
    here = {"as_type": as_type, "device": DEVICE}
    shape = {"seq_len": 24, "pack": False, "batch_tokens": 72}
    made = api.plan(source, "hc_smoe", 0.5, data=data, out=tmp_path / "plan.json", as_type=as_type, **CALIBRATION)
    api.apply(source, made, tmp_path / "merged", as_type=as_type)
    assert api.verify(source, tmp_path / "merged", **here).passed
    report = api.heal(tmp_path / "merged", source, data, tmp_path / "healed", **here, **shape)
    assert (tmp_path / "healed" / "modeling_foo.py").is_file()
    assert report["accepted"]
    quality = api.evaluate(tmp_path / "healed", data, reference=source, samples=4, seq_len=24, **here)
    assert quality.to_json()["mean"]["kl"] > 0
    api.skip(source, data, tmp_path / "skip", measure=False, **here, **shape)
    expertsmith.load(tmp_path / "skip", as_type=as_type)


def test_an_alias_ends_with_its_call(sources):
    source, as_type = sources["foo_moe"]
    assert api.inspect(source, as_type=as_type)["model_type"] == "foo_moe"
    assert "foo_moe" not in families()
    with pytest.raises(UserError, match="--as MODEL_TYPE"):
        api.inspect(source)
    assert api.inspect(sources["qwen3_moe"][0], as_type="qwen3_moe")["model_type"] == "qwen3_moe"


def test_unknown_families_name_the_way_round(sources, tmp_path):
    source = tmp_path / "x"
    shutil.copytree(sources["foo_moe"][0], source)
    rewrite(source, auto_map=None)
    with pytest.raises(UserError, match=r"there is no supported model family 'foo_moe'.*--as MODEL_TYPE"):
        api.inspect(source)


@pytest.mark.parametrize(
    ("as_type", "words"),
    [
        ("mixtral", r"cannot be treated as mixtral: MixtralForCausalLM has no parameter for model.layers.0"),
        ("qwen2_moe", r"cannot be treated as qwen2_moe: .*_norm"),
        ("deepseek_v3", "cannot be treated as deepseek_v3"),
        ("qwen3_mo", "did you mean qwen3_moe"),
        ("jetmoe", "there is no supported model family 'jetmoe'"),
        ("bailing_moe", "cannot be run: transformers has no class for it"),
    ],
)
def test_a_wrong_family_is_refused(as_type, words, sources, tmp_path, capsys):
    source = sources["foo_moe"][0]
    for command in (
        ["inspect", source],
        ["lint", source],
        ["plan", source, "-m", "aimer", "-k", "0.5", "-o", tmp_path / "plan.json"],
        ["compress", source, "-m", "aimer", "-k", "0.5", "-o", tmp_path / "out"],
    ):
        code, _, err = run_cli(capsys, *command, "--as", as_type)
        assert code == 2
        with pytest.raises(UserError, match=words):
            raise UserError(err)
    assert list(tmp_path.iterdir()) == []


def change(source: Path, folder: Path, edit) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t.update({"model.layers.1.extra.weight": torch.zeros(2)}),
            "has no parameter for model.layers.1.extra.weight",
        ),
        (lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"), "lacks model.layers.1.self_attn.q_norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            r"model.norm.weight has a wrong shape: the file has shape \[31\], the model \[32\]",
        ),
    ],
)
def test_every_tensor_has_to_fit(edit, words, sources, tmp_path):
    source = change(sources["foo_moe"][0], tmp_path / "x", edit)
    with pytest.raises(UserError, match=f"cannot be treated as qwen3_moe: .*{words}"):
        api.plan(source, "aimer", 0.5, as_type="qwen3_moe")


def test_a_buffer_has_to_be_there_too(sources, tmp_path):
    source = change(
        sources["deepseek_v3"][0], tmp_path / "x", lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    )
    rewrite(source, model_type="other")
    with pytest.raises(UserError, match=r"lacks model.layers.1.mlp.gate.e_score_correction_bias"):
        api.inspect(source, as_type="deepseek_v3")


def test_wrong_uses_are_refused(sources, tmp_path, capsys, data):
    source, as_type = sources["foo_moe"]
    with pytest.raises(UserError, match="already open"):
        api.plan(take_inventory(open_checkpoint(sources["qwen3_moe"][0])), "aimer", 0.5, as_type="mixtral")
    untyped = tmp_path / "untyped"
    shutil.copytree(source, untyped)
    rewrite(untyped, model_type=None)
    with pytest.raises(UserError, match="has no model_type, which could be treated as qwen3_moe"):
        api.inspect(untyped, as_type=as_type)
    code, _, err = run_cli(capsys, "evaluate", source, "--as", as_type, "--speed", "--data", data[0])
    assert code == 2
    assert "--speed" in err
    chosen = {
        str(layer): list(range(4 + layer % 2)) for layer in take_inventory(open_checkpoint(sources["qwen3_moe"][0])).layers
    }
    (tmp_path / "kept.json").write_text(json.dumps(chosen))
    with pytest.raises(UserError, match="cannot have different numbers of experts: its config class is code of its own"):
        api.plan_from(source, tmp_path / "kept.json", as_type=as_type)


# families that transformers has no class for


@pytest.fixture(scope="module")
def ling(tmp_path_factory) -> Path:
    """Ling as it is published: one tensor for queries, keys and values, softmax router, shared experts."""
    folder = tmp_path_factory.mktemp("ling")
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.word_embeddings.weight": (128, 32), "model.norm.weight": (32,), "lm_head.weight": (128, 32)}
    for layer in range(2):
        head = f"model.layers.{layer}"
        shapes |= {f"{head}.attention.query_key_value.weight": (64, 32), f"{head}.attention.dense.weight": (32, 32)}
        shapes |= {f"{head}.input_layernorm.weight": (32,), f"{head}.mlp.gate.weight": (8, 32)}
        for owner in ("shared_experts", *(f"experts.{expert}" for expert in range(8))):
            for leaf, shape in (("gate_proj", (24, 32)), ("up_proj", (24, 32)), ("down_proj", (32, 24))):
                shapes[f"{head}.mlp.{owner}.{leaf}.weight"] = shape
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **MOE,
        "model_type": "bailing_moe",
        "architectures": ["BailingMoeForCausalLM"],
        "hidden_size": 32,
        "vocab_size": 128,
    }
    config |= {"num_hidden_layers": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return with_code(folder, "ling")


@pytest.mark.parametrize("method", ["aimer", "moeits", "random"])
def test_without_a_class_bytes_are_proved_and_nothing_more_is_claimed(method, ling, tmp_path, capsys):
    code, out, err = run_cli(capsys, "compress", ling, "-m", method, "-k", "0.5", "-o", tmp_path / "out", "-q")
    assert code == 0, err
    assert "verify: passed, bytes only" in out
    assert "outputs were not compared: transformers has no class for it" in out
    after = open_checkpoint(tmp_path / "out")
    assert after.config["num_experts"] == 4
    assert (tmp_path / "out" / "modeling_ling.py").read_text() == (ling / "modeling_ling.py").read_text()
    code, out, err = run_cli(capsys, "verify", ling, tmp_path / "out", "--json", "-q")
    held = json.loads(out)
    assert code == 0, err
    assert held["passed"]
    assert held["not_compared"]
    assert held == json.loads((tmp_path / "out" / "expertsmith" / "verify.json").read_text())
    for key in ("largest_relative_difference", "logits_difference", "top1_agreement"):
        assert held[key] is None
    assert held["layers"] == []
    assert held["tokens"] == 0
    (tmp_path / "out" / "configuration_ling.py").write_text("changed\n")
    assert api.verify(ling, tmp_path / "out").config_differs == ["configuration_ling.py"]


def test_without_a_class_a_wrong_byte_is_found(ling, tmp_path):
    api.compress(ling, "aimer", 0.5, out=tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    verdict = api.verify(ling, tmp_path / "out")
    assert not verdict.passed
    assert len(verdict.wrong_tensors) == 1


def test_without_a_class_nothing_runs(ling, data, tmp_path, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("text was read for a model that cannot run")

    monkeypatch.setattr("expertsmith.calibration.data.load_tokens", never)
    out = tmp_path / "out"
    small = {"seq_len": 24}
    for call in (
        lambda: api.calibrate(ling, data, out, **small),
        lambda: api.plan(ling, "reap", 0.5, data=data, out=out, **small),
        lambda: api.plan(ling, "expert_sparsity", 0.5, data=data, out=out, **small),
        lambda: api.evaluate(ling, data),
        lambda: api.heal(ling, ling, data, out, **small),
        lambda: api.skip(ling, data, out, **small),
        lambda: api.analyze(ling, out, data=data, **small),
        lambda: api.compare(ling, ["aimer"], [0.5], data, data, out),
        lambda: api.compress(ling, "reap", 0.5, out=out, data=data),
        lambda: api.compress(ling, "aimer", 0.5, out=out, eval_data=data),
        lambda: api.compress(ling, "aimer", 0.5, out=out, data=data, heal="least_squares"),
        lambda: expertsmith.load(ling),
        lambda: load_model(open_checkpoint(ling), families()["bailing_moe"]),
    ):
        with pytest.raises(UserError, match="a bailing_moe model cannot be run: transformers has no class for it"):
            call()
        assert not (out / "config.json").exists()


def test_ling_2_has_groups_and_a_selection_bias(ling, tmp_path):
    for model_type in ("bailing_moe", "bailing_moe_v2"):
        folder = tmp_path / model_type
        shutil.copytree(ling, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {f"model.layers.{layer}.mlp.gate.expert_bias": torch.arange(8.0) for layer in range(2)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        rewrite(folder, model_type=model_type, n_group=2, topk_group=1)
        result = api.compress(folder, "aimer", 0.5, out=tmp_path / f"{model_type}.out")
        assert result["verify"].passed
        after = open_checkpoint(tmp_path / f"{model_type}.out")
        for layer, keep in result["plan"].kept.items():
            assert [sum(e // 4 == group for e in keep) for group in (0, 1)] == [2, 2]
            assert after.read(f"model.layers.{layer}.mlp.gate.expert_bias").tolist() == [float(e) for e in keep]


# auto_map where transformers has the family


def test_auto_map_goes_where_transformers_has_the_family(sources, tmp_path):
    source = tmp_path / "x"
    shutil.copytree(sources["qwen3_moe"][0], source)
    with_code(source, "foo")
    made = api.plan(source, "aimer", 0.5)
    notes = api.apply(source, made, tmp_path / "out")
    assert any("transformers has qwen3_moe built in" in note for note in notes)
    assert "auto_map" not in open_checkpoint(tmp_path / "out").config
    came = sorted(file.name for file in (tmp_path / "out").glob("*.py"))
    assert came == ["processing_foo.py", "tokenization_foo.py"]  # the tokenizer and the processor are still theirs
    assert any(all(name in note for name in came) for note in notes)
    assert api.verify(source, tmp_path / "out", device=DEVICE).passed
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_auto_map_goes_from_the_text_config_too(tmp_path):
    text = save_tiny("qwen3_5_moe_text", tmp_path / "text")
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: value
        for name, value in load_file(text / "model.safetensors").items()
    }
    config = json.loads((text / "config.json").read_text()) | {"auto_map": {"AutoConfig": "configuration_foo.Config"}}
    source = tmp_path / "x"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    whole = {"model_type": "qwen3_5_moe", "text_config": config, "auto_map": {"AutoConfig": "configuration_foo.Config"}}
    (source / "config.json").write_text(json.dumps(whole))
    (source / "configuration_foo.py").write_text(BOOM)
    api.apply(source, api.plan(source, "aimer", 0.5), tmp_path / "out")
    after = open_checkpoint(tmp_path / "out").config
    assert "auto_map" not in after
    assert "auto_map" not in after["text_config"]
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "foo_moe"])
def test_dequantise_treats_code_as_apply_does(model_type, tmp_path):
    source = tmp_path / "x"
    model = random_model("qwen3_moe")
    model.save_pretrained(source)
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        tensors[name] = value
        if "experts" in name:
            tensors[name] = value.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(-(-value.shape[0] // 128), -(-value.shape[1] // 128))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with_code(rewrite(source, model_type=model_type, quantization_config=fp8), "foo")
    report = api.dequantise(source, tmp_path / "out")
    after = open_checkpoint(tmp_path / "out").config
    came = {file.name for file in (tmp_path / "out").glob("*.py")}
    assert came >= {"processing_foo.py", "tokenization_foo.py"}
    assert report["notes"]
    assert ("auto_map" in after) == (model_type == "foo_moe") == ("modeling_foo.py" in came)


def test_a_recipe_treats_a_model_as_another(sources, data, tmp_path):
    from expertsmith.verbs.recipe import load_recipe, run_recipe

    source, as_type = sources["foo_moe"]
    steps = {
        "model": str(source),
        "as": as_type,
        "device": DEVICE,
        "calibrate": {"data": data, "out": str(tmp_path / "stats"), "seq_len": 24, "pack": False},
        "plan": {"method": "reap", "keep": 4, "out": str(tmp_path / "plan.json")},
        "apply": {"out": str(tmp_path / "out")},
        "verify": {},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(steps))
    assert run_recipe(load_recipe(tmp_path / "r.yaml"))["verify"].passed
    (tmp_path / "r.yaml").write_text(json.dumps({**steps, "revision": "main"}))
    with pytest.raises(UserError, match="not a hub model"):
        run_recipe(load_recipe(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_text(json.dumps({**steps, "convert": {"method": "cmoe", "out": str(tmp_path / "c")}}))
    with pytest.raises(UserError, match="as: has no effect with convert"):
        load_recipe(tmp_path / "r.yaml")
