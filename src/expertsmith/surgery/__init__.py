"""Apply a plan to a checkpoint, mask a loaded model by the same plan, and prove that the two are the same."""
