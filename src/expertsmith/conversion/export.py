"""Write splits as a stock Mixture-of-Experts checkpoint. MLP tensors are computed from the dense ones, all others are copied byte for byte.

Every selected expert must have weight 1, however the architecture uses the router's logits (card MoEfication, "gate-weight recipes"):

    top_k = E                     router 0, down_proj * E: every routing weight is exactly 1/E (or 1/k of k, the same)
    top_k = 1, renormalised       nothing: the weight is exactly 1 (qwen2_moe: router * a large power of two, so that the softmax itself is
                                  1 except for ties: its llama.cpp graph never renormalises)
    top_k > 1, renormalised       flatten: router * epsilon, down_proj * k; weights 1/k up to epsilon * (spread of the logits)
    top_k > 1, qwen2_moe          flatten, down_proj * E, renormalisation off, as in llama.cpp

Qwen2-MoE multiplies its always-on part by sigmoid(w x). So w is tiny instead of zero (llama.cpp divides by w x), and the part's down_proj
is doubled. If the architecture has no always-on part, that part is copied into every expert, with down_proj divided by k.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from expertsmith.arch.dense import DROPS, Target
from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.writer import Made, OutputTensor, Piece, write_checkpoint
from expertsmith.conversion.attention import Heads
from expertsmith.conversion.split import Split
from expertsmith.engine.heads import KEY
from expertsmith.errors import UserError

# Epsilon times the standard deviation of the logits. Weights differ from 1/k by about that much. A top_k of probabilities can have ties:
# near 1/E they are 2^-24 apart in float32, so a smaller epsilon makes more ties (8 experts, top 4: 7 in 100 000 choices at 2^-10, 3 in
# 10 000 at 2^-12). A top_k of logits has no ties in transformers, but vLLM and llama.cpp use probabilities there too.
FLAT = {"probabilities": 2.0**-10, "logits": 2.0**-12}
CERTAIN = 2.0**14  # spread of logits at which a softmax is 0 or 1, except for ties
TINY = 2.0**-24  # entries of the gate of an always-on part
ALIGN = 64  # of widths: grouped matrix products need rows of a multiple of 16 bytes, and GPU kernels prefer whole tiles
LEAST_ALIGN = 8  # for widths below ALIGN


@dataclass(frozen=True)
class Shape:
    """The sizes that all layers of the output have in common."""

    experts: int
    top_k: int
    width: int  # of a routed expert, with padding
    shared: int  # width of the always-on part, with padding
    folded: bool = False  # the always-on part is copied into every expert


def align_up(width: int) -> int:
    """The next multiple of 64, or of 8 for widths below that."""
    step = ALIGN if width >= ALIGN else LEAST_ALIGN
    return -(-width // step) * step


def shape_of(splits: Sequence[Split], target: Target) -> Shape:
    """The widths of the output: the largest over all layers, since a stock config holds one number; rounded up to 64s (or 8s)."""
    shared = max(len(split.shared) for split in splits)
    folded = bool(shared) and target.shared_key is None
    width = max(split.width + (len(split.shared) if folded else 0) for split in splits)
    least = LEAST_ALIGN if target.shared_always else 0
    equal = all(len(ids) % LEAST_ALIGN == 0 for split in splits for ids in split.experts)  # equal widths need no padding
    padded = width if equal and not folded and all(split.width == width for split in splits) else align_up(width)
    return Shape(len(splits[0].experts), splits[0].top_k, padded, 0 if folded else max(least, _align_shared(shared)), folded)


def _align_shared(width: int) -> int:
    return -(-width // LEAST_ALIGN) * LEAST_ALIGN


@dataclass(frozen=True)
class Scales:
    """Factors that give every chosen expert weight 1."""

    router: float  # 0: the rows are zeroed
    down: float
    shared: float
    renormalise: bool


def scales_of(target: Target, shape: Shape, logit_std: float) -> Scales:
    """The factors by the table above. `logit_std`: standard deviation of the layer's router logits on calibration text."""
    shared = 2.0 if target.shared_gate else 1.0
    optional = target.renormalise_key is not None
    if shape.top_k == shape.experts and shape.experts > 1:
        return Scales(0.0, float(shape.experts), shared, True)
    if shape.top_k == 1:
        certain = 2.0 ** round(math.log2(CERTAIN / logit_std)) if target.shared_gate and logit_std > 0 else 1.0
        return Scales(certain, 1.0, shared, True)
    flat = 2.0 ** round(math.log2(FLAT[target.selects_on] / logit_std)) if logit_std > 0 else 1.0
    if optional and target.shared_gate:
        return Scales(flat, float(shape.experts), shared, False)
    return Scales(flat, float(shape.top_k), shared, True)


