"""The one exception that is meant for users: shown in a line or two, without a traceback, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something in the user's input breaks a rule.

    The message says where, what was found and which rule it breaks; `remedy` says what to do instead.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message if not remedy else f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy
