"""Every rule of `expertsmith lint` fires on one subject and is silent on another; findings of tiny checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import save_tiny
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.lint import ENGINES, RULES, Subject, check, lint, llama_cpp, sglang, subject_of, transformers, vllm
from expertsmith.lint.base import LEVELS

PLAIN = Subject(  # Qwen1.5-MoE-A2.7B, kept at 32 of 60 experts
    model_type="qwen2_moe",
    num_experts=32,
    top_k=4,
    architectures=("Qwen2MoeForCausalLM",),
    config={"hidden_size": 2048, "num_attention_heads": 16, "num_experts": 32},
    counts={0: 32, 1: 32},
)
V3 = Subject(  # DeepSeek-V3
    model_type="deepseek_v3",
    num_experts=256,
    top_k=8,
    groups=8,
    top_groups=4,
    group_minimum=2,
    group_key="n_group",
    group_default=(8, 4),
    score="sigmoid",
    architectures=("DeepseekV3ForCausalLM",),
    config={
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "kv_lora_rank": 512,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    counts={3: 256},
)
V2 = replace(V3, model_type="deepseek_v2", num_experts=160, top_k=6, top_groups=3, group_minimum=1, score="softmax")
V2 = replace(
    V2,
    group_default=(1, 1),
    config={**V3.config, "n_routed_experts": 160, "topk_group": 3, "topk_method": "group_limited_greedy"},
)
V4 = replace(PLAIN, model_type="deepseek_v4", num_experts=128, top_k=6, score="sigmoid", config={"n_routed_experts": 128})
M2 = replace(PLAIN, model_type="minimax_m2", num_experts=256, top_k=8)
M2 = replace(M2, config={"hidden_size": 3072, "head_dim": 128, "scoring_func": "sigmoid", "use_routing_bias": True})
KIMI = replace(V3, model_type="kimi_linear", group_key="num_expert_group", group_default=(1, 1))
KIMI = replace(KIMI, config={"num_expert_group": 8, "topk_group": 4})
PHI = replace(PLAIN, model_type="phimoe", top_k=2)


def put(subject: Subject, *drop: str, **values: Any) -> Subject:
    """The subject with config keys set, or dropped."""
    return replace(subject, config={**{k: v for k, v in subject.config.items() if k not in drop}, **values})


UNEVEN = replace(PLAIN, declared={0: 32, 1: 20}, counts={0: 32, 1: 20})
ALIVE = replace(PLAIN, extras={"alive": {"0": 32, "1": 20}})
SKIP = replace(PLAIN, extras={"skip": {"rule": "tail", "thresholds": {"0": 0.2, "1": 0.1}}})
EVEN = replace(PLAIN, declared={0: 32, 1: 32}, extras={"alive": {"0": 32, "1": 32}})  # per_layer_config that changes nothing
GREEDY = replace(put(V2, topk_method="greedy"), groups=1, top_groups=1)

CONSTANT = replace(PLAIN, config={"expertsmith_novices": {"0": {"kept": [0, 2], "novices": [1, 3], "width": 8}}})
NARROW = replace(PLAIN, config={"expertsmith_neurons": {"0": 8, "1": 16}})
RAGGED = replace(PLAIN, config={"expertsmith_neurons": {"0": [8, 16], "1": 16}})
PRUNED = replace(PLAIN, config={"expertsmith_attention": {"query_key": [[0, 4]], "value_width": [None]}})


def quantised(subject: Subject = PLAIN, *, mixed: str = "", width: int = 1408, **config: Any) -> Subject:
    """The subject with a quantisation config (`method` is its quant_method)."""
    config["quant_method"] = config.pop("method")
    return replace(subject, quantisation=config, mixed=mixed, width=width)


def of_compressed_tensors(format: str, strategy: str = "channel", groups: int = 1, **more: Any) -> Subject:
    config = {f"group_{i}": {"targets": ["Linear"], "weights": {"strategy": strategy}} for i in range(groups)}
    return quantised(method="compressed-tensors", format=format, config_groups=config, **more)


FP8 = quantised(method="fp8", weight_block_size=[128, 128])  # 1408 neurons are eleven blocks
ODD = "experts.5.down_proj is stored differently from experts.0.down_proj"
GPTQ = quantised(method="gptq", bits=4, group_size=128, sym=True)

# rule → (fires, silent)
CASES: dict[str, tuple[Subject, Subject]] = {
    "transformers-quant-method": (quantised(method="modelopt", quant_algo="FP8"), FP8),
    "transformers-nvfp4": (of_compressed_tensors("nvfp4-pack-quantized"), of_compressed_tensors("pack-quantized", "group")),
    "transformers-mixed": (replace(FP8, mixed=ODD), FP8),
    "vllm-quant-method": (quantised(method="bitsandbytes"), quantised(method="auto-round")),
    "vllm-mixed": (replace(GPTQ, mixed=ODD), GPTQ),
    "vllm-fp8-blocks": (replace(FP8, tensor_parallel=88), replace(FP8, tensor_parallel=4)),
    "vllm-fp8-refined": (replace(FP8, tensor_parallel=4), replace(FP8, tensor_parallel=4, expert_parallel=4)),
    "vllm-marlin": (replace(GPTQ, tensor_parallel=2), GPTQ),
    "sglang-quant-method": (quantised(method="hqq"), quantised(method="bitsandbytes")),
    "sglang-gptq": (quantised(method="gptq", bits=4, sym=False), GPTQ),
    "sglang-mixed": (replace(FP8, mixed=ODD), FP8),
    "sglang-fp8-blocks": (replace(FP8, tensor_parallel=2), replace(FP8, tensor_parallel=11)),
    "vllm-mtp": (replace(V3, mtp=True), V3),
    "vllm-no-mtp": (put(V3, num_nextn_predict_layers=0), put(V3, num_nextn_predict_layers=1)),
    "sglang-mtp": (replace(PLAIN, mtp=True), PLAIN),
    "sglang-no-mtp": (put(V3, num_nextn_predict_layers=0), V3),
    "llama.cpp-mtp": (replace(V3, mtp=True), V3),
    "llama.cpp-quant-method": (quantised(method="awq"), GPTQ),
    "llama.cpp-quant-format": (of_compressed_tensors("float-quantized", "tensor"), of_compressed_tensors("float-quantized")),
    "llama.cpp-mixed": (of_compressed_tensors("nvfp4-pack-quantized", "tensor_group", mixed=ODD), replace(FP8, mixed=ODD)),
    "transformers-count": (replace(PLAIN, counts={0: 32, 1: 60}), PLAIN),
    "transformers-uneven": (UNEVEN, EVEN),
    "transformers-attention": (PRUNED, PLAIN),
    "transformers-constants": (CONSTANT, PLAIN),
    "transformers-neurons": (NARROW, RAGGED),
    "transformers-ragged": (RAGGED, NARROW),
    "transformers-skip": (SKIP, ALIVE),
    "transformers-top-k": (replace(PLAIN, top_k=33), replace(PLAIN, top_k=32)),
    "transformers-groups": (replace(V3, num_experts=100), replace(V3, num_experts=104)),
    "transformers-top-groups": (replace(V3, top_groups=9), replace(V3, top_groups=8)),
    "transformers-group-score": (replace(V3, num_experts=8), replace(V2, num_experts=8)),
    "transformers-reach": (replace(V3, num_experts=8, top_k=5), replace(V3, num_experts=16)),
    "transformers-group-default": (put(V3, "n_group"), V3),
    "transformers-sparsemixer": (replace(PHI, top_k=1), PHI),
    "transformers-expert-parallel": (replace(PLAIN, expert_parallel=5), replace(PLAIN, expert_parallel=4)),
    "vllm-nameless": (replace(PLAIN, architectures=()), PLAIN),
    "vllm-registry": (replace(PLAIN, architectures=("Dots1ForCausalLM",)), PLAIN),
    "vllm-uneven": (UNEVEN, EVEN),
    "vllm-attention": (PRUNED, PLAIN),
    "vllm-constants": (CONSTANT, PLAIN),
    "vllm-width": (replace(PLAIN, width=1400, tensor_parallel=16), replace(PLAIN, width=1408, tensor_parallel=16)),
    "vllm-neurons": (NARROW, PLAIN),
    "vllm-padded": (ALIVE, EVEN),
    "vllm-skip": (SKIP, ALIVE),
    "vllm-top-k": (replace(V3, num_experts=8, top_k=5), replace(V3, num_experts=16)),
    "vllm-top-groups": (replace(V3, top_groups=9), V3),
    "vllm-groups": (replace(V3, num_experts=8), replace(V3, num_experts=16)),
    "vllm-router-keys": (put(V3, "topk_method"), V3),
    "vllm-minimax-keys": (put(M2, "use_routing_bias"), M2),
    "vllm-v2-none": (put(V2, "n_group"), V2),
    "vllm-v2-greedy": (GREEDY, V2),
    "vllm-grouped-kernel": (replace(V3, top_k=33), V3),
    "vllm-grouped-small": (replace(V3, num_experts=384), V3),
    "vllm-topk-kernel": (replace(PLAIN, num_experts=45), replace(PLAIN, num_experts=192)),
    "vllm-v4-topk": (replace(V4, num_experts=230), V4),
    "vllm-v4-topk-cpu": (replace(V4, num_experts=192), V4),
    "vllm-fp32-router": (replace(M2, num_experts=128), M2),
    "vllm-align": (replace(PLAIN, num_experts=993), replace(PLAIN, num_experts=992)),
    "vllm-tensor-parallel": (replace(PLAIN, tensor_parallel=64), replace(PLAIN, tensor_parallel=32)),
    "vllm-expert-parallel": (replace(PLAIN, expert_parallel=5), replace(PLAIN, expert_parallel=8)),
    "vllm-keys": (put(PLAIN, num_experts=60), put(PLAIN, num_local_experts=60)),
    "vllm-sparsemixer": (replace(PHI, top_k=4), PHI),
    "vllm-cpu-sigmoid": (put(M2, scoring_func="sigmoid"), put(M2, scoring_func="softmax")),
    "vllm-cpu-bias": (replace(PLAIN, model_type="ernie4_5_moe"), PLAIN),
    "vllm-latent": (put(V3, kv_lora_rank=32, qk_rope_head_dim=32), put(V3, qk_rope_head_dim=64)),
    "vllm-cpu-latent": (V2, PLAIN),
    "vllm-cpu-heads": (put(PLAIN, head_dim=72), PLAIN),
    "sglang-nameless": (replace(PLAIN, architectures=()), PLAIN),
    "sglang-registry": (
        replace(PLAIN, architectures=("SolarOpenForCausalLM",)),
        replace(PLAIN, architectures=("JambaForCausalLM",)),
    ),
    "sglang-no-backend": (
        replace(PLAIN, architectures=("JambaForCausalLM",)),
        replace(PLAIN, architectures=("SolarOpenForCausalLM",)),
    ),
    "sglang-uneven": (UNEVEN, EVEN),
    "sglang-attention": (PRUNED, PLAIN),
    "sglang-constants": (CONSTANT, PLAIN),
    "sglang-width": (
        replace(PLAIN, width=100, tensor_parallel=8),
        replace(PLAIN, width=100, tensor_parallel=8, expert_parallel=8),
    ),
    "sglang-neurons": (RAGGED, PLAIN),
    "sglang-padded": (ALIVE, EVEN),
    "sglang-skip": (SKIP, ALIVE),
    "sglang-top-k": (replace(PLAIN, top_k=33), PLAIN),
    "sglang-groups": (replace(V3, num_experts=100), V3),
    "sglang-top-groups": (replace(V3, top_groups=0), V3),
    "sglang-router-keys": (put(V2, "scoring_func"), put(V2, "topk_method")),
    "sglang-minimax-keys": (put(M2, "scoring_func"), M2),
    "sglang-expert-parallel": (replace(PLAIN, expert_parallel=5), replace(PLAIN, expert_parallel=8)),
    "sglang-tensor-parallel": (replace(V3, num_experts=16, tensor_parallel=32), replace(V3, tensor_parallel=32)),
    "sglang-topk-kernel": (replace(PLAIN, num_experts=192), PLAIN),
    "sglang-grouped-kernel": (replace(V3, num_experts=192), replace(V3, num_experts=128)),
    "sglang-shared-fusion": (replace(V3, num_experts=128), V3),
    "llama.cpp-nameless": (replace(PLAIN, architectures=()), PLAIN),
    "llama.cpp-registry": (
        replace(PLAIN, architectures=("PhimoeForCausalLM",)),
        replace(PLAIN, architectures=("PhiMoEForCausalLM",)),
    ),
    "llama.cpp-dense-layers": (
        put(PLAIN, num_hidden_layers=4, mlp_only_layers=[2]),
        put(PLAIN, num_hidden_layers=4, mlp_only_layers=[], decoder_sparse_step=1),
    ),
    "llama.cpp-olmoe-keys": (
        put(replace(PLAIN, model_type="olmoe"), num_key_value_heads=4),
        put(replace(PLAIN, model_type="olmoe"), num_key_value_heads=16),
    ),
    "llama.cpp-max-experts": (replace(PLAIN, num_experts=1025), replace(PLAIN, num_experts=1024)),
    "llama.cpp-uneven": (UNEVEN, EVEN),
    "llama.cpp-attention": (PRUNED, PLAIN),
    "llama.cpp-constants": (CONSTANT, PLAIN),
    "llama.cpp-k-quants": (replace(PLAIN, width=1088), replace(PLAIN, width=1024)),
    "llama.cpp-neurons": (NARROW, PLAIN),
    "llama.cpp-padded": (ALIVE, EVEN),
    "llama.cpp-skip": (SKIP, ALIVE),
    "llama.cpp-top-k": (replace(PLAIN, top_k=33), PLAIN),
    "llama.cpp-group-count": (replace(V3, num_experts=8), replace(V3, num_experts=16)),
    "llama.cpp-groups": (replace(V3, num_experts=100), put(replace(V3, num_experts=100), n_group=1)),
    "llama.cpp-top-groups": (put(V3, topk_group=8), put(V3, n_group=1, topk_group=1)),
    "llama.cpp-group-score": (V2, V3),
    "llama.cpp-group-key": (KIMI, replace(KIMI, groups=1)),
    "llama.cpp-scores": (put(V3, "scoring_func"), put(V3, "topk_method")),
    "llama.cpp-keys": (put(PLAIN, num_local_experts=60), PLAIN),
    "llama.cpp-topk-kernel": (replace(PLAIN, num_experts=45), replace(PLAIN, num_experts=288)),
    "llama.cpp-eight": (replace(PLAIN, num_experts=8), PLAIN),
}


def fired(subject: Subject, engine: str | None = None) -> list[str]:
    return [finding.rule.id for finding in check(subject, engine)]


@pytest.mark.parametrize("rule", [rule.id for rule in RULES])
def test_rule_fires_and_is_silent(rule: str) -> None:
    fires, silent = CASES[rule]
    assert rule in fired(fires)
    assert rule not in fired(silent)


def test_every_rule_says_where_it_was_read() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES) == len(CASES)
    for rule in RULES:
        assert rule.engine in ENGINES
        assert rule.source.startswith(ENGINES[rule.engine] + ", ")
        assert re.search(r"\w\.(py|cu|cuh|cpp|h)\b|EntryClass", rule.source)
        assert rule.says.endswith(".")


def test_a_sound_subject_has_nothing_but_information() -> None:
    assert fired(PLAIN) == []
    assert fired(V3) == []


def test_errors_come_first() -> None:
    subject = replace(V3, num_experts=100, tensor_parallel=128, expert_parallel=3, architectures=("Dots1ForCausalLM",))
    levels = [LEVELS.index(finding.level) for finding in check(subject)]
    assert levels == sorted(levels)
    assert set(levels) == {0, 1, 2}
    assert all(finding.rule.engine == "sglang" for finding in check(subject, "sglang"))


def test_flattened_groups_are_no_groups() -> None:
    flat = replace(V3, num_experts=100, groups=1, top_groups=1, counts={3: 100})
    flat = put(flat, n_group=1, topk_group=1, n_routed_experts=100)
    assert [finding.rule.id for finding in check(flat) if finding.level == "error"] == []


def test_uneven_layers_are_an_error_for_all_but_transformers() -> None:
    found = {finding.rule.id: finding for finding in check(UNEVEN)}
    assert found.keys() == {f"{engine}-uneven" for engine in ENGINES}
    assert {engine: found[f"{engine}-uneven"].level for engine in ENGINES} == {
        "transformers": "warning", "vllm": "error", "sglang": "error", "llama.cpp": "error",
    }  # fmt: skip
    assert all(finding.message == "decoder layers have 20 to 32 experts" for finding in found.values())
    assert "--uniform" in found["vllm-uneven"].remedy


def test_the_layer_with_the_fewest_experts_decides() -> None:
    few = replace(UNEVEN, declared={0: 32, 1: 3}, counts={0: 32, 1: 3})
    messages = {finding.rule.id: finding.message for finding in check(few)}
    assert messages["transformers-top-k"] == "each token uses 4 experts, but there are 3 in decoder layer 1"
    groups = replace(V3, declared={3: 256, 4: 8}, counts={3: 256, 4: 8})
    assert {"transformers-group-score", "vllm-uneven"} <= set(fired(groups))
    wrong = replace(UNEVEN, counts={0: 32, 1: 21})
    assert "config.json says 20 experts, but decoder layer 1 has tensors of 21" in [f.message for f in check(wrong)]


def test_dead_experts_are_counted() -> None:
    (message,) = {finding.message for finding in check(ALIVE)}
    assert message == "12 dead experts in 1 decoder layers are kept unselected by a bias of -inf (or -1e30)"


def test_findings_as_json() -> None:
    (finding,) = check(replace(PHI, top_k=1), "vllm")
    assert finding.to_json() == {
        "rule": "vllm-sparsemixer",
        "engine": "vllm",
        "level": "error",
        "message": "each token uses 1 experts, but sparsemixer always selects 2",
        "remedy": "set num_experts_per_tok to 2",
        "says": finding.rule.says,
        "source": finding.rule.source,
    }


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(UserError, match=r"there is no engine 'vlm'; did you mean vllm"):
        lint(None, "vlm")  # type: ignore[arg-type]


def test_a_checkpoint_of_transformers_lacks_the_router_keys(tmp_path: Path) -> None:
    inventory = take_inventory(open_checkpoint(save_tiny("deepseek_v3", tmp_path), headers_only=True))
    subject = subject_of(inventory, tensor_parallel=16)
    assert (subject.num_experts, subject.groups, subject.top_groups, subject.hidden_size) == (8, 2, 1, 32)
    assert (subject.counts, subject.group_default) == ({1: 8, 2: 8}, (8, 4))
    assert subject.architectures == ("DeepseekV3ForCausalLM",)
    errors = {finding.rule.id for finding in lint(inventory, tensor_parallel=16) if finding.level == "error"}
    assert errors == {
        "vllm-router-keys",
        "vllm-latent",
        "vllm-width",
        "sglang-router-keys",
        "sglang-tensor-parallel",
        "sglang-width",
        "llama.cpp-scores",
    }


def test_tensors_of_more_experts_than_config_says(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert lint(take_inventory(open_checkpoint(tmp_path, headers_only=True)), "transformers") == []
    # the routers are cut to four rows in the header's eyes: only the experts' own tensors are too many then
    checkpoint = open_checkpoint(tmp_path, headers_only=True)
    checkpoint.config["num_local_experts"] = config["num_local_experts"] // 2
    for name, info in checkpoint.tensors.items():
        if name.endswith("gate.weight"):
            checkpoint.tensors[name] = replace(info, shape=(4, info.shape[1]))
    (finding,) = lint(take_inventory(checkpoint), "transformers")
    assert finding.rule.id == "transformers-count"
    assert finding.message == "config.json says 4 experts, but decoder layer 0 has tensors of 8"


@pytest.mark.parametrize("model_type", ["qwen2_moe", "longcat_flash", "kimi_linear"])
def test_other_layouts_agree_with_their_config(model_type: str, tmp_path: Path) -> None:
    inventory = take_inventory(open_checkpoint(save_tiny(model_type, tmp_path), headers_only=True))
    assert "transformers-count" not in [finding.rule.id for finding in lint(inventory)]


def test_unregistered_names_are_classes() -> None:
    absent = vllm.UNREGISTERED | sglang.UNREGISTERED | llama_cpp.UNREGISTERED
    assert all(re.search(r"For(CausalLM|ConditionalGeneration)$", name) for name in absent)
    assert sglang.NO_BACKEND < sglang.UNREGISTERED


def test_each_engine_has_a_file_that_says_what_was_read() -> None:
    for (engine, version), module in zip(ENGINES.items(), (transformers, vllm, sglang, llama_cpp), strict=True):
        assert version == module.VERSION
        assert version in (module.__doc__ or "")
        assert {rule.engine for rule in module.RULES} == {engine}


def test_linting_needs_no_torch() -> None:
    code = "import sys, expertsmith.lint; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