def output_config(source: Mapping[str, Any], target: Target, shape: Shape, renormalise: bool) -> dict[str, Any]:
    """config.json of the output: the source's keys that the target also has, and the target's own keys."""
    config = {key: value for key, value in source.items() if key not in (*DROPS, *target.drops)}
    config |= {"model_type": target.model_type, "architectures": [target.architecture], **target.constants}
    config |= {target.experts_key: shape.experts, "num_experts_per_tok": shape.top_k, target.width_key: shape.width}
    if target.shared_key:
        config[target.shared_key] = shape.shared
    if target.renormalise_key:
        config[target.renormalise_key] = renormalise
    heads, head = int(source["num_attention_heads"]), head_width(source)
    if target.scale_key:
        config[target.scale_key] = head**-0.5
    if target.head_key:
        config[target.head_key] = head
    elif head * heads != source["hidden_size"]:
        raise UserError(
            f"its heads have size {head}, but a {target.model_type} model takes hidden_size / num_attention_heads",
            "no other target supports it",
        )
    config.setdefault("num_key_value_heads", heads)
    for key, value in target.defaults.items():
        config.setdefault(key, value)
    return config


Make = Callable[[], torch.Tensor]


class Writer:
    """Makes the tensors of converted MLPs and pruned attentions, one at a time, from the dense checkpoint."""

    def __init__(
        self,
        source: Checkpoint,
        target: Target,
        splits: Sequence[Split],
        logit_std: Sequence[float],
        shape: Shape,
        heads: Sequence[Heads] = (),
    ) -> None:
        self.source, self.target, self.splits, self.shape, self.heads = source, target, splits, shape, heads
        self.scales = [scales_of(target, shape, std) for std in logit_std]

    def tensors(self) -> list[OutputTensor]:
        """Every tensor of the output, in the source's order; a layer's new tensors are in the place of its first MLP tensor."""
        made: list[OutputTensor] = []
        done: set[int] = set()
        for name, info in self.source.tensors.items():
            layer = _mlp_layer(name)
            if layer is None and self.heads and _query_key(name) is not None:
                made.append(self._fewer_rows(name))
            elif layer is None:
                made.append(OutputTensor(name, info.dtype, info.shape, (Piece(info.file, info.start, info.nbytes),)))
            elif layer not in done:
                done.add(layer)
                made += self._layer(layer)
        for layer, heads in enumerate(self.heads):
            dtype = self.source.tensors[_name(layer, "gate")].dtype
            for name, tensor in (heads.parts or {}).items():
                size = tensor.numel() * _bytes(dtype)
                encode = partial(_encoded, tensor, dtype)
                made.append(
                    OutputTensor(f"model.layers.{layer}.self_attn.{name}", dtype, tuple(tensor.shape), (Made(size, encode),))
                )
        if len(done) != len(self.splits):
            raise UserError(f"{self.source.source} has MLPs in {len(done)} layers, but {len(self.splits)} were converted")
        return made

    def _fewer_rows(self, name: str) -> OutputTensor:
        """A query or key tensor (weight, bias, norm) with only the rows of the kept dimensions, head by head."""
        info, layer = self.source.tensors[name], _query_key(name)
        assert layer is not None
        if info.dtype not in TORCH:
            raise UserError(f"{name} is {info.dtype}: quantised attention cannot be pruned", "use an unquantised checkpoint")
        width = head_width(self.source.config)
        kept = self.heads[layer].kept
        heads = info.shape[0] // width
        rows = (torch.arange(heads)[:, None] * width + kept).flatten()
        shape = (len(rows), *info.shape[1:])
        made = Made(math.prod(shape) * _bytes(info.dtype), lambda: _encoded(self.source.read(name)[rows], info.dtype))
        return OutputTensor(name, info.dtype, shape, (made,))

    def _layer(self, layer: int) -> list[OutputTensor]:
        split, shape, scales = self.splits[layer], self.shape, self.scales[layer]
        hidden = self.source.tensors[_name(layer, "gate")].shape[1]
        dtype = self.source.tensors[_name(layer, "gate")].dtype
        base = f"model.layers.{layer}."

        def tensor(name: str, rows: tuple[int, ...], make: Make, kind: str = dtype) -> OutputTensor:
            size = math.prod(rows) * _bytes(kind)
            return OutputTensor(base + name, kind, rows, (Made(size, lambda: _encoded(make(), kind)),))

        router = partial(self._router, split, scales)
        part = partial(self._projection, layer)
        w, s, e = shape.width, shape.shared, shape.experts
        if self.target.layout == "granite":
            ups = ("gate", "up")
            made = [
                tensor("block_sparse_moe.router.layer.weight", (e, hidden), router, "F32"),
                tensor(
                    "block_sparse_moe.input_linear.weight",
                    (e, 2 * w, hidden),
                    lambda: torch.stack([torch.cat([part(r, i) for r in ups]) for i in range(e)]),
                ),
                tensor(
                    "block_sparse_moe.output_linear.weight",
                    (e, hidden, w),
                    lambda: torch.stack([part("down", i) for i in range(e)]),
                ),
            ]
            if s:
                made += [
                    tensor("shared_mlp.input_linear.weight", (2 * s, hidden), lambda: torch.cat([part(r, None) for r in ups])),
                    tensor("shared_mlp.output_linear.weight", (hidden, s), lambda: part("down", None)),
                ]
            return made
        block, names = (
            ("block_sparse_moe", ("w1", "w3", "w2"))
            if self.target.layout == "mixtral"
            else ("mlp", ("gate_proj", "up_proj", "down_proj"))
        )
        made = [tensor(f"{block}.gate.weight", (e, hidden), router, "F32")]
        for i in range(e):
            for role, leaf in zip(("gate", "up", "down"), names, strict=True):
                rows = (hidden, w) if role == "down" else (w, hidden)
                made.append(tensor(f"{block}.experts.{i}.{leaf}.weight", rows, partial(part, role, i)))
        if self.target.shared_key:
            for role, leaf in zip(("gate", "up", "down"), names, strict=True):
                rows = (hidden, s) if role == "down" else (s, hidden)
                made.append(tensor(f"{block}.shared_expert.{leaf}.weight", rows, partial(part, role, None)))
            made.append(tensor(f"{block}.shared_expert_gate.weight", (1, hidden), partial(_tiny_gate, hidden)))
        return made

    def _router(self, split: Split, scales: Scales) -> torch.Tensor:
        return split.router.float() * scales.router

    def _projection(self, layer: int, role: str, expert: int | None) -> torch.Tensor:
        """Rows of gate or up, or columns of down, of one expert or (None) the always-on part, padded with zeros to the common width."""
        split, shape, scales = self.splits[layer], self.shape, self.scales[layer]
        dense = self.source.read(_name(layer, role))
        if role == "down":
            dense = dense.T
        width, pieces = (
            (shape.shared, [(split.shared, scales.shared)])
            if expert is None
            else (shape.width, [(split.experts[expert], scales.down)])
        )
        if expert is not None and shape.folded:
            pieces = [(split.shared, scales.down / shape.top_k), *pieces]
        made = dense.new_zeros(width, dense.shape[1])
        row = 0
        for ids, factor in pieces:
            rows = dense[ids]
            made[row : row + len(ids)] = (rows.float() * factor).to(rows.dtype) if role == "down" and factor != 1 else rows
            row += len(ids)
        return made.T if role == "down" else made


