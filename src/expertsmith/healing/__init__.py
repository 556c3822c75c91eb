"""Recover a compressed model towards the model it came from. Knows nothing of the method that chose the experts."""
