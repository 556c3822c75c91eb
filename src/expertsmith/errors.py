"""The one exception for users: shown in one or two lines, without a traceback, exit code 2. And reading their JSON, which may be anything."""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 100  # what nests deeper than any config, plan or record would only end in Python's limit somewhere else


class UserError(Exception):
    """Something in the user's input breaks a rule.

    The message says where, what was found and which rule it breaks; `remedy` says what to do instead.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message if not remedy else f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy


class UsageError(UserError):
    """Options that do not go together, or one that is missing: the command line shows how it is used."""


def parse_json(text: str | bytes, where: str, remedy: str = "", *, nan: bool = True) -> Any:
    """What a JSON text holds; `where` names it in errors. Without `nan`, NaN is refused, which Python takes for a number.

    Raises:
        UserError: it is not JSON or not UTF-8, has a number of thousands of digits, or nests too deeply.
    """
    opening = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    try:
        found = json.loads(text, parse_constant=float if nan else _refuse_nan)
        if sum(map(text.count, opening)) > DEEPEST:  # type: ignore[arg-type]
            _refuse_deep(found)
    except (ValueError, RecursionError) as error:
        reason = f"it nests more than {DEEPEST} levels deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where} is not JSON: {reason}", remedy) from None
    return found


def _refuse_nan(word: str) -> float:
    if word == "NaN":
        raise ValueError("NaN is not a JSON value")
    return float(word)


def _refuse_deep(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            part
            for held in level
            for part in (held.values() if isinstance(held, dict) else held)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise RecursionError


PACKAGES = {  # module → the package that has it, where the names differ by more than _ and -
    "google": "protobuf",
    "PIL": "pillow",
    "cv2": "opencv-python",
    "fla": "flash-linear-attention",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}


def install_line(error: BaseException) -> str | None:
    """`pip install …` for the package whose absence an exception reports, or None where it reports something else.

    What the exception itself tells to install counts first, then the module that was not found, then the library that it names.
    """
    text = str(error)
    told = re.search(r"pip install ([^`\n)]+)", text)
    if told:
        return f"pip install {told[1].strip().rstrip('.')}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        return f"pip install {PACKAGES.get(top, top.replace('_', '-'))}"
    named = re.search(r"requires the (\S+) library,? but it was not found", text)
    if named:
        return f"pip install {named[1].lower()}"
    return install_line(error.__cause__) if error.__cause__ is not None else None
