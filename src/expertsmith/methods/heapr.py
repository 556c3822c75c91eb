"""HEAPr: neurons of experts pruned by a second-order estimate of the loss (Li et al., arXiv 2509.22299, ICLR 2026).

Notation: X_j are the tokens routed to expert j, N_j their number, T all tokens; h_c(t) is the hidden activation of neuron c of an expert, L the
sum of the next-token losses. Removing neuron c changes the expert's output by -W_d[:, c] h_c.
"""

from __future__ import annotations

from typing import Literal

from expertsmith.calibration.stats import LayerStatistics
from expertsmith.methods.base import Array, Facts, mean, method
from expertsmith.methods.neurons import cut


@method(
    "heapr",
    "Neurons of experts by second-order loss",
    "arXiv 2509.22299 (ICLR 2026)",
    gives="neurons",
    averages=True,
    neurons=True,
    cut=cut,
    cost="one calibration pass forwards and backwards, about three times a usual one",
    budgets=("uniform",),
    limits="Not for quantised checkpoints. Only width=model gives a stock checkpoint; width=layer and width=ragged need expertsmith's loader.",
)
def heapr(
    statistics: LayerStatistics,
    facts: Facts,
    *,
    form: Literal["product", "exact"] = "product",
    weight: Literal["token", "frequency"] = "token",
) -> Array:
    """A neuron's saliency: an estimate of how much the loss rises without it. All experts stay; each loses its least salient neurons.

    form=product is the paper's: s_c = 1/2 mean(h_c^2) W_d[:, c]^T G_j W_d[:, c], G_j = mean(u u^T), u = dL/df_j(t), means over X_j. Since W_d[:, c]^T u =
    dL/dh_c, the quadratic form is mean((dL/dh_c)^2), and no d x d matrix is needed. form=exact keeps the correlation of both factors:
    s_c = 1/2 mean((h_c dL/dh_c)^2). weight=frequency multiplies by N_j / T, so that rare experts weigh less; with width=model it changes nothing,
    because neurons then compete within their expert only.
    -1 for every neuron of an expert without tokens, as in the paper; which of them stay is then decided by their weights.

    width=model: every expert keeps the same number of neurons, the share `keep` of them; each the best of its own. width=layer and
    width=ragged rank all neurons of the model together, as the paper does, and then round: one number a layer, or one an expert. multiple:
    numbers are rounded to multiples of it, itself a multiple of 8 (0: the largest power of two from 8 to 64 that divides the width and is at most an eighth of it, or 8).

    Deviations from the paper: widths are equal and rounded by default; no expert loses all neurons (it could still be selected). L is the sum of the
    losses, not their mean, which scales all saliencies alike.
    """
    tokens = statistics.total("selections")
    each = tokens[:, None]
    if form == "exact":
        found = mean(statistics.total("neuron_product_sq_sum"), each)
    else:
        found = mean(statistics.total("neuron_sq_sum"), each) * mean(statistics.total("neuron_grad_sq_sum"), each)
    if weight == "frequency":
        found = found * each / statistics.total("tokens")
    found = found / 2
    found[tokens == 0] = -1.0
    return found
