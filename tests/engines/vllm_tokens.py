"""Greedy tokens of a checkpoint in vLLM. Run by the Python of vLLM's own environment: vllm_tokens.py MODEL PROMPTS.json NEW → JSON on the last line."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, prompts, new = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    llm = LLM(model, dtype="float32", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    print(json.dumps([list(entry.outputs[0].token_ids) for entry in outputs]))
