"""AIMER: calibration-free scores from the weights alone (Liu et al., arXiv 2603.18492)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from expertsmith.experts.weights import ExpertWeights
from expertsmith.methods.base import Array, Facts, every, method


@method(
    "aimer",
    "Peakiness of the weights, without data",
    "arXiv 2603.18492",
    reads="weights",
    limits="Ignores the domain; near chance on briefly trained models.",
)
def aimer(weights: Iterable[ExpertWeights], facts: Facts) -> Array:
    """Saliency -P / sqrt(M Q), with P = sum |w| and Q = sum w^2 over all M entries w of the expert's matrices together. Data-free.

    The paper's score P / sqrt(M Q) = mean|w| / RMS(w) lies in [1 / sqrt(M), 1] and HIGHER IS PRUNED, hence the sign: flat weights
    are removed, peaky ones are kept. An all-zero expert has score 0 and is pruned last, as in the authors' code. Sums are in float64
    (theirs: float32).
    """

    def score(entry: ExpertWeights) -> float:
        p = sum(float(np.abs(m).sum(dtype=np.float64)) for m in entry.matrices)
        q = sum(float(np.einsum("i,i->", m.reshape(-1), m.reshape(-1), dtype=np.float64)) for m in entry.matrices)
        count = sum(m.size for m in entry.matrices)
        return -p / math.sqrt(count * q) if q > 0 else 0.0

    return every(weights, score, facts.num_experts)
