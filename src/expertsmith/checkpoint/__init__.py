"""Safetensors checkpoints as bytes: read headers, read tensors, write shards. Independent of experts."""

from expertsmith.checkpoint.hub import pinned
from expertsmith.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint
from expertsmith.checkpoint.writer import OutputTensor, write_checkpoint

__all__ = ["Checkpoint", "OutputTensor", "TensorInfo", "open_checkpoint", "pinned", "write_checkpoint"]
