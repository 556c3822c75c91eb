"""Every decoder against its library or a written-out formula, and its inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantise
from expertsmith.checkpoint.floats import floats
from expertsmith.checkpoint.formats import formats
from expertsmith.checkpoint.formats.base import E2M1, e2m1, pack, to_e2m1, unpack
from one_weight import NAME, shape_of, store, view, weight
from quantise import KINDS, library

BLOCKS = quantise.BLOCKS
PACKED_BITS = range(1, 9)
pytest.importorskip("compressed_tensors")


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
