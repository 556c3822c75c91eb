"""The parameters of a module in memory: released, aligned, and checked for NaN and inf."""

from __future__ import annotations

import torch
from torch import nn

from expertsmith.errors import UserError

CHECKED_AT_ONCE = 2**22  # elements


def to_meta(layer: nn.Module) -> None:
    """Release a module's parameters; their shapes and dtypes stay."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def align(module: nn.Module, skip: set[int] | frozenset[int] = frozenset()) -> None:
    """Copy weights that do not begin at a multiple of 64 bytes: CPU kernels process them with other rounding, and the place of a tensor in
    a file or buffer must not change the last bit of a statistic."""
    moved: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or id(parameter) in skip or parameter.device.type != "cpu" or parameter.data_ptr() % 64 == 0:
                continue
            if id(parameter) not in moved:  # tied weights stay tied
                moved[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            owner._parameters[name] = moved[id(parameter)]


def check_finite(
    module: nn.Module, where: str, skip: set[int] | frozenset[int] = frozenset(), selection: frozenset[str] = frozenset()
) -> None:
    """Refuse the first parameter with NaN or inf (`selection`: parameters that may hold -inf). A sum in float32 needs one read, and any NaN
    or inf makes it non-finite."""
    for name, parameter in module.named_parameters():
        if id(parameter) in skip or parameter.is_meta or not parameter.is_floating_point() or parameter.element_size() < 2:
            continue
        # in parts, because a float32 sum of another dtype on a CPU makes a float32 copy of its input
        if all(
            bool(torch.isfinite(part.sum(dtype=torch.float32))) for part in torch.split(parameter.reshape(-1), CHECKED_AT_ONCE)
        ):
            continue
        wrong = ~torch.isfinite(parameter)
        if name in selection:
            wrong &= ~torch.isneginf(parameter)
        if bool(wrong.any()):
            bad = wrong.nonzero()[0].tolist()
            raise UserError(
                f"{name} in {where} has NaN or inf (first at {bad})", "the checkpoint is damaged; download it again"
            )
