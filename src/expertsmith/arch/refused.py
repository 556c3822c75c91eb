"""Families with routed experts that expertsmith does not prune, and why."""

from expertsmith.arch.base import Architecture

ERNIE_VL = (
    "it has experts for text and experts for images in one list, and transformers builds as many of the one kind as of the other, so text experts "
    "cannot go alone, and text does not show which of the image experts could"
)

FAMILIES = (
    Architecture(
        model_type="jetmoe",
        title="JetMoE (jetmoe/jetmoe-8b)",
        status="refused",
        notes="its attention is a second mixture of experts with a router and weights of its own, and one num_local_experts "
        "sets the number of both, so MLP experts cannot be dropped without dropping attention experts too",
    ),
    Architecture(
        model_type="doge",
        title="Doge with cross-domain experts (SmallDoge)",
        status="refused",
        notes="its experts are single neurons (two embedding rows each) that product keys choose: an expert's number stands "
        "for a pair of keys, and each key serves sqrt(num_experts) experts, so no router row belongs to one expert alone",
    ),
    Architecture(
        model_type="ernie4_5_vl_moe",
        title="ERNIE 4.5 VL (baidu/ERNIE-4.5-VL-28B-A3B-PT)",
        status="refused",
        notes=ERNIE_VL,
    ),
    Architecture(
        model_type="ernie4_5_moe_vl",
        title="ERNIE 4.5 VL, as it is published",
        status="refused",
        notes=ERNIE_VL,
    ),
)
