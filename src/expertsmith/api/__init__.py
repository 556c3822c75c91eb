"""The verbs of expertsmith as functions, each defined once in its file of `verbs`. Models are paths or hub ids; statistics and plans are paths or
loaded objects. `revision` is the branch, tag or commit of a model on the hub; any hub id may also be written `owner/name@REVISION`.

    calibrate → statistics → plan → apply → checkpoint → verify, evaluate

Importing this module is quick: torch and transformers are imported by the functions that run a model.
"""

from expertsmith.verbs.analyze import analyze
from expertsmith.verbs.apply import apply
from expertsmith.verbs.calibrate import calibrate
from expertsmith.verbs.catalogue import architectures, methods, recipes
from expertsmith.verbs.compare import compare
from expertsmith.verbs.compress import compress
from expertsmith.verbs.convert import convert
from expertsmith.verbs.dequantise import dequantise
from expertsmith.verbs.evaluate import evaluate, speed
from expertsmith.verbs.export import export
from expertsmith.verbs.heal import heal
from expertsmith.verbs.inspect import inspect
from expertsmith.verbs.lint import lint
from expertsmith.verbs.load import load
from expertsmith.verbs.plan import plan, plan_from
from expertsmith.verbs.run import run
from expertsmith.verbs.skip import skip
from expertsmith.verbs.verify import verify

__all__ = [
    "analyze",
    "apply",
    "architectures",
    "calibrate",
    "compare",
    "compress",
    "convert",
    "dequantise",
    "evaluate",
    "export",
    "heal",
    "inspect",
    "lint",
    "load",
    "methods",
    "plan",
    "plan_from",
    "recipes",
    "run",
    "skip",
    "speed",
    "verify",
]
