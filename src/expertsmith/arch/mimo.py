"""MiMo of Xiaomi."""

from dataclasses import replace

from expertsmith.arch.kinds import SIGMOID

FAMILIES = (
    replace(
        SIGMOID,
        model_type="mimo_v2_flash",
        title="MiMo-V2-Flash (XiaomiMiMo/MiMo-V2-Flash)",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
    ),
)
