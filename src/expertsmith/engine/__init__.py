"""Run a model: whole in memory or one decoder layer at a time, with the model's own forward. Independent of methods and plans."""

from expertsmith.engine.loading import LoadedModel, load_model
from expertsmith.engine.uneven import load
from expertsmith.engine.walk import Batch, Walk, hidden_of

__all__ = ["Batch", "LoadedModel", "Walk", "hidden_of", "load", "load_model"]
