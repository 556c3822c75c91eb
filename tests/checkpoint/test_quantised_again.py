"""Weights that are written in their quantised format again."""

from __future__ import annotations

import pytest
import torch

import quantise
from expertsmith.checkpoint.formats import formats
from expertsmith.errors import UserError
from one_weight import shape_of, view, weight
from quantise import KINDS

BLOCKS = quantise.BLOCKS
pytest.importorskip("compressed_tensors")
AGAIN = ["fp8_block", "fp8_block_128", "fp8_block_bf16_scales", "fp8_block_ue8m0", "fp8_channel", "fp8_tensor", "fp8_modelopt", "fp8_fused",
         "fp8_fused_tensor", "mxfp8", "int4", "int4_channel", "int8_packed", "mxfp4", "mxfp4_packed"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_which_formats_are_quantised_again(kind, tmp_path):
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    found, name, _ = view(tmp_path, kind, weight(*shape_of(kind)))
    if kind in AGAIN:
        found.encoded(name, found.read(name))
    else:
        with pytest.raises(UserError, match="cannot be re-quantised without calibration data"):
            found.encoded(name, found.read(name))


@pytest.mark.parametrize("kind", AGAIN)
def test_quantised_again(kind, tmp_path):
    """Parts of the same dtypes and shapes; other values within half a step; values that the format can hold come back."""
    found, name, parts = view(tmp_path, kind, weight(*shape_of(kind)))
    other = weight(*shape_of(kind), seed=7)
    entry = found.stored[name]
    made = found.encoded(name, other)
    for role, info in entry.parts.items():
        if role not in formats()[entry.format].constant:
            stored = found.raw.read(info.name)
            assert (made[info.name].dtype, made[info.name].shape) == (stored.dtype, stored.shape), role
    error = (found.rounded(name, other) - other).abs().max() / other.abs().max()
    if "int" in kind:
        bits = 8 if "int8" in kind else 4
        limit = 0.5 / (2 ** (bits - 1) - 1) * (1.01 if parts[".weight_scale"].dtype == torch.float32 else 1.1)
    elif kind.startswith("mxfp4"):
        limit = 0.251  # |w| of 7 … 8 steps is cut to 6
    else:
        limit = 2.0**-4 + 0.002  # a mantissa of three bits
    assert error <= limit
    assert error > 0
    held = found.read(name)
    assert torch.allclose(found.rounded(name, held), held, rtol=3e-3 if "bf16" in kind else 1e-6, atol=1e-9) or kind in (
        "fp8_channel",
        "int4_channel",
    )


@pytest.mark.parametrize("kind", [kind for kind in AGAIN if not kind.startswith("mxfp4")])
def test_mean_error_of_quantising_again(kind, tmp_path):
    """No worse than what was there: the generator rounds to nearest as well."""
    w = weight(*shape_of(kind))
    found, name, _ = view(tmp_path, kind, w)
    before, after = ((made - w).square().mean() for made in (found.read(name), found.rounded(name, w)))
    assert after <= 1.05 * before


@pytest.mark.parametrize("kind", AGAIN)
def test_zeros_are_quantised(kind, tmp_path):
    """A block of zeros has a scale that is a number, and comes back as zeros."""
    found, name, _ = view(tmp_path, kind, weight(*shape_of(kind)))
    made = found.rounded(name, torch.zeros(shape_of(kind)))
    assert torch.equal(made, torch.zeros(shape_of(kind)))
    half = weight(*shape_of(kind))
    half[: len(half) // 2] = 0
    made = found.rounded(name, half)
    assert bool(made.isfinite().all())
    assert not bool(made[: len(half) // 2].any())


@pytest.mark.parametrize("kind", ["fp8_fused", "fp8_fused_tensor", "mxfp4"])
def test_one_expert_is_quantised_as_in_the_whole(kind, tmp_path):
    found, name, _ = view(tmp_path, kind, weight(*shape_of(kind)))
    other = weight(*shape_of(kind), seed=5)
    whole, one = found.encoded(name, other), found.encoded(name, other[2:3])
    for part, value in one.items():
        assert torch.equal(value.view(torch.uint8), whole[part][2:3].view(torch.uint8)), part
    assert torch.equal(found.rounded(name, other[2:3]), found.rounded(name, other)[2:3])
