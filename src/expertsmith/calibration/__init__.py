"""One pass over calibration text that collects the statistics of every criterion. Knows nothing of the methods that read them."""
