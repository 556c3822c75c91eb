"""The experts of a checkpoint: router requirements, the role of each tensor, one expert's matrices."""
