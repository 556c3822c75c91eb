"""Dense → Mixture-of-Experts: which neurons form an expert, which router picks it, and the stock checkpoint that says so."""
