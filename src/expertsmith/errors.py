"""The one exception for users: shown in one or two lines, without a traceback, exit code 2."""

from __future__ import annotations

import re


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
