"""Change a checkpoint as a plan says, mask a loaded model as the plan says, and prove that the two are the same."""
