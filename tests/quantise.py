"""Writes quantised checkpoints for tests: the names, dtypes and config of published formats, with values that are really quantised.

Codes and scales come from the format's own library where there is one (compressed-tensors, bitsandbytes), else from a few lines here
that share nothing with the package's decoders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]  # what follows the module's name → tensor

# matrices of attention and experts; no routers, norms, embeddings, heads
LINEAR = r"(attn|attention)\..*(proj\w*|w\w*)\.weight$|experts?\.(\d+\.)?.*\.weight$"
FUSED = r"experts\.(\w+\.)?(gate_up_proj|down_proj|[wv]\d+(_weight)?|fc\d\.weight)$|(input|output)_linear\.weight$"
BLOCK = (16, 16)
FUSED_BLOCK = (8, 16)
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


@dataclass(frozen=True)
class Kind:
    """A format: a matrix [rows, columns] → tensors."""

    encode: Callable[[torch.Tensor], Parts]
    config: Mapping[str, Any]
    columns: int = 1  # have to be a multiple of this; a matrix where they are not stays as it is
    rows: int = 1
    ignore: str = "ignore"  # config key of the modules that stay
    files: Mapping[str, Any] = field(default_factory=dict)
    fused: Callable[[torch.Tensor], Parts] | None = None  # [experts, …] weights; None: they stay


def quantise_checkpoint(source: Path, target: Path, kind: str, pattern: str | None = None) -> None:
    """Rewrite a tiny float checkpoint in a format.

    Args:
        pattern: names of the weights to quantise; None: all matrices of attention and experts.
    """
    made = KINDS[kind]
    tensors, left = {}, []
    state: Parts = {}
    for file in sorted(source.glob("*.safetensors")):
        state |= load_file(file)
    for name, value in state.items():
        stem, wide = name.removesuffix(".weight"), value.shape[-1] % made.columns == 0 if value.dim() else False
        if value.dim() == 2 and name.endswith(".weight") and re.search(pattern or LINEAR, name) and not _router(name):
            if wide and value.shape[0] % made.rows == 0:
                tensors |= {stem + leaf: part.contiguous() for leaf, part in made.encode(value.float()).items()}
                continue
        elif value.dim() > 1 and made.fused is not None and re.search(pattern or FUSED, name):
            tensors |= {name + leaf: part.contiguous() for leaf, part in made.fused(value.float()).items()}
            continue
        if value.dim() == 2 and name.endswith(".weight") and "norm" not in name and "embed" not in name:
            left.append(stem)
        tensors[name] = value
    assert len(tensors) > len(state), f"{kind}: no weight was quantised"
    config = json.loads((source / "config.json").read_text())
    target.mkdir(parents=True)
    if made.config:
        config["quantization_config"] = {**made.config, made.ignore: left}
    for name, content in made.files.items():
        (target / name).write_text(json.dumps(content))
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _router(name: str) -> bool:
    return re.search(r"(router|\.gate\.|shared_expert_gate|expert_bias|classifier)", name) is not None


# ---------------------------------------------------------------------------------------------------------------------- FP8
def _blocks(w: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[rows, columns] → largest |w| of each block, [grid rows, grid columns]."""
    rows, columns = (-(-n // b) for n, b in zip(w.shape, block, strict=True))
    top = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            top[r, c] = w[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]].abs().max()
    return top


def _spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def _fp8(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_block(w: torch.Tensor, dtype: torch.dtype = torch.float32, block: tuple[int, int] = BLOCK) -> Parts:
    scale = (_blocks(w, block) / 448).clamp_min(1e-12)
    if dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.to(dtype)
    return {".weight": _fp8(w, _spread(scale.float(), block, w.shape)), ".weight_scale_inv": scale}


def _fused_blocks(w: torch.Tensor) -> Parts:
    """A grid of scales for each expert; where a weight of two axes has its experts below each other, blocks do not cross them."""
    made = [fp8_block(part, block=FUSED_BLOCK) for part in (w if w.dim() > 2 else [w])]
    stack: Callable[[list[torch.Tensor]], torch.Tensor] = torch.stack if w.dim() > 2 else torch.cat
    return {"": stack([m[".weight"] for m in made]), "_scale_inv": stack([m[".weight_scale_inv"] for m in made])}


def _fused_tensors(w: torch.Tensor) -> Parts:
    scale = w.abs().amax((1, 2), keepdim=True) / 448
    return {"": _fp8(w, scale), "_scale_inv": scale}


def fp8_channel(w: torch.Tensor) -> Parts:
    scale = (w.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    return {".weight": _fp8(w, scale.float()), ".weight_scale": scale}


def fp8_tensor(w: torch.Tensor) -> Parts:
    scale = (w.abs().max() / 448).reshape(1)
    return {".weight": _fp8(w, scale), ".weight_scale": scale.clone(), ".input_scale": torch.tensor([0.01])}


def fp8_modelopt(w: torch.Tensor) -> Parts:
    scale = w.abs().max() / 448
    return {".weight": _fp8(w, scale), ".weight_scale": scale.clone(), ".input_scale": torch.tensor(0.01)}


def mxfp8(w: torch.Tensor) -> Parts:
    exponent = torch.ceil(torch.log2(w.reshape(len(w), -1, 32).abs().amax(-1) / 448)).clamp(-127, 127)
    return {
        ".weight": _fp8(w, torch.exp2(exponent).repeat_interleave(32, 1)),
        ".weight_scale": (exponent + 127).to(torch.uint8),
    }


# ------------------------------------------------------------------------------------------------------- compressed-tensors
def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """quantization_config of compressed-tensors."""
    weights = {"symmetric": True, "dynamic": False, "observer": "minmax", **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


def library(form: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The compressor of compressed-tensors for a format, and the scheme that a config describes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    said = config["config_groups"]["group_0"]["weights"]
    args = QuantizationArgs(**{key: value for key, value in said.items() if key not in ("observer", "actorder")})
    return BaseCompressor.get_value_from_registry(form), QuantizationScheme(targets=["Linear"], weights=args)


def _integers(form: str, config: Mapping[str, Any], w: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> Parts:
    said = config["config_groups"]["group_0"]["weights"]
    bits, size = said["num_bits"], said.get("group_size") or w.shape[1]
    groups = w.reshape(len(w), -1, size)
    state: Parts = {"weight": w}
    if said["symmetric"]:
        state["weight_scale"] = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).to(scale_dtype)
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        state["weight_scale"] = (high - low) / (2**bits - 1)
        zero = -(2 ** (bits - 1)) - (low / state["weight_scale"]).round()
        state["weight_zero_point"] = zero.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    compressor, scheme = library(form, config)
    return {f".{leaf}": part for leaf, part in compressor.compress(state, scheme).items()}


def _ordered(w: torch.Tensor) -> Parts:
    """actorder "group": column c belongs to group g_idx[c]."""
    config = INT4
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(w.shape[1])) // 8
    columns = order.argsort(stable=True)  # columns of group 0, then of group 1, …
    parts = _integers("pack-quantized", config, w[:, columns])
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = unpack_from_int32(parts[".weight_packed"], 4, w.shape)
    back = torch.empty_like(codes)
    back[:, columns] = codes
    return {**parts, ".weight_packed": pack_to_int32(back, 4), ".weight_g_idx": order.to(torch.int32)}


INT4 = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8)
INT4_CHANNEL = compressed("pack-quantized", num_bits=4, type="int", strategy="channel")
INT4_ASYMMETRIC = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8, symmetric=False)
INT4_ORDERED = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8, actorder="group")
INT8 = compressed("pack-quantized", num_bits=8, type="int", strategy="channel")
INT8_BYTES = compressed("int-quantized", num_bits=8, type="int", strategy="channel")
FP8_CHANNEL = compressed("float-quantized", num_bits=8, type="float", strategy="channel")
FP8_TENSOR = compressed("float-quantized", num_bits=8, type="float", strategy="tensor")
MXFP8 = compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
NVFP4 = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
MXFP4 = compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")


def nvfp4(w: torch.Tensor) -> Parts:
    """Groups of 16; the global scale divides."""
    top = 448 * 6 / w.abs().max()
    scale = (w.reshape(len(w), -1, 16).abs().amax(-1) / 6 * top).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    compressor, scheme = library("nvfp4-pack-quantized", NVFP4)
    state = {"weight": w, "weight_scale": scale.float(), "weight_global_scale": top.reshape(1)}
    made = compressor.compress(state, scheme)
    return {f".{leaf}": part for leaf, part in made.items()} | {".input_global_scale": torch.tensor([100.0])}


def nvfp4_modelopt(w: torch.Tensor) -> Parts:
    """The same, under modelopt's names: the second scale multiplies."""
    made = nvfp4(w)
    return {
        ".weight": made[".weight_packed"],
        ".weight_scale": made[".weight_scale"],
        ".weight_scale_2": 1 / made[".weight_global_scale"][0],
        ".input_scale": torch.tensor(0.001),
    }


def mxfp4_packed(w: torch.Tensor) -> Parts:
    scale = torch.exp2(torch.floor(torch.log2(w.reshape(len(w), -1, 32).abs().amax(-1))) - 2)
    compressor, scheme = library("mxfp4-pack-quantized", MXFP4)
    return {f".{leaf}": part for leaf, part in compressor.compress({"weight": w, "weight_scale": scale}, scheme).items()}


def mxfp4_blocks(w: torch.Tensor) -> Parts:
    """gpt-oss: a float weight [experts, inputs, outputs] is stored as [experts, outputs, inputs / 32, 16 bytes]."""
    experts, inputs, outputs = w.shape
    made = [mxfp4_packed(part.T.contiguous()) for part in w]
    return {
        "_blocks": torch.stack([m[".weight_packed"] for m in made]).reshape(experts, outputs, inputs // 32, 16),
        "_scales": torch.stack([m[".weight_scale"] for m in made]),
    }


# ------------------------------------------------------------------------------------------------------------- GPTQ and AWQ
def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] codes → [n · bits / 32, m] int32, the first code in the lowest bits: the bits of a column are one long number."""
    made = []
    for column in codes.T.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(column))
        made.append([number >> (32 * word) & 0xFFFFFFFF for word in range(len(column) * bits // 32)])
    return torch.tensor(made, dtype=torch.int64).T.to(torch.uint32).view(torch.int32)


def grid(w: torch.Tensor, bits: int, size: int, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric codes [inputs, outputs], scales and zero points [groups, outputs]."""
    del size
    groups = int(order.max()) + 1
    scale, zero = torch.empty(groups, len(w)), torch.empty(groups, len(w))
    for group in range(groups):
        part = w[:, order == group]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        scale[group] = ((high - low) / (2**bits - 1)).half().float()
        zero[group] = (-low / scale[group]).round().clamp(1, 2**bits - 1)
    codes = (w.T / scale[order] + zero[order]).round().clamp(0, 2**bits - 1)
    return codes.int(), scale, zero.int()


def gptq(w: torch.Tensor, bits: int = 4, size: int = 8, version: int = 1, ordered: bool = False) -> Parts:
    inputs = w.shape[1]
    order = torch.arange(inputs) // size
    if ordered:
        order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    codes, scale, zero = grid(w, bits, size, order)
    return {
        ".qweight": words(codes, bits),
        ".qzeros": words((zero - (1 if version == 1 else 0)).T, bits).T,
        ".scales": scale.half(),
        ".g_idx": order.to(torch.int32),
    }


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(w: torch.Tensor, size: int = 8) -> Parts:
    def pack(codes: torch.Tensor) -> torch.Tensor:  # [n, outputs] → [n, outputs / 8]
        return words(codes.reshape(len(codes), -1, 8)[..., AWQ_ORDER].reshape(len(codes), -1).T, 4).T

    codes, scale, zero = grid(w, 4, size, torch.arange(w.shape[1]) // size)
    return {".qweight": pack(codes), ".qzeros": pack(zero), ".scales": scale.half()}


def _gptq(bits: int = 4, size: int = 8, version: int = 1, ordered: bool = False) -> Kind:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": ordered,
        "sym": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "lm_head": False,
    }
    several = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    return Kind(lambda w: gptq(w, bits, size, version, ordered), config, several, several, "modules_to_not_convert")


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}
AUTOROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 8,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
}


