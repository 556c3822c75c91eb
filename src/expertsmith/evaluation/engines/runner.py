"""Run one model in one engine, driven by JSON lines. The Python of the engine's own environment runs this file, without expertsmith:

    python runner.py ENGINE MODEL '{"dtype": "float32", "device": "auto", "batch": 1, "length": 256}'

It answers {"ready": true}, {"missing": MODULE} or {"refused": WORDS}. Then it answers every request
{"prompts": [[id, …], …], "new": N, "top": K} with

    tokens   the N greedy tokens of every prompt; no token ends the generation
    top      if K > 0: for each of these tokens, the natural log-probabilities of the K best tokens, {id: value}
    first    seconds until every prompt had its first token
    after    tokens generated after that
    seconds  until all were generated
    peak     bytes: the highest resident memory of this process so far, and of the GPU if torch allocated it

The engine's own output goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Ids = list[list[int]]
Answer = dict[str, Any]
Stamps = list[list[float]]  # for every prompt, the time of each of its tokens


def transformers(model: str, options: dict[str, Any]) -> Callable[[Ids, int, int], Answer]:
    """Run a transformers model. `load` names the function that loads it, by default transformers' own."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    module, _, name = options.get("load", "transformers.AutoModelForCausalLM.from_pretrained").partition(".")
    load: Any = importlib.import_module(module)
    for part in name.split("."):
        load = getattr(load, part)
    device = options["device"] if options["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load(model, dtype=options["dtype"]).to(device).eval()

    class Clock(StoppingCriteria):  # type: ignore[misc]
        """Record the time of every token; never stop the generation."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            if ids.is_cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def generate(prompts: Ids, new: int, top: int) -> Answer:
        clock = Clock()
        begin = time.perf_counter()
        out = loaded.generate(
            torch.tensor(prompts, device=device),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long, device=device),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[],
            stopping_criteria=StoppingCriteriaList([clock]),
            output_scores=bool(top),
            return_dict_in_generate=True,
        )
        best = []
        for i in range(len(prompts) if top else 0):
            rows = [torch.log_softmax(step[i].float(), -1).topk(top) for step in out.scores]
            best.append([dict(zip(row.indices.tolist(), row.values.tolist(), strict=True)) for row in rows])
        tokens = out.sequences[:, len(prompts[0]) :].tolist()
        return answer(tokens, best, begin, [clock.times] * len(prompts))

    return generate


def vllm(model: str, options: dict[str, Any]) -> Callable[[Ids, int, int], Answer]:
    """Run vLLM in this process; `vllm` are further arguments of its class LLM."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if "OMP_NUM_THREADS" in os.environ:  # else vLLM ignores it and takes one thread per core
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    import torch
    from vllm import LLM, SamplingParams

    batch, length = options["batch"], options["length"]
    settings = {
        "dtype": options["dtype"],
        "max_model_len": length,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(2048, batch * length),  # all prompts in one step
        "enable_prefix_caching": False,  # or a repeated prompt would not be computed again
        "enforce_eager": not torch.cuda.is_available(),  # graphs are for GPUs; compiling for a CPU takes minutes
        "skip_tokenizer_init": True,
        **options.get("vllm", {}),
    }
    engine = LLM(model, **settings).llm_engine

    def generate(prompts: Ids, new: int, top: int) -> Answer:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=top or None)
        made: list[Any] = [None] * len(prompts)
        stamps: Stamps = [[] for _ in prompts]
        begin = time.perf_counter()
        for i, ids in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                i = int(output.request_id)
                made[i] = output.outputs[0]
                stamps[i] += [time.perf_counter()] * (len(made[i].token_ids) - len(stamps[i]))
        best = [[{key: value.logprob for key, value in row.items()} for row in entry.logprobs or ()] for entry in made]
        return answer([list(entry.token_ids) for entry in made], best, begin, stamps)

    return generate


def llama_cpp(model: str, options: dict[str, Any]) -> Callable[[Ids, int, int], Answer]:
    """Run llama.cpp as xllamacpp's server without its sockets, with one thread per prompt."""
    import xllamacpp

    batch, length = options["batch"], options["length"]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = batch
    params.n_ctx = batch * -(-length // 256) * 256
    params.n_batch = max(2048, batch * length)  # all prompts in one step
    params.warmup = False
    params.cache_ram_mib = 0
    if "OMP_NUM_THREADS" in os.environ:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    if (
        options["dtype"] == "float32"
    ):  # else keys and values are rounded to half precision, and with flash attention queries too
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def generate(prompts: Ids, new: int, top: int) -> Answer:
        request = {"n_predict": new, "n_probs": top, "temperature": 0.0, "top_k": 1, "ignore_eos": True, "cache_prompt": False, "return_tokens": True, "verbose": True}  # fmt: skip
        begin = time.perf_counter()

        def run(prompt: list[int]) -> tuple[dict[str, Any], float]:
            return server.handle_completions({**request, "prompt": prompt}), time.perf_counter()

        with ThreadPoolExecutor(len(prompts)) as threads:
            made = list(threads.map(run, prompts))
        stamps: Stamps = []
        for entry, end in made:  # the server reports the time from the first token to the last
            count, taken = entry["timings"]["predicted_n"], entry["timings"]["predicted_ms"] / 1000
            stamps.append([end - taken + taken * n / max(1, count - 1) for n in range(count)])
        best = []
        for entry, _ in made if top else ():
            rows = [row["top_logprobs"] for row in entry["choices"][0]["logprobs"]["content"]]
            best.append([{token["id"]: token["logprob"] for token in row} for row in rows])
        return answer([entry["__verbose"]["tokens"] for entry, _ in made], best, begin, stamps)

    return generate


def answer(tokens: Ids, best: list[Any], begin: float, stamps: Stamps) -> Answer:
    """The answer to one request."""
    first = max(times[0] for times in stamps)
    return {
        "tokens": tokens,
        "top": best,
        "first": first - begin,
        "after": sum(stamp > first for times in stamps for stamp in times),
        "seconds": max(times[-1] for times in stamps) - begin,
        "peak": peak(),
    }


def peak() -> dict[str, int]:
    """Peak bytes so far: resident memory of this process, and GPU memory allocated by torch."""
    try:
        with open("/proc/self/status") as status:  # ru_maxrss starts at the parent's memory
            found = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except FileNotFoundError:
        import resource

        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")
    gpu = torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0
    return {"memory": found, "gpu_memory": gpu}


ENGINES = {"transformers": transformers, "vllm": vllm, "llama.cpp": llama_cpp}


def main() -> None:
    """Load the model, then answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent ends this one
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: Answer) -> None:
        print(json.dumps(value), file=replies, flush=True)

    name, model, options = sys.argv[1:]
    try:
        generate = ENGINES[name](model, json.loads(options))
    except ModuleNotFoundError as error:
        reply({"missing": error.name} if error.name in ("vllm", "xllamacpp") else {"refused": str(error)})
        return
    except Exception as error:  # any error of the engine is a refusal
        reply({"refused": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply(generate(request["prompts"], request["new"], request["top"]))
        except Exception as error:
            reply({"refused": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
