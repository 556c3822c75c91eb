"""A model in a serving engine: a persistent process with the engine's own Python, driven by JSON lines (`runner.py`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from expertsmith.errors import UserError
from expertsmith.registry import unknown

RUNNER = Path(__file__).with_name("runner.py")
CLONE = "in a clone of expertsmith `make .engines/.{0}` installs it for CPUs, and its Python is .engines/{0}/bin/python"
# engine → environment variable with its Python, how to install it
PLACES = {
    "vllm": (
        "EXPERTSMITH_VLLM",
        f"`python3 -m venv ENV && ENV/bin/pip install vllm==0.32.0` (for GPUs; {CLONE.format('vllm')})",
    ),
    "llama.cpp": (
        "EXPERTSMITH_LLAMA",
        "`python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 transformers==5.23.0 gguf sentencepiece xllamacpp==2026.10.11549` "
        f"({CLONE.format('llama')})",
    ),
}
CONVERTER = "EXPERTSMITH_LLAMA_CONVERTER"
ENGINES = ("transformers", *PLACES)

Ask = Callable[..., dict[str, Any]]


class RefusedError(Exception):
    """An engine refused a model or failed on it; `words` are the engine's own words."""

    def __init__(self, model: str | Path, words: str) -> None:
        super().__init__(f"{model}: {words}")
        self.model = str(model)
        self.words = words


def python_of(engine: str, path: str | Path | None = None) -> str:
    """The Python of an engine's environment: `path`, or the value of the engine's variable. Default for transformers: the running one.

    Raises:
        UserError: an unknown engine, or an environment that is not named or does not exist; with the commands to create it.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if engine not in PLACES:
        return str(path or sys.executable)
    variable, install = PLACES[engine]
    named = path or os.environ.get(variable)
    if not named:
        raise UserError(
            f"{engine} was not found",
            f"pass --engine-python or set {variable}, the Python of an environment made with {install}",
        )
    if not Path(named).is_file():
        raise UserError(f"{named} does not exist, so {engine} cannot be run", f"make the environment with {install}")
    return str(named)


@contextmanager
def engine(name: str, model: str | Path, python: str | Path | None = None, **options: Any) -> Iterator[Ask]:
    """Run a model in an engine, offline; yields a function (prompts, new, top) that generates and returns the answer of `runner.py`.

    Args:
        model: a checkpoint; for llama.cpp a GGUF file.
        options: "dtype", "device", "batch" (prompts at once), "length" (tokens of a prompt and its output), and those of `runner.py`.

    Raises:
        RefusedError: the engine refuses the model or fails.
        UserError: the engine is not found at `python` or at the path in its variable.
    """
    interpreter = python_of(name, python)
    settings = {"dtype": "auto", "device": "auto", "batch": 1, "length": 256, **options}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if name in PLACES:
        environment.pop("PYTHONPATH", None)  # the engine has its own environment
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [interpreter, str(RUNNER), name, str(model), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        try:
            begun = _reply(process, log, model)
            if "missing" in begun:
                raise UserError(f"{interpreter} has no {begun['missing']}", f"make an environment with {PLACES[name][1]}")

            def ask(prompts: Sequence[Sequence[int]], new: int, top: int = 0) -> dict[str, Any]:
                assert process.stdin is not None
                print(json.dumps({"prompts": prompts, "new": new, "top": top}), file=process.stdin, flush=True)
                return _reply(process, log, model)

            yield ask
        finally:
            process.kill()  # it is not needed any more, and engines take long to shut down
            process.communicate()


def convert(model: str | Path, out: Path, python: str | Path | None = None, converter: str | Path | None = None, dtype: str = "auto") -> Path:  # fmt: skip
    """Convert a checkpoint to a GGUF file with llama.cpp's convert_hf_to_gguf.py; returns `out`.

    Raises:
        RefusedError: the converter fails.
        UserError: the converter or its Python is not named or does not exist.
    """
    script = converter or os.environ.get(CONVERTER)
    if not script or not Path(script).is_file():
        found = f"{script} does not exist" if script else "convert_hf_to_gguf.py was not found"
        raise UserError(
            found,
            f"pass --gguf-converter PATH, or set {CONVERTER} (in a clone of expertsmith `make .engines/.llama` "
            "fetches it), or give MODEL and --reference as .gguf files",
        )
    kind = {"auto": "auto", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    command = [python_of("llama.cpp", python), str(script), str(model), "--outtype", kind, "--outfile", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if done.returncode:
        raise RefusedError(model, _last_words(done.stdout + done.stderr))
    return out


def _reply(process: subprocess.Popen[str], log: IO[bytes], model: str | Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {}
    if line and "refused" not in answer:
        return answer
    log.seek(0)
    said = log.read().decode(errors="replace")
    if answer:
        raise RefusedError(model, "\n".join(dict.fromkeys([answer["refused"], *_complaints(said)])))
    code = process.wait()
    end = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise RefusedError(model, f"{_last_words(said)}\n(its process ended with {end})")


def _complaints(said: str, most: int = 3) -> list[str]:
    """The last lines of a log that name an error, without repetitions and warnings."""
    lines = [line.strip() for line in said.splitlines() if re.search(r"error|assert", line, re.I) and "WARNING" not in line]
    return list(dict.fromkeys(lines))[-most:]


def _last_words(said: str) -> str:
    return "\n".join(_complaints(said) or [line for line in said.splitlines() if line.strip()][-3:])
