"""Greedy tokens of a GGUF file in llama.cpp. Run by the Python of its own environment: llama_tokens.py FILE.gguf PROMPTS.json NEW → JSON on the last line."""

import json
import sys
from pathlib import Path

import xllamacpp as xlc


def greedy(file, prompts, new):
    params = xlc.CommonParams()
    params.model.path = file
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = (
        xlc.ggml_type.GGML_TYPE_F32
    )  # else keys and values are rounded to half precision
    server = xlc.Server(params)
    made = []
    for ids in prompts:
        answer = server.handle_completions({"prompt": ids, "n_predict": new, "temperature": 0.0, "top_k": 1, "ignore_eos": True, "return_tokens": True, "verbose": True, "cache_prompt": False})  # fmt: skip
        made.append(answer["__verbose"]["tokens"])
    return made


if __name__ == "__main__":
    print(json.dumps(greedy(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3]))))