def _tiny_gate(hidden: int) -> torch.Tensor:
    signs = torch.randint(0, 2, (1, hidden), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * TINY


def _name(layer: int, role: str) -> str:
    return f"model.layers.{layer}.mlp.{role}_proj.weight"


def _query_key(name: str) -> int | None:
    """The layer of a tensor with one row per query or key dimension; None for other tensors."""
    parts = name.split(".")
    if (
        len(parts) == 6
        and parts[:2] == ["model", "layers"]
        and parts[3] == "self_attn"
        and parts[4] in ("q_proj", "k_proj", "q_norm", "k_norm")
    ):
        return int(parts[2])
    return None


def head_width(config: Mapping[str, Any]) -> int:
    """The width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _mlp_layer(name: str) -> int | None:
    parts = name.split(".")
    if (
        len(parts) == 6
        and parts[:2] == ["model", "layers"]
        and parts[3] == "mlp"
        and parts[4] in ("gate_proj", "up_proj", "down_proj")
    ):
        return int(parts[2])
    return None


TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _bytes(kind: str) -> int:
    return TORCH[kind].itemsize


def _encoded(tensor: torch.Tensor, kind: str) -> memoryview:
    flat = tensor.to(TORCH[kind]).contiguous().reshape(-1)
    if not bool(torch.isfinite(flat.float()).all()):
        raise UserError("a converted tensor has NaN or inf, or its scale is too large for the checkpoint's dtype")
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def check_source(source: Checkpoint, layers: int) -> None:
    """Refuse MLP tensors that no target supports.

    Raises:
        UserError: a quantised MLP, an MLP without gate, up and down matrices, or a missing matrix.
    """
    for layer in range(layers):
        for role in ("gate", "up", "down"):
            info = source.tensors.get(_name(layer, role))
            if info is None:
                raise UserError(f"{source.source} has no tensor {_name(layer, role)}", "use a complete dense checkpoint")
            if info.dtype not in TORCH:
                raise UserError(
                    f"{info.name} is {info.dtype}: a quantised MLP cannot be split",
                    "use an unquantised checkpoint, or --gguf-file for GGUF",
                )


def attention_sizes(source: Checkpoint, heads: Sequence[Heads], layers: int) -> dict[str, Any]:
    """What pruning attention saves and what it does not: written parameters, parameters that the paper counts as active (a value mask
    counts by its width), and a note on the arithmetic that is really saved."""
    width = head_width(source.config)
    before = sum(info.numel for name, info in source.tensors.items() if ".self_attn." in name)
    if not heads:
        return {"before": before, "written": before, "counted_active": before}
    gone = masked = 0
    for name, info in source.tensors.items():
        layer = _query_key(name)
        if layer is not None:
            gone += info.numel * (width - len(heads[layer].kept)) // width
    for layer, entry in enumerate(heads):
        values = (source.tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"].numel for part in "vo")
        masked += sum(values) * (width - (entry.value_width or width)) // width
    added = sum(tensor.numel() for entry in heads for tensor in (entry.parts or {}).values())
    return {
        "before": before,
        "written": before - gone + added,
        "counted_active": before - gone - masked,
        "query_key_width": [len(entry.kept) for entry in heads],
        "value_width": [entry.value_width for entry in heads],
        "note": f"queries and keys are {100 * gone / before:.1f} % smaller in parameters and arithmetic"
        + (
            f"; value masks count {100 * masked / before:.1f} % as inactive, but save neither parameters nor arithmetic (values and outputs are computed in "
            f"full and multiplied by 0 or 1), and add {100 * added / before:.1f} %"
            if masked or added
            else ""
        ),
    }


def sizes(source: Checkpoint, splits: Sequence[Split], target: Target, heads: Sequence[Heads] = ()) -> dict[str, Any]:
    """The exact parameter counts of the output: by part, per token and in total.

    active: parameters read in a token's forward, with padding; padding: the zeros among them; `mlp_ratio` and `block_ratio` (attention and
    MLP): shares of the dense model's parameters, with routers and padding; `*_useful` count only neurons, and value dimensions that a token
    keeps.
    """
    shape = shape_of(splits, target)
    neurons, hidden = source.tensors[_name(0, "gate")].shape
    layers = len(splits)
    attention = attention_sizes(source, heads, layers)
    dense_mlp = 3 * neurons * hidden * layers
    other = source.numel - dense_mlp - attention["before"]
    router = (shape.experts + (1 if target.shared_gate else 0)) * hidden * layers
    routed, shared = 3 * hidden * shape.width * layers, 3 * hidden * shape.shared * layers
    useful = [shape.top_k * max(len(ids) for ids in split.experts) + len(split.shared) for split in splits]
    copies = (shape.top_k - 1) if shape.folded else 0  # of the always-on part, one per chosen expert
    read = [count + copies * len(split.shared) for count, split in zip(useful, splits, strict=True)]
    active_mlp = shape.top_k * routed + shared
    rest, block = other + attention["written"], attention["before"] + dense_mlp
    total = rest + shape.experts * routed + shared + router
    return {
        "experts": shape.experts,
        "top_k": shape.top_k,
        "expert_width": shape.width,
        "shared_width": shape.shared,
        "shared_copied_into_experts": shape.folded,
        "neurons": neurons,
        "dense": {"total": source.numel, "mlp": dense_mlp, "attention": attention["before"], "other": other},
        "attention": attention,
        "total": total,
        "active": {
            "total": rest + active_mlp + router,
            "experts": shape.top_k * routed,
            "shared": shared,
            "router": router,
            "padding": active_mlp - 3 * hidden * sum(read),
        },
        "mlp_ratio": (active_mlp + router) / dense_mlp,
        "mlp_ratio_useful": sum(useful) / (neurons * layers),
        "block_ratio": (attention["written"] + active_mlp + router) / block,
        "block_ratio_useful": (attention["counted_active"] + 3 * hidden * sum(useful)) / block,
        "total_ratio": total / source.numel,
    }


def write(
    out: Path,
    source: Checkpoint,
    target: Target,
    splits: Sequence[Split],
    logit_std: Sequence[float],
    texts: Mapping[str, str],
    *,
    heads: Sequence[Heads] = (),
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint; returns its config. With `heads`, also write the module that plain transformers needs for pruned attention."""
    shape = shape_of(splits, target)
    writer = Writer(source, target, splits, logit_std, shape, heads)
    config = output_config(source.config, target, shape, all(scales.renormalise for scales in writer.scales))
    files = dict(texts)
    if heads:
        import transformers

        from expertsmith.engine.uneven import SHIM, auto_map, shim_of

        kept = [entry.kept.tolist() for entry in heads]
        config[KEY] = {"query_key": kept, "value_width": [entry.value_width for entry in heads]}
        theirs = transformers.CONFIG_MAPPING[target.model_type](**config)
        config["auto_map"] = auto_map(theirs)
        files[SHIM] = shim_of(theirs, uneven=False, novices=False, narrow=False)
    write_checkpoint(out, writer.tensors(), config, source=source, texts=files, overwrite=overwrite, progress=progress)
    return config


def record_of(splits: Sequence[Split]) -> str:
    """The neuron ids of every layer as JSON: which neuron went to which expert."""
    rows = [
        {"layer": i, "shared": s.shared.tolist(), "experts": [ids.tolist() for ids in s.experts]} for i, s in enumerate(splits)
    ]
    return json.dumps({"format": "expertsmith.splits", "version": 1, "layers": rows})
