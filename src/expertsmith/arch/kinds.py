"""Routers and experts that many families share. A family's record starts from one of these (`dataclasses.replace`) and changes the rest.

`Architecture` itself is the plainest kind: a softmax router `mlp.gate` over `mlp.experts`, without expert groups or shared experts.
"""

from dataclasses import replace

from expertsmith.arch.base import FUSED, Architecture, Stacked

ROUTER = Stacked("mlp.gate.weight", "router")
ROUTER_AND_BIAS = (ROUTER, Stacked("mlp.gate.e_score_correction_bias", "router"))

# DeepSeek V2's: expert groups and shared experts
GROUPED = Architecture(
    model_type="",
    title="",
    experts_key=("n_routed_experts",),
    group_key="n_group",
    top_group_key="topk_group",
    shared_key="n_shared_experts",
    shared="shared_experts",
)

# sigmoid scores, and a bias that acts on the selection only
SIGMOID = Architecture(
    model_type="",
    title="",
    stacked=(*ROUTER_AND_BIAS, *FUSED),
    selection_bias=("gate.e_score_correction_bias",),
    score="sigmoid",
)

# DeepSeek V3's: both, and the score of an expert group is the sum of its best two experts'
DEEPSEEK = replace(
    GROUPED, group_minimum=2, stacked=SIGMOID.stacked, selection_bias=SIGMOID.selection_bias, score=SIGMOID.score
)

# Mixtral's: experts of w1, w3 and w2 below block_sparse_moe in checkpoints
MIXTRAL = Architecture(
    model_type="",
    title="",
    experts_key=("num_local_experts",),
    expert_width_key=("intermediate_size",),
    expert_prefix=("block_sparse_moe.experts.{expert}.",),
    projections=("w1", "w3", "w2"),
    stacked=(Stacked("block_sparse_moe.gate.weight", "router"), ROUTER, *FUSED),
)

# Qwen3's: transformers writes num_experts to config.json as num_local_experts
QWEN3 = Architecture(model_type="", title="", experts_key=("num_experts", "num_local_experts"))

# Why layers of a composite cannot hold different numbers of experts, and what its notes say
WHOLE_ONLY = "transformers has the language model only as a part of the whole"
COMPOSITE_NOTE = (
    "The language model runs inside the published class, on text; vision tensors and processor files are copied unchanged."
)
# Why layers of a family that runs under another name cannot
OWN_CODE = "its config class is code of its own, which knows one number for all layers"
