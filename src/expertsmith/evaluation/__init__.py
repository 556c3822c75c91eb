"""Measure a model: quality on held-out text, and compared with a reference. Independent of pruning."""
