"""Measure a model: quality on held-out text, and against a reference. Knows nothing of pruning."""