# ------------------------------------------------------------------------------------------------------------- bitsandbytes
def bnb_four(w: torch.Tensor, kind: str = "nf4", nested: bool = True) -> Parts:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(w.bfloat16(), blocksize=64, compress_statistics=nested, quant_type=kind)
    return {".weight": codes} | {f".weight.{leaf}": part for leaf, part in state.as_dict(packed=True).items()}


def bnb_eight(w: torch.Tensor) -> Parts:
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, scale, _ = int8_vectorwise_quant(w.half())
    return {".weight": codes, ".SCB": scale, ".weight_format": torch.tensor(0, dtype=torch.uint8)}


BNB = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
MODELOPT = {"producer": {"name": "modelopt", "version": "0.33.0"}}


def _modelopt(encode: Callable[[torch.Tensor], Parts], algo: str, columns: int = 1) -> Kind:
    file = {**MODELOPT, "quantization": {"quant_algo": algo, "kv_cache_quant_algo": None}}
    return Kind(
        encode, {"quant_method": "modelopt", "quant_algo": algo, **MODELOPT}, columns, files={"hf_quant_config.json": file}
    )


KINDS: dict[str, Kind] = {
    "fp8_block": Kind(fp8_block, BLOCKS, ignore="modules_to_not_convert"),
    "fp8_block_bf16_scales": Kind(lambda w: fp8_block(w, torch.bfloat16), BLOCKS, ignore="modules_to_not_convert"),
    "fp8_block_ue8m0": Kind(
        lambda w: fp8_block(w, torch.float8_e8m0fnu), {**BLOCKS, "scale_fmt": "ue8m0"}, ignore="modules_to_not_convert"
    ),
    "fp8_block_128": Kind(
        lambda w: fp8_block(w, block=(128, 128)), {**BLOCKS, "weight_block_size": [128, 128]}, ignore="modules_to_not_convert"
    ),
    "fp8_channel": Kind(fp8_channel, FP8_CHANNEL),
    "fp8_tensor": Kind(fp8_tensor, FP8_TENSOR),
    "fp8_modelopt": _modelopt(fp8_modelopt, "FP8"),
    "fp8_fused": Kind(
        lambda w: fp8_block(w, block=FUSED_BLOCK),
        {**BLOCKS, "weight_block_size": list(FUSED_BLOCK)},
        ignore="modules_to_not_convert",
        fused=_fused_blocks,
    ),
    "fp8_fused_tensor": Kind(fp8_block, BLOCKS, ignore="modules_to_not_convert", fused=_fused_tensors),
    "mxfp8": Kind(mxfp8, MXFP8, 32),
    "int4": Kind(lambda w: _integers("pack-quantized", INT4, w), INT4, 8),
    "int4_channel": Kind(lambda w: _integers("pack-quantized", INT4_CHANNEL, w, torch.bfloat16), INT4_CHANNEL),
    "int4_asymmetric": Kind(lambda w: _integers("pack-quantized", INT4_ASYMMETRIC, w), INT4_ASYMMETRIC, 8, 8),
    "int4_actorder": Kind(_ordered, INT4_ORDERED, 8),
    "int8_packed": Kind(lambda w: _integers("pack-quantized", INT8, w), INT8),
    "int8_bytes": Kind(lambda w: _integers("int-quantized", INT8_BYTES, w), INT8_BYTES),
    "nvfp4": Kind(nvfp4, NVFP4, 16),
    "nvfp4_modelopt": _modelopt(nvfp4_modelopt, "NVFP4", 16),
    "mxfp4": Kind(mxfp4_packed, {"quant_method": "mxfp4"}, 10**9, ignore="modules_to_not_convert", fused=mxfp4_blocks),
    "mxfp4_packed": Kind(mxfp4_packed, MXFP4, 32),
    "gptq": _gptq(),
    "gptq_2": _gptq(2, 16),
    "gptq_3": _gptq(3, 32),
    "gptq_8": _gptq(8),
    "gptq_v2": _gptq(version=2),
    "gptq_order": _gptq(ordered=True),
    "awq": Kind(awq, AWQ, 8, 8, "modules_to_not_convert"),
    "autoround": Kind(gptq, AUTOROUND, 8, 8, "modules_to_not_convert"),
    "bnb_nf4": Kind(bnb_four, {**BNB, "load_in_4bit": True}, 2, ignore="llm_int8_skip_modules"),
    "bnb_int8": Kind(bnb_eight, {**BNB, "load_in_8bit": True}, ignore="llm_int8_skip_modules"),
}

# widths that every format's groups divide
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32, "intermediate_size": 64, "head_dim": 16},
    "deepseek_v3": {"moe_intermediate_size": 32, "intermediate_size": 64},
    "glm4_moe": {"moe_intermediate_size": 32, "intermediate_size": 64},
    "mixtral": {"intermediate_size": 32},
    "gpt_oss": {"intermediate_size": 32},
}
