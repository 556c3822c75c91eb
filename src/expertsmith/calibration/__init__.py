"""One pass over calibration text that collects the statistics of every criterion. Independent of the methods that read them."""
