"""Mellum of JetBrains."""

from dataclasses import replace

from expertsmith.arch.kinds import QWEN3

FAMILIES = (
    replace(
        QWEN3,
        model_type="mellum",
        title="Mellum 2 (JetBrains/Mellum2-12B-A2.5B-Base)",
    ),
)
