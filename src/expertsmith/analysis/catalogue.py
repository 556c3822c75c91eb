"""Unit and definition of every measure in `measures.json`. Symbols: E experts of a layer, T tokens, g routing weight, f raw output."""

from __future__ import annotations

COSINE = "cosine, -1 to 1"
SHARE = "share, 0 to 1"
PAPER = "arXiv 2406.18219"

STATIC = {
    "router_cosine": (COSINE, f"[E, E] between the experts' rows of the router ({PAPER}, gate embeddings)"),
    "router_norm": ("weight units", "[E] Euclidean norms of the router's rows"),
    "router_similarity": (COSINE, "mean of router_cosine over pairs"),
    "projections.*.norm": ("weight units", "[E] Frobenius norm of the expert's matrix"),
    "projections.*.matrix_cosine": (COSINE, f"between whole matrices, flattened ({PAPER}); members in matrix_members"),
    "projections.*.matrix_similarity": (COSINE, "mean of matrix_cosine over pairs of routed experts, without copies"),
    "projections.*.neuron_cosine": (
        COSINE,
        f"between mean neurons, independent of their order ({PAPER}); members in neuron_members: routed experts, then shared and dense FFN",
    ),
    "projections.*.neuron_similarity": (COSINE, "mean of neuron_cosine over pairs of routed experts, without copies"),
    "projections.*.copies": ("pairs", "pairs of experts whose matrices have a cosine of 1 (to 1e-6)"),
    "projections.*.zero_experts": ("experts", "experts whose matrix is all zeros"),
    "projections.*.pca": (
        "standard deviations",
        "[E, 2] first two principal components of the flattened matrices, every entry standardised over experts (n - 1); of the sampled neurons, "
        "scaled to all of them: the relative error of squared distances is about 1 / sqrt(number of sampled entries)",
    ),
    "projections.*.pca_explained": (SHARE, "of the variance by each of the two components"),
    "projections.*.effective_rank": (
        "dimensions",
        "[E] exp of the entropy of the singular values of a seeded sample of neurons, at most effective_rank_of",
    ),
    "projections.*.effective_rank_error": (
        "dimensions",
        "half the difference between two disjoint samples; 0 if all neurons are sampled",
    ),
    "projections.*.match": (
        "cosines and Kendall's tau",
        "best one-to-one partners for a seeded sample of neurons among the neurons of the other expert, for sampled pairs: cosine of the flattened neurons "
        f"with (cosine) and without (cosine_unordered) re-ordering, mean cosine of partners, tau of their order ({PAPER}, re-ordering); similarity: mean over "
        "pairs with its standard error; null: the same with the inputs of one side shuffled",
    ),
    "projections.*.dense_match": (
        COSINE,
        "[E] mean over sampled neurons of the largest cosine to a neuron of the dense FFN; 1: copied from it",
    ),
    "joint_match": (
        COSINE,
        "as match, with one order for all projections of a pair, which keeps the expert's function",
    ),
    "router_expert": (
        "R², r",
        f"for each projection: Pearson r and R² over expert pairs between router_cosine and neuron_cosine ({PAPER}); p and null: 999 permutations of labels",
    ),
}
USAGE = {
    "tokens": ("tokens", "that passed the layer, padding left out"),
    "usage": (SHARE, "[E] of the routed slots that went to the expert"),
    "mass": (SHARE, "[E] of the routing mass, sum g"),
    "energy": (SHARE, "[E] of the output energy, sum (g ||f||)²"),
    "saliency": (SHARE, "[E] of the EASY-EP saliency, sum g ||f|| s (arXiv 2504.06792)"),
    "score": ("router score", "[E] mean full router score, routed or not"),
    "mean_norm": ("activation units", "[E] mean ||f|| over the tokens routed to the expert"),
    "max_norm": ("activation units", "[E] largest ||f||"),
    "routing_entropy": ("nats", "mean over tokens of the entropy of the full router scores, scaled to sum 1"),
    "routing_entropy_share": (SHARE, "of its maximum ln E: 1 is a uniform router, 0 a router that is certain"),
    "load_entropy_share": (SHARE, "entropy of usage over ln E: 1 is an even load"),
    "effective_experts": ("experts", "exp of the entropy of usage"),
    "load_cv": ("ratio", "standard deviation of the selections over their mean: 0 is an even load"),
    "load_peak": ("ratio", "selections of the most used expert over the mean"),
    "unused": ("experts", "that no token was routed to"),
    "turn": (
        "1 - cosine",
        "mean over tokens of 1 - cos(x, x + r): how much the routed output r changes the direction of the residual stream x",
    ),
    "coselection_lift": (
        "ratio",
        "[E, E] how often two experts are chosen for one token, relative to chance given their use and top_k",
    ),
    "specialisation": (
        "nats and shares",
        "expert_domain [E, D]: share of each domain in an expert's use, domains weighted alike; information: mutual information of expert and domain; saliency_information: "
        "the same for EASY-EP mass, with permuted domains of the sequences as chance",
    ),
    "stability": (
        SHARE,
        "by domain: overlap of the half of the experts that n demonstrations choose (EASY-EP) with the choice of all others; chance about 1/2 (arXiv 2504.06792)",
    ),
}
SAMPLE = {
    "tokens": ("tokens", "on which all experts ran"),
    "recombined_error": (
        "relative",
        "largest difference of sum g f over the chosen experts to the block's own output: checks the pass",
    ),
    "output_angular": (
        "1 - arccos(cosine) / pi, 0 to 1",
        f"between raw outputs of experts on the same token, mean over tokens; 1/2: orthogonal ({PAPER}); members in output_members",
    ),
    "output_cosine": (COSINE, "the same as plain cosines"),
    "output_similarity": (
        "angular, 0 to 1",
        "mean of output_angular over pairs of routed experts; interval: 95 %, whole sequences resampled",
    ),
    "activation_cosine": (
        COSINE,
        f"between inputs of the down projections, neuron by neuron, mean over tokens (the paper shows act(W_gate x) as pictures, {PAPER})",
    ),
    "activation_similarity": (COSINE, "mean of activation_cosine over pairs"),
    "norm_score_rho": (
        "Spearman's rho",
        "between output norms (before g) and full router scores over a token's experts, mean over tokens; by chance 0",
    ),
    "largest_norm_top_scored": (
        SHARE,
        "of tokens whose largest-norm expert has the highest score before any selection bias; by chance 1/E",
    ),
    "largest_norm_selected": (
        SHARE,
        "of tokens whose largest-norm expert was selected, with biases and groups applied; by chance top_k/E",
    ),
    "chosen_norm_percentile": (SHARE, "mean rank of the selected experts' norms, 0 smallest to 1 largest; by chance 1/2"),
    "rank_counts": ("tokens", f"rows: score rank, columns: norm rank, both ascending ({PAPER}); 16 bins above 64 experts"),
    "mean_norm_all": ("activation units", "[E] mean ||f|| over all sampled tokens, routed or not"),
    "points": ("as named", "a seeded sample of (token, expert) pairs: score, norm over the token's mean norm, selected or not"),
    "loved_tokens": (
        "ratio",
        "for each expert the token ids routed to it most above its usual rate (lift, smoothed), of those seen 5 times or more",
    ),
}
MODEL = {
    "observations": ("see each", f"the three observations of {PAPER} as tests: statistic, chance level, the paper's numbers, verdict"),
    "super_experts": ("activation units", "experts whose largest output norm is above the 99.5th percentile, a tenth of the largest (arXiv 2507.23279), and five times the median"),
    "before_cut": (SHARE, "[methods, ratios, domains, layers] of routing mass and output energy that the dropped experts carry; _own: experts chosen for that domain alone"),
    "redundant_layers": ("1 - cosine", "layers that change the direction of the residual stream less than half as much as the median layer"),
    "suggested_budget": ("experts", "fewest experts by EASY-EP that lose at most the tolerance of output energy in every domain, before tokens are re-routed"),
    "after_cut": (SHARE, "share of the dropped experts, and moved: total variation distance of the kept experts' use before and after"),
}  # fmt: skip


def definitions() -> dict[str, dict[str, dict[str, str]]]:
    """Section → name → unit and definition."""
    parts = {"static": STATIC, "usage": USAGE, "sample": SAMPLE, "model": MODEL}
    return {
        part: {name: {"unit": unit, "definition": text} for name, (unit, text) in entries.items()}
        for part, entries in parts.items()
    }
