"""A tiny Llama as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip


def write_gguf(file: Path, source: Path, leave_out: str = "") -> None:
    """Write a float32 GGUF file of a checkpoint, with a small byte-level tokenizer; query and key rows in llama.cpp's order."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    hidden, heads, kv, vocab = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    )
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + i) for i in range(93)] + ["!!"] + [f"<t{i}>" for i in range(vocab - 94)])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in load_file(source / "model.safetensors").items():
        value = tensor.numpy()
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        else:
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
            if rest.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                count = heads if "q_proj" in rest else kv
                value = value.reshape(count, 2, value.shape[0] // count // 2, hidden).swapaxes(1, 2).reshape(value.shape)
        if target != leave_out:
            writer.add_tensor(target, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
