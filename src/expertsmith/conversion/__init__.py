"""Dense → Mixture-of-Experts: the neurons of each expert, the router, and the stock checkpoint."""
