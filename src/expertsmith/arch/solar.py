"""Solar Open of Upstage."""

from dataclasses import replace

from expertsmith.arch.kinds import DEEPSEEK

FAMILIES = (
    replace(
        DEEPSEEK,
        model_type="solar_open",
        title="Solar Open (upstage/Solar-Open-100B)",
    ),
)
