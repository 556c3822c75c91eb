"""Every decoder against its library or a written-out formula, its inverse, and the contradictions that are refused."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import quantise
from conftest import SUPPORTED, run_cli, save_tiny
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.floats import Floats, floats, quantisation_of
from expertsmith.checkpoint.formats import formats
from expertsmith.checkpoint.formats.base import E2M1, e2m1, pack, to_e2m1, unpack
from expertsmith.errors import UserError
from quantise import KINDS, WIDE, library, quantise_checkpoint

BLOCKS = quantise.BLOCKS
NAME = "layer.up_proj"
PACKED_BITS = range(1, 9)
pytest.importorskip("compressed_tensors")


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(folder: Path, parts: dict[str, torch.Tensor], config: dict, files: dict | None = None, name: str = NAME):
    """A checkpoint of one quantised weight."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"quantization_config": dict(config)} if config else {}
    (folder / "config.json").write_text(json.dumps({"model_type": "any", **said}))
    for file, content in (files or {}).items():
        (folder / file).write_text(json.dumps(content))
    save_file({name + leaf: part.contiguous() for leaf, part in parts.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def view(folder: Path, kind: str, w: torch.Tensor) -> tuple[Floats, str, dict[str, torch.Tensor]]:
    """(float view, name of the weight, what stands on disk) of a weight in a format."""
    made = KINDS[kind]
    parts = made.encode(w) if w.dim() == 2 else made.fused(w)
    checkpoint = store(folder, parts, made.config, made.files)
    found = floats(checkpoint)
    assert isinstance(found, Floats)
    (name,) = found.stored
    assert found.tensors[name].shape == tuple(w.shape)
    assert found.tensors[name].nbytes == 4 * w.numel()
    return found, name, parts


# ------------------------------------------------------------------------------------------------------------ the references
def fp8_reference(parts, block):
    """transformers, on a weight filled up to whole blocks (it takes no others)."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = next(part for leaf, part in parts.items() if leaf in (".weight", ""))
    scale = next(part for leaf, part in parts.items() if leaf.endswith("_scale_inv"))
    rows, columns = codes.shape[-2:]
    pad = (0, -columns % block[1], 0, -rows % block[0])
    filled = torch.nn.functional.pad(codes.view(torch.uint8), pad).view(codes.dtype)
    return Fp8Dequantize(None)._dequantize_one(filled, scale.float(), torch.float32)[..., :rows, :columns]


def library_reference(parts, config):
    """compressed-tensors, with scales in float32 (it computes in the dtype of the scales)."""
    compressor, scheme = library(config["format"], config)
    state = {leaf[1:]: part for leaf, part in parts.items()}
    if state["weight_scale"].dtype == torch.bfloat16:
        state["weight_scale"] = state["weight_scale"].float()
    return compressor.decompress(state, scheme)["weight"].float()


def fp4_reference(parts, config):
    """compressed-tensors' own unpacking and scaling, asked for float32 (its `decompress` rounds to bfloat16 in between)."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scheme = library(config["format"], config)[1]
    packed, scale = parts[".weight_packed"], parts[".weight_scale"]
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
    scale = decompress_mx_scale(scale).float() if scale.dtype == torch.uint8 else scale.float()
    top = parts.get(".weight_global_scale")
    return dequantize(codes, scale, args=scheme.weights, global_scale=top, dtype=torch.float32)


def bit_code(words: list[int], place: int, bits: int) -> int:
    """Code `place` of a row of words, bit by bit."""
    code = 0
    for bit in range(bits):
        position = place * bits + bit
        code |= (words[position // 32] >> (position % 32) & 1) << bit
    return code


def gptq_reference(parts, bits, version):
    """(code - zero) · scale in float64, one weight at a time."""
    words = (parts[".qweight"].long() & 0xFFFFFFFF).T.tolist()
    zeros = (parts[".qzeros"].long() & 0xFFFFFFFF).tolist()
    scales, order = parts[".scales"].double().tolist(), parts[".g_idx"].tolist()
    made = np.empty((len(words), len(order)))
    for output in range(len(words)):
        for column, group in enumerate(order):
            zero = bit_code(zeros[group], output, bits) + (1 if version == 1 else 0)
            made[output, column] = (bit_code(words[output], column, bits) - zero) * scales[group][output]
    return torch.from_numpy(made)


def awq_reference(parts, size):
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of output 0, 1, … 7
    words = (parts[".qweight"].long() & 0xFFFFFFFF).tolist()
    zeros = (parts[".qzeros"].long() & 0xFFFFFFFF).tolist()
    scales = parts[".scales"].double().tolist()
    made = np.empty((8 * len(words[0]), len(words)))
    for output in range(made.shape[0]):
        shift = 4 * order[output % 8]
        for column in range(made.shape[1]):
            code = words[column][output // 8] >> shift & 0xF
            zero = zeros[column // size][output // 8] >> shift & 0xF
            made[output, column] = (code - zero) * scales[column // size][output]
    return torch.from_numpy(made)


def nvfp4_reference(parts):
    """modelopt: sign, exponent and mantissa of each nibble · FP8 scale of 16 · second scale, in float64."""
    packed, scales = parts[".weight"].tolist(), parts[".weight_scale"].double().tolist()
    top = float(parts[".weight_scale_2"].double())
    made = np.empty((len(packed), 2 * len(packed[0])))
    for row in range(made.shape[0]):
        for column in range(made.shape[1]):
            code = packed[row][column // 2] >> (4 * (column % 2)) & 0xF
            exponent, mantissa = code >> 1 & 3, code & 1
            size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            made[row, column] = (-1 if code & 8 else 1) * size * scales[row][column // 16] * top
    return torch.from_numpy(made)


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_block_bf16_scales", "fp8_block_ue8m0", "fp8_block_128"])
@pytest.mark.parametrize("shape", [(32, 48), (40, 50), (160, 136), (1, 128), (24, 32)])
def test_fp8_blocks_as_transformers(kind, shape, tmp_path):
    """Also where the last block is cut."""
    found, name, parts = view(tmp_path, kind, weight(*shape))
    assert torch.equal(found.read(name), fp8_reference(parts, KINDS[kind].config["weight_block_size"]))


def test_fp8_scales_of_powers_as_bytes(tmp_path):
    """F8_E8M0 and the same exponents as U8 (MXFP8's way of storing them) are the same scales, from 2^-127 to 2^127."""
    codes = weight(32, 32).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[0, 254], [100, 127]], dtype=torch.uint8)
    read = [
        floats(store(tmp_path / str(dtype), {".weight": codes, ".weight_scale_inv": exponents.view(dtype)}, BLOCKS)).read(
            f"{NAME}.weight"
        )
        for dtype in (torch.uint8, torch.float8_e8m0fnu)
    ]
    assert torch.equal(read[0], read[1])
    factor = torch.tensor([[2.0**-127, 2.0**127], [2.0**-27, 1.0]]).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(read[0], codes.float() * factor)


@pytest.mark.parametrize("large", [1.0, 1e4, 1e30])
def test_every_fp8_code(large, tmp_path):
    """All 254 finite codes, subnormal ones too, by small and by large scales (which are multiplied in two different ways)."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F] + [0, 0], dtype=torch.uint8).view(torch.float8_e4m3fn)
    parts = {".weight": codes.reshape(16, 16), ".weight_scale_inv": torch.tensor([[0.37 * large]])}
    made = floats(store(tmp_path, parts, BLOCKS)).read(f"{NAME}.weight")
    assert torch.equal(made, codes.reshape(16, 16).float() * torch.tensor(0.37 * large))


def test_e5m2(tmp_path):
    codes = weight(32, 16).to(torch.float8_e5m2)
    parts = {".weight": codes, ".weight_scale_inv": torch.tensor([[0.5], [3.0]])}
    made = floats(store(tmp_path, parts, BLOCKS)).read(f"{NAME}.weight")
    assert torch.equal(made, codes.float() * torch.tensor([0.5, 3.0]).repeat_interleave(16)[:, None])


@pytest.mark.parametrize("kind", ["fp8_fused", "fp8_fused_tensor"])
def test_fused_fp8_as_transformers(kind, tmp_path):
    found, name, parts = view(tmp_path, kind, weight(5, 24, 40))
    block = quantise.FUSED_BLOCK if kind == "fp8_fused" else (24, 40)
    assert torch.equal(found.read(name), fp8_reference(parts, block))


@pytest.mark.parametrize("scale", [(5,), (5, 1), (5, 1, 1), (1,), (), (5, 24), (5, 24, 1), (5, 3, 3)])
def test_scales_of_fused_fp8(scale, tmp_path):
    """One for all, an expert, a channel, a block."""
    codes, values = (
        weight(5, 24, 40).to(torch.float8_e4m3fn),
        0.5 + torch.rand(scale, generator=torch.Generator().manual_seed(1)),
    )
    config = {**BLOCKS, "weight_block_size": list(quantise.FUSED_BLOCK)}
    made = floats(store(tmp_path, {"": codes, "_scale_inv": values}, config, name="layer.experts.down_proj"))
    if scale == (5, 3, 3):
        factor = values.repeat_interleave(8, 1).repeat_interleave(16, 2)[..., :40]
    else:
        factor = values.reshape(*scale, *[1] * (3 - len(scale)))
    want = codes.float() * factor
    assert torch.equal(made.read("layer.experts.down_proj"), want)
    assert torch.equal(made.read("layer.experts.down_proj", 2, 4), want[2:4])


@pytest.mark.parametrize(
    "kind", ["fp8_channel", "fp8_tensor", "mxfp8", "int4", "int4_channel", "int4_asymmetric", "int8_packed", "int8_bytes"]
)
@pytest.mark.parametrize("shape", [(32, 64), (24, 96)])
def test_as_compressed_tensors(kind, shape, tmp_path):
    found, name, parts = view(tmp_path, kind, weight(*shape))
    assert torch.equal(found.read(name), library_reference(parts, KINDS[kind].config))


@pytest.mark.parametrize("bits", PACKED_BITS[1:])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [20, None])
def test_packed_integers_of_every_width(bits, symmetric, size, tmp_path):
    """2 to 8 bits, of columns that do not fill their last word."""
    strategy = "group" if size else "channel"
    config = quantise.compressed(
        "pack-quantized", num_bits=bits, type="int", strategy=strategy, group_size=size, symmetric=symmetric
    )
    parts = quantise._integers("pack-quantized", config, weight(32, 60))
    made = floats(store(tmp_path, parts, config)).read(f"{NAME}.weight")
    assert torch.equal(made, library_reference(parts, config))


def test_asymmetric_bytes(tmp_path):
    config = quantise.compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False)
    parts = quantise._integers("int-quantized", config, weight(24, 48))
    assert ".weight_zero_point" in parts
    made = floats(store(tmp_path, parts, config))
    assert torch.equal(made.read(f"{NAME}.weight"), library_reference(parts, config))
    assert torch.equal(made.read(f"{NAME}.weight", 3, 9), library_reference(parts, config)[3:9])


def test_words_with_room_left(tmp_path):
    """Earlier versions of compressed-tensors put 32 // bits codes into a word: 10 of 3 bits, so 64 columns take 7 words instead of 6."""
    config = quantise.compressed("pack-quantized", num_bits=3, type="int", strategy="channel")
    codes = torch.randint(0, 8, (4, 64), generator=torch.Generator().manual_seed(2))
    words = torch.zeros(4, 7, dtype=torch.int64)
    for column in range(64):
        words[:, column // 10] |= codes[:, column] << (3 * (column % 10))
    scale = torch.linspace(0.5, 2, 4)[:, None]
    parts = {".weight_packed": words.to(torch.int32), ".weight_scale": scale, ".weight_shape": torch.tensor([4, 64])}
    found = floats(store(tmp_path, parts, config))
    assert torch.equal(found.read(f"{NAME}.weight"), (codes - 4) * scale)
    again = found.encoded(f"{NAME}.weight", found.read(f"{NAME}.weight"))
    assert again[f"{NAME}.weight_packed"].shape == (4, 7)
    assert torch.allclose(
        found.rounded(f"{NAME}.weight", found.read(f"{NAME}.weight")), (codes - 4) * scale, atol=4 / 3 + 1e-6
    )  # half a step


def test_columns_in_an_order_of_their_own(tmp_path):
    """The library had it until 0.19: columns sorted by their group, decompressed, and put back."""
    found, name, parts = view(tmp_path, "int4_actorder", weight(16, 48))
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    columns = parts[".weight_g_idx"].argsort(stable=True)
    assert not torch.equal(columns, torch.arange(48))
    codes = unpack_from_int32(parts[".weight_packed"], 4, torch.Size([16, 48]))
    by_group = {**parts, ".weight_packed": pack_to_int32(codes[:, columns].contiguous(), 4)}
    del by_group[".weight_g_idx"]
    want = torch.empty(16, 48)
    want[:, columns] = library_reference(by_group, KINDS["int4"].config)
    assert torch.equal(found.read(name), want)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4_packed"])
def test_fp4_as_compressed_tensors(kind, tmp_path):
    found, name, parts = view(tmp_path, kind, weight(24, 64))
    assert torch.equal(found.read(name), fp4_reference(parts, KINDS[kind].config))


def test_mxfp4_of_gpt_oss_as_transformers(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found, name, parts = view(tmp_path, "mxfp4", weight(4, 64, 48))
    want = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"], dtype=torch.float32)
    assert torch.equal(found.read(name), want)
    assert torch.equal(found.read(name, 1, 3), want[1:3])


@pytest.mark.parametrize("codes", [torch.int8, torch.uint8])
def test_mxfp4_beside_fp8_as_transformers(codes, tmp_path):
    """DeepSeek-V4: experts in MXFP4 as bytes with E8M0 scales, in a checkpoint of FP8 blocks."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    made = quantise.mxfp4_packed(weight(24, 64))
    parts = {
        ".weight": made[".weight_packed"].view(codes),
        ".weight_scale_inv": made[".weight_scale"].view(torch.float8_e8m0fnu),
    }
    found = floats(store(tmp_path, parts, BLOCKS))
    want = Fp8Dequantize(None)._dequantize_one(parts[".weight"].view(torch.int8), made[".weight_scale"], torch.float32)
    assert torch.equal(found.read(f"{NAME}.weight"), want)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("bits", "shape"), [(2, (32, 32)), (3, (32, 64)), (4, (24, 40)), (8, (12, 24))])
def test_gptq_by_its_formula(bits, shape, version, ordered, tmp_path):
    parts = quantise.gptq(weight(*shape), bits, 8, version, ordered)
    config = dict(KINDS["gptq"].config, bits=bits, desc_act=ordered, checkpoint_format="gptq_v2" if version == 2 else "gptq")
    made = floats(store(tmp_path, parts, config)).read(f"{NAME}.weight")
    assert torch.equal(made.double(), gptq_reference(parts, bits, version))


def test_gptq_of_one_group(tmp_path):
    """group_size -1, and no g_idx."""
    parts = quantise.gptq(weight(16, 24), 4, 24)
    want = gptq_reference(parts, 4, 1)
    del parts[".g_idx"]
    made = floats(store(tmp_path, parts, dict(KINDS["gptq"].config, group_size=-1)))
    assert torch.equal(made.read(f"{NAME}.weight").double(), want)


def test_gptq_of_several_widths(tmp_path):
    """GPTQModel's `dynamic` gives modules their own bits and groups, or leaves them as floats."""
    a, b = quantise.gptq(weight(16, 32), 4, 8), quantise.gptq(weight(16, 32, seed=1), 8, 16)
    parts = {f"a{leaf}": part for leaf, part in a.items()} | {f"b{leaf}": part for leaf, part in b.items()}
    dynamic = {r"+:b": {"bits": 8, "group_size": 16}, r"-:c": {}}
    parts["c.weight"] = weight(4, 4)
    found = floats(store(tmp_path, parts, {**KINDS["gptq"].config, "dynamic": dynamic}, name=""))
    assert torch.equal(found.read("a.weight").double(), gptq_reference(a, 4, 1))
    assert torch.equal(found.read("b.weight").double(), gptq_reference(b, 8, 1))
    assert torch.equal(found.read("c.weight"), parts["c.weight"])


@pytest.mark.parametrize("size", [8, 32])
def test_awq_by_its_formula(size, tmp_path):
    parts = quantise.awq(weight(24, 32), size)
    want = awq_reference(parts, size)
    config = {**quantise.AWQ, "group_size": size}
    for number, said in enumerate(
        (config, {**quantise.AUTOROUND, "group_size": size, "packing_format": "auto_round:auto_awq"}, None)
    ):  # the last: what AutoAWQ first wrote, beside a config.json without a word of it
        files = {"quant_config.json": {"w_bit": 4, "q_group_size": size, "zero_point": True, "version": "GEMM"}}
        found = floats(store(tmp_path / str(number), parts, said or {}, files if said is None else None))
        assert torch.equal(found.read(f"{NAME}.weight").double(), want)
        for first, last in ((0, 3), (5, 21), (8, 16)):  # rows inside a word
            assert torch.equal(found.read(f"{NAME}.weight", first, last).double(), want[first:last])


def test_autoround_by_gptqs_formula(tmp_path):
    found, name, parts = view(tmp_path, "autoround", weight(24, 32))
    assert torch.equal(found.read(name).double(), gptq_reference(parts, 4, 1))


def test_nvfp4_of_modelopt_by_its_formula(tmp_path):
    found, name, parts = view(tmp_path, "nvfp4_modelopt", weight(24, 64))
    want = nvfp4_reference(parts)
    assert torch.allclose(found.read(name).double(), want, rtol=2.0**-23, atol=0)  # two float32 roundings of half a unit


def test_fp8_of_modelopt(tmp_path):
    found, name, parts = view(tmp_path, "fp8_modelopt", weight(24, 64))
    assert torch.equal(found.read(name), parts[".weight"].float() * parts[".weight_scale"])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_as_bitsandbytes(kind, nested, tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    w = weight(24, 64)
    parts = quantise.bnb_four(w, kind, nested)
    made = floats(store(tmp_path, parts, quantise.BNB)).read(f"{NAME}.weight")
    codes, state = functional.quantize_4bit(w.bfloat16(), blocksize=64, compress_statistics=nested, quant_type=kind)
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    nibbles = torch.stack((codes >> 4, codes & 0xF), -1).flatten().long()  # the high one first
    want = state.code[nibbles].reshape(-1, 64) * absmax.float()[:, None]
    assert torch.allclose(made, want.reshape(24, 64), rtol=1e-6, atol=0)
    state.dtype = torch.float32
    assert torch.equal(made, functional.dequantize_4bit(codes, state))


def test_eight_bits_as_bitsandbytes(tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    found, name, parts = view(tmp_path, "bnb_int8", weight(24, 64))
    assert torch.equal(found.read(name), functional.int8_vectorwise_dequant(parts[".weight"], parts[".SCB"]))


def shape_of(kind: str) -> tuple[int, ...]:
    if kind in ("fp8_fused", "fp8_fused_tensor"):
        return (6, 24, 40)
    return (6, 64, 48) if kind == "mxfp4" else (64, 96)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_rows_of_the_whole(kind, tmp_path):
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    found, name, _ = view(tmp_path, kind, weight(*shape_of(kind)))
    whole, rows = found.read(name), shape_of(kind)[0]
    assert whole.dtype == torch.float32
    for first, last in ((0, 1), (1, 4), (rows - 3, rows), (0, rows), (2, 2)):
        assert torch.equal(found.read(name, first, last), whole[first:last]), (first, last)
    assert torch.equal(found.read(name, 3), whole[3:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounded_once(kind, dtype, tmp_path):
    """Computed in float32 and rounded to what is asked for."""
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    found, name, _ = view(tmp_path, kind, weight(*shape_of(kind)))
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    made = floats(found, dtype).read(name)
    assert made.dtype == torch_dtype
    assert torch.equal(made, found.read(name).to(torch_dtype))
    assert floats(found, dtype).tensors[name].dtype == dtype


def test_weights_of_one_word(tmp_path):
    """Eight inputs, eight outputs: one word a row, and one a column of zero points."""
    parts = quantise.gptq(weight(8, 8), 4, 8)
    made = floats(store(tmp_path / "gptq", parts, KINDS["gptq"].config)).read(f"{NAME}.weight")
    assert torch.equal(made.double(), gptq_reference(parts, 4, 1))
    found, name, parts = view(tmp_path / "ct", "int4_asymmetric", weight(8, 8))
    assert torch.equal(found.read(name), library_reference(parts, KINDS["int4_asymmetric"].config))


def test_every_format_is_reached(tmp_path):
    """The kinds of this file reach every decoder."""
    held = set()
    for kind in KINDS:
        if not kind.startswith("bnb"):
            found, name, _ = view(tmp_path / kind, kind, weight(*shape_of(kind)))
            held.add(found.stored[name].format)
    assert held | {"bitsandbytes_4bit", "bitsandbytes_int8"} == set(formats())


# ------------------------------------------------------------------------------------------------------------- bits and FP4
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_packing_and_unpacking(data):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    bits = data.draw(st.integers(1, 8))
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count))
    codes = torch.tensor(values).reshape(rows, count)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, math.ceil(count * bits / 32))
    assert torch.equal(unpack(words, bits, count), codes.to(torch.int16))
    assert [
        [bit_code([w & 0xFFFFFFFF for w in row], i, bits) for i in range(count)] for row in words.tolist()
    ] == codes.tolist()
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_to_int32(signed, bits), words)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=64))
@settings(max_examples=100, deadline=None)
def test_nearest_fp4(values):
    values = torch.tensor(values[: len(values) // 2 * 2])
    made = e2m1(to_e2m1(values))
    steps = torch.tensor(sorted(set(E2M1)))
    best = (values[:, None] - steps).abs().amin(1)
    assert torch.equal((values - made).abs(), best)


def test_fp4_ties_go_to_the_even_code():
    """0.25 → 0, 0.75 → 1, 1.25 → 1, 1.75 → 2, 2.5 → 2, 3.5 → 4, 5 → 4, 7 → 6, and the same below zero."""
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert torch.equal(e2m1(to_e2m1(values)), want)
    assert torch.equal(e2m1(to_e2m1(-values)), -want)


def test_fp4_values_are_their_own_code():
    codes = torch.arange(256, dtype=torch.uint8)
    values = e2m1(codes)
    assert torch.equal(e2m1(to_e2m1(values)), values)


# ---------------------------------------------------------------------------------------------------------- quantising again
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


# ----------------------------------------------------------------------------------------------------------------- bad input
@cache
def quantised(kind: str, root: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and config.json of a small Mixture of Experts in a format."""
    family = "gpt_oss" if kind == "mxfp4" else "deepseek_v3" if kind == "fp8_fused" else "mixtral"
    if not (root / family).exists():
        save_tiny(family, root / family, **WIDE[family], num_hidden_layers=1 if family == "mixtral" else 2)
    if kind == "fp8_fused":  # the names that transformers has in memory
        fuse(root / family)
    quantise_checkpoint(root / family, root / f"{family}-{kind}", kind)
    folder = root / f"{family}-{kind}"
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def fuse(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for layer in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        held = {
            leaf: [tensors.pop(f"{layer}.experts.{e}.{leaf}_proj.weight") for e in range(8)] for leaf in ("gate", "up", "down")
        }
        tensors[f"{layer}.experts.down_proj"] = torch.stack(held["down"])
        tensors[f"{layer}.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(held["gate"], held["up"], strict=True)]
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


W1 = "model.layers.0.block_sparse_moe.experts.3.w1"


def put(name, value):
    """An edit: a tensor gets another value."""
    return lambda tensors, config: tensors.update({name: value(tensors[name])})


def drop(name):
    return lambda tensors, config: tensors.pop(name)


def add(name, value):
    return lambda tensors, config: tensors.update({name: value})


def say(**keys):
    """An edit of quantization_config."""
    return lambda tensors, config: config["quantization_config"].update(keys)


def say_weights(**keys):
    return lambda tensors, config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(keys)


def fill(value, count=1):
    def edit(tensor):
        flat = tensor.clone()
        raw = flat.view(torch.uint8) if isinstance(value, int) else flat
        raw.reshape(-1)[:count] = value
        return flat

    return edit


def two_configs(tensors, config):
    config["text_config"] = {**config, "quantization_config": {**config["quantization_config"], "weight_block_size": [8, 8]}}


NAN, INF = float("nan"), float("inf")
BAD = [
    # scales of a wrong shape
    ("fp8_block", put(f"{W1}.weight_scale_inv", lambda s: s[:, :1]), r"w1.weight_scale_inv has shape \[2, 1\], which does not fit .*w1.weight \[32, 32\]: one scale for blocks of 16 × 16"),
    ("fp8_block", put(f"{W1}.weight_scale_inv", lambda s: s.repeat(2, 2)), r"has shape \[4, 4\], which does not fit"),
    ("fp8_channel", put(f"{W1}.weight_scale", lambda s: s[:31]), r"w1.weight_scale has shape \[31, 1\], which does not fit"),
    ("fp8_tensor", put(f"{W1}.weight_scale", lambda s: s.repeat(3)), r"w1.weight_scale has shape \[3\], which does not fit"),
    ("fp8_fused", put("model.layers.1.mlp.experts.down_proj_scale_inv", lambda s: s[:7]), r"down_proj_scale_inv has shape \[7, 4, 2\], which does not fit"),
    ("int4", put(f"{W1}.weight_scale", lambda s: s[:, :3]), r"w1.weight_scale|group_size"),
    ("int4", put(f"{W1}.weight_scale", lambda s: s[:16]), r"w1.weight_scale has shape \[16, 4\], which does not fit"),
    ("int4_asymmetric", put(f"{W1}.weight_zero_point", lambda z: z[:3]), r"w1.weight_zero_point has shape \[3, 4\], which does not fit .*\[4, 4\] is expected"),
    ("int4_actorder", put(f"{W1}.weight_g_idx", lambda g: g[:16]), r"w1.weight_g_idx has shape \[16\], which does not fit"),
    ("nvfp4", put(f"{W1}.weight_scale", lambda s: s[:, :1]), r"w1.weight_scale has shape \[32, 1\], which does not fit .*one scale for 16 inputs"),
    ("nvfp4", put(f"{W1}.weight_global_scale", lambda s: s.repeat(3)), r"w1.weight_global_scale has shape \[3\].*one number is expected"),
    ("mxfp4", put("model.layers.1.mlp.experts.down_proj_scales", lambda s: s[:, :5]), r"down_proj_scales has shape \[8, 5, 1\], which does not fit"),
    ("mxfp4", put("model.layers.1.mlp.experts.down_proj_blocks", lambda b: b[..., :8]), r"down_proj_blocks has shape .*: blocks of 16 bytes are expected"),
    ("mxfp4_packed", put(f"{W1}.weight_scale", lambda s: s[:31]), r"w1.weight_(scale|packed)"),
    ("mxfp8", put(f"{W1}.weight_scale", lambda s: s[:, :0].reshape(0, 1)), r"w1.weight_scale"),
    ("gptq", put(f"{W1}.scales", lambda s: s[:, :7]), r"w1.scales has shape \[4, 7\], which does not fit"),
    ("gptq", put(f"{W1}.qzeros", lambda z: z[:, :3]), r"w1.qzeros has shape \[4, 3\], which does not fit"),
    ("awq", put(f"{W1}.scales", lambda s: s[:, :7]), r"w1.scales has shape \[4, 7\], which does not fit"),
    ("awq", put(f"{W1}.qzeros", lambda z: z[:3]), r"w1.qzeros has shape \[3, 4\], which does not fit"),
    ("bnb_nf4", put(f"{W1}.weight", lambda w: w[:100]), r"quant_state.bitsandbytes__nf4 says \[32, 32\], which does not fit"),
    ("bnb_nf4", put(f"{W1}.weight.absmax", lambda a: a[:3]), r"w1.weight.absmax has shape \[3\], which does not fit .*\[16\] is expected"),
    ("bnb_nf4", put(f"{W1}.weight.quant_map", lambda m: m[:8]), r"w1.weight.quant_map has shape \[8\], which does not fit"),
    ("bnb_int8", put(f"{W1}.SCB", lambda s: s[:31]), r"w1.SCB has shape \[31\], which does not fit"),
    ("int8_bytes", put(f"{W1}.weight_scale", lambda s: s[:31]), r"w1.weight_scale has shape \[31, 1\], which does not fit"),
    # a missing companion
    ("fp8_block", drop(f"{W1}.weight_scale_inv"), r"w1.weight is F8_E4M3, but it has no scales and no decoder"),
    ("int4", drop(f"{W1}.weight_scale"), r"w1.weight is quantised, but .*w1.weight_scale is missing"),
    ("int4", drop(f"{W1}.weight_shape"), r"w1.weight is quantised, but .*w1.weight_shape is missing"),
    ("int8_bytes", drop(f"{W1}.weight_scale"), r"w1.weight is quantised, but .*w1.weight_scale is missing"),
    ("nvfp4", drop(f"{W1}.weight_global_scale"), r"w1.weight is quantised, but .*w1.weight_global_scale is missing"),
    ("nvfp4", drop(f"{W1}.weight_scale"), r"w1.weight_(packed is U8, but nothing was found|global_scale belongs to a quantised weight)"),
    ("nvfp4_modelopt", drop(f"{W1}.weight_scale_2"), r"w1.weight is quantised, but .*w1.weight_scale_2 is missing"),
    ("nvfp4_modelopt", drop(f"{W1}.weight_scale"), r"w1.weight(_scale_2 belongs to a quantised weight| is U8, but nothing was found)"),
    ("mxfp4", drop("model.layers.1.mlp.experts.down_proj_scales"), r"down_proj is quantised, but .*down_proj_scales is missing"),
    ("gptq", drop(f"{W1}.scales"), r"w1.weight is quantised, but .*w1.scales is missing"),
    ("gptq", drop(f"{W1}.qzeros"), r"w1.weight is quantised, but .*w1.qzeros is missing"),
    ("awq", drop(f"{W1}.qzeros"), r"w1.weight is quantised, but .*w1.qzeros is missing"),
    ("bnb_nf4", drop(f"{W1}.weight.absmax"), r"w1.weight is quantised, but .*w1.weight.absmax is missing"),
    ("bnb_nf4", drop(f"{W1}.weight.nested_absmax"), r"w1.weight is quantised, but .*w1.weight.nested_absmax is missing"),
    ("bnb_nf4", drop(f"{W1}.weight.quant_state.bitsandbytes__nf4"), r"w1.weight(.nested_absmax belongs to a quantised weight| is U8, but nothing was found)"),
    ("bnb_nf4", put(f"{W1}.weight.quant_state.bitsandbytes__nf4", fill(7)), r"bitsandbytes__nf4 is not a description of a quantised weight"),
    ("bnb_int8", drop(f"{W1}.SCB"), r"w1.weight is quantised, but .*w1.SCB is missing"),
    # scales and codes that are no numbers
    ("fp8_block", put(f"{W1}.weight_scale_inv", fill(NAN)), r"w1.weight_scale_inv has NaN or inf"),
    ("fp8_block", put(f"{W1}.weight_scale_inv", fill(INF)), r"w1.weight_scale_inv has NaN or inf"),
    ("fp8_block", put(f"{W1}.weight", fill(0x7F)), r"w1.weight has NaN"),
    ("fp8_block", lambda t, c: (put(f"{W1}.weight", fill(0x7F))(t, c), put(f"{W1}.weight_scale_inv", fill(1000.0))(t, c)), r"w1.weight has NaN"),
    ("fp8_block_ue8m0", put(f"{W1}.weight_scale_inv", fill(0xFF)), r"w1.weight_scale_inv has NaN or inf"),
    ("fp8_fused", put("model.layers.1.mlp.experts.down_proj_scale_inv", fill(NAN)), r"down_proj_scale_inv has NaN or inf"),
    ("mxfp8", put(f"{W1}.weight_scale", fill(0xFF)), r"w1.weight_scale has NaN or inf"),
    ("int4", put(f"{W1}.weight_scale", fill(NAN)), r"w1.weight_scale has NaN or inf"),
    ("nvfp4", put(f"{W1}.weight_scale", fill(0x7F)), r"w1.weight_scale has NaN or inf"),
    ("nvfp4", put(f"{W1}.weight_global_scale", fill(INF)), r"w1.weight_global_scale has NaN or inf"),
    ("nvfp4", put(f"{W1}.weight_global_scale", fill(0.0)), r"w1.weight_global_scale is 0"),
    ("mxfp4", put("model.layers.1.mlp.experts.down_proj_scales", fill(0xFF)), r"down_proj_scales has NaN or inf"),
    ("mxfp4_packed", put(f"{W1}.weight_scale", fill(0xFF)), r"w1.weight_scale has NaN or inf"),
    ("gptq", put(f"{W1}.scales", fill(NAN)), r"w1.scales has NaN or inf"),
    ("awq", put(f"{W1}.scales", fill(INF)), r"w1.scales has NaN or inf"),
    ("bnb_nf4", put(f"{W1}.weight.nested_absmax", fill(NAN)), r"w1.weight.nested_absmax has NaN or inf"),
    ("bnb_int8", put(f"{W1}.SCB", fill(NAN)), r"w1.SCB has NaN or inf"),
    # blocks that do not divide, shapes that contradict each other
    ("fp8_block", say(weight_block_size=[12, 12]), r"which does not fit .*: one scale for blocks of 12 × 12 is expected"),
    ("fp8_block", say(weight_block_size=[128, 128]), r"one scale for blocks of 128 × 128 is expected"),
    ("int4", put(f"{W1}.weight_shape", lambda s: torch.tensor([32, 40])), r"w1.weight_packed|w1.weight_shape"),
    ("int4", put(f"{W1}.weight_shape", lambda s: torch.tensor([31, 32])), r"w1.weight_shape says \[31, 32\], which contradicts"),
    ("int4", put(f"{W1}.weight_shape", lambda s: torch.tensor([32])), r"w1.weight_shape says \[32\], which contradicts"),
    ("int4", put(f"{W1}.weight_shape", lambda s: torch.tensor([-32, 32])), r"w1.weight_shape says \[-32, 32\], which contradicts"),
    ("int4_actorder", put(f"{W1}.weight_g_idx", fill(9)), r"w1.weight_g_idx names a group that"),
    ("gptq", put(f"{W1}.g_idx", fill(9)), r"w1.g_idx refers to a group that does not exist"),
    ("gptq_order", say(desc_act=False), r"g_idx: its tensors say columns are in a custom order, but the quantisation config says desc_act false"),
    # a config that contradicts the tensors
    ("int4", say_weights(num_bits=8), r"its tensors say bits 4 .*, but the quantisation config says 8"),
    ("int4", say_weights(group_size=16), r"its tensors say group_size 8, but the quantisation config says 16"),
    ("int4", say_weights(symmetric=False), r"its tensors say symmetric True, but the quantisation config says False"),
    ("int4_asymmetric", say_weights(symmetric=True), r"its tensors say symmetric False, but the quantisation config says True"),
    ("int4", say_weights(strategy="channel"), r"its tensors say group_size 8, but the quantisation config says strategy channel"),
    ("int4_channel", say_weights(strategy="group", group_size=8), r"group_size|strategy"),
    ("int4", say_weights(type="float"), r"its tensors say codes of int, but the quantisation config says float"),
    ("int8_bytes", say_weights(type="float"), r"its tensors say codes of int, but the quantisation config says float"),
    ("int8_bytes", say_weights(symmetric=False), r"its tensors say symmetric True, but the quantisation config says False"),
    ("fp8_channel", say_weights(type="int"), r"its tensors say 8 bits of float"),
    ("fp8_channel", say_weights(strategy="block", block_structure=[16, 16]), r"its tensors say one scale per channel, but the quantisation config says one per block"),
    ("fp8_channel", say_weights(strategy="tensor"), r"its tensors say one scale per channel, but the quantisation config says one per tensor"),
    ("nvfp4", say_weights(num_bits=8), r"its tensors say 4 bits of float in groups of 16, but the quantisation config says 8 bits of float"),
    ("nvfp4", say_weights(type="int"), r"but the quantisation config says 4 bits of int"),
    ("mxfp4_packed", say_weights(num_bits=8), r"its tensors say 4 bits of float in groups of 32, but the quantisation config says 8 bits"),
    ("gptq", say(bits=8), r"its tensors say bits 4, but the quantisation config says 8"),
    ("gptq", say(bits=5), r"the quantisation config says 5 bits; GPTQ has 2, 3, 4, 8"),
    ("gptq", say(group_size=16), r"its tensors say groups 4, but the quantisation config says group_size 16, which is 2"),
    ("awq", say(bits=8), r"the quantisation config says 8 bits; AWQ has 4"),
    ("awq", say(group_size=16), r"its tensors say groups 4, but the quantisation config says group_size 16, which is 2"),
    ("gptq", say(checkpoint_format="marlin"), r"checkpoint_format 'marlin' is not supported; supported: gptq and gptq_v2"),
    ("awq", say(version="gemv"), r"AWQ of version 'gemv' packs its codes differently; only version gemm"),
    ("autoround", say(packing_format="auto_round:exllama"), r"packing_format 'auto_round:exllama' is not supported"),
    ("int4", say(quant_method="gptq"), r"is INT4, groups of 8, but .* says quant_method 'gptq'"),
    ("fp8_block", say(quant_method="mxfp4"), r"is FP8, blocks of 16 × 16, but .* says quant_method 'mxfp4'"),
    ("gptq", say(quant_method="awq"), r"w1|qzeros|scales|shape"),
    ("fp8_block", say(quant_method="hqq"), r"quant_method 'hqq' cannot be decoded; supported: auto-round, awq"),
    ("fp8_block", lambda tensors, config: config["quantization_config"].pop("quant_method"), r"quantization_config has no quant_method"),
    ("fp8_block", lambda tensors, config: config.update(quantization_config="fp8"), r"quantization_config is not an object"),
    ("int4", say(sparsity_config={"format": "sparse-24-bitmask"}), r"the quantisation has a sparsity_config, which changes weights"),
    ("int4", say(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), r"the quantisation has a transform_config"),
    ("fp8_block", two_configs, r"has two different quantization_configs, one at the top and one in text_config"),
    # what nothing claims
    ("fp8_block", add(f"{W1}.weight_scale_2", torch.ones(1)), r"w1.weight_scale_2 belongs to a quantised weight that cannot be decoded"),
    ("fp8_block", add(f"{W1}.weight_scale", torch.ones(2, 2)), r"w1.weight has two scales"),
    ("int4", add(f"{W1}.weight", torch.ones(32, 32)), r"w1.weight is in .* twice"),
    ("fp8_block", add("model.layers.0.self_attn.z_proj.weight_scale_inv", torch.ones(1, 1)), r"z_proj.weight_scale_inv belongs to a quantised weight"),
    ("gptq", add(f"{W1}.bitmask", torch.ones(4)), r"w1.bitmask belongs to a quantised weight"),
    ("gptq", drop(f"{W1}.qweight"), r"w1.(qzeros|scales|g_idx) belongs to a quantised weight"),
    ("awq", put(f"{W1}.qweight", lambda q: q.to(torch.int64)), r"w1.(qweight|qzeros|scales)"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "edit", "message"), BAD, ids=[f"{i}-{kind}" for i, (kind, _, _) in enumerate(BAD)])
def test_contradictions_are_refused(kind, edit, message, tmp_path, tmp_path_factory, capsys):
    """One line, exit code 2, nothing written: by a command that reads the experts, from the first look to the result."""
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.getbasetemp() / "bad"
    tensors, config = quantised(kind, root)
    tensors, config = dict(tensors), json.loads(json.dumps(config))
    edit(tensors, config)
    write(tmp_path / "source", tensors, config)
    code, _, err = run_cli(capsys, "compress", tmp_path / "source", "-m", "aimer", "-k", "0.5", "-o", tmp_path / "out", "-q")
    assert code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("said", [None, {"quant_method": "fp8"}, {"quant_method": "compressed-tensors"}])
def test_codes_alone_are_refused(dtype, said, tmp_path):
    """Weights that are codes, and nothing that says what they are worth, with and without a config."""
    checkpoint = store(tmp_path, {".weight": torch.ones(8, 16).to(dtype)}, said or {})
    with pytest.raises(UserError, match=rf"{NAME}.weight(_scale)? is"):
        quantisation_of(checkpoint)


def test_floats_that_are_said_to_be_quantised(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints("mixtral"), tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "quantization_config": BLOCKS}))
    arguments = ("compress", tmp_path / "source", "-m", "random", "-k", "0.5", "-o", tmp_path / "out", "-q")
    code, _, err = run_cli(capsys, *arguments)
    assert code == 2
    assert (
        "says quant_method 'fp8', but no tensor is quantised; if the weights are plain floats, remove quantization_config"
        in err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_unquantised_checkpoints_are_not_touched(model_type, checkpoints):
    """Learned scales, buffers of integers and the like are no quantisation: the view is the checkpoint itself."""
    checkpoint = open_checkpoint(checkpoints(model_type))
    assert quantisation_of(checkpoint) is None
    assert floats(checkpoint) is checkpoint


def test_parameters_that_look_like_scales(tmp_path):
    """In an unquantised model, a float that ends in _scale is a parameter, and integers are tables; in a quantised one, too."""
    others = {
        "router.per_expert_scale": torch.rand(8),
        "norm.scale": torch.rand(8),
        "attn.logit_scale": torch.tensor(2.0),
        "layer_scalar": torch.ones(1),
        "tid2eid": torch.arange(32, dtype=torch.int32).reshape(4, 8),
        "position_ids": torch.arange(12)[None],
    }
    plain = store(tmp_path / "plain", others, {}, name="")
    assert quantisation_of(plain) is None
    parts = {f"{NAME}{leaf}": part for leaf, part in quantise.fp8_block(weight(32, 32)).items()}
    found = floats(store(tmp_path / "fp8", {**others, **parts, f"{NAME}.input_scale": torch.ones(1)}, BLOCKS, name=""))
    assert set(found.tensors) == {*others, f"{NAME}.weight"}
    for name, value in others.items():
        assert torch.equal(found.read(name), value)


def test_config_beside_or_inside(tmp_path):
    """modelopt's file alone, and a quantization_config in text_config, say the same."""
    parts = quantise.fp8_modelopt(weight(24, 64))
    want = parts[".weight"].float() * parts[".weight_scale"]
    beside = store(tmp_path / "beside", parts, {}, KINDS["fp8_modelopt"].files)
    assert torch.equal(floats(beside).read(f"{NAME}.weight"), want)
    inside = store(tmp_path / "inside", parts, {})
    (tmp_path / "inside" / "config.json").write_text(
        json.dumps({"model_type": "outer", "text_config": {"quantization_config": KINDS["fp8_modelopt"].config}})
    )
    inside = open_checkpoint(tmp_path / "inside")
    assert torch.equal(floats(inside).read(f"{NAME}.weight"), want)
    assert floats(inside).config == {"model_type": "outer", "text_config": {}}
    assert inside.config["text_config"]["quantization_config"]


def test_bitsandbytes_missing(tmp_path, monkeypatch):
    """Named with its install line when it is needed; the other commands (plan without weights, apply) do not need it."""
    pytest.importorskip("bitsandbytes")
    found, name, _ = view(tmp_path, "bnb_nf4", weight(16, 64))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r'pip install "expertsmith\[bnb\]"'):
        found.read(name)
