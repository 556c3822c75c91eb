"""A checkpoint seen as experts: what its routers need, which tensor is what, one expert's matrices."""
