"""Families with routed experts that expertsmith does not prune, and why."""

from expertsmith.arch.base import Architecture

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
)
