"""The display of a result in Python: one line as text, a table in a notebook, a pandas data frame."""

from __future__ import annotations

from html import escape
from typing import Any

from expertsmith.errors import UserError


class Shown:
    """A result that is a table. A subclass defines its rows (`_rows`) and a one-line summary (`_line`)."""

    def _rows(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _line(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._line()}>"

    def _repr_html_(self) -> str:
        rows = self._rows()
        names = list(rows[0]) if rows else []
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{escape(_text(row[name]))}</td>" for name in names) + "</tr>" for row in rows)
        return f"<table><caption>{escape(self._line())}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_dataframe(self) -> Any:
        """The rows as a pandas.DataFrame.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise UserError("to_dataframe needs pandas", "pip install pandas") from None
        return pandas.DataFrame(self._rows())


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
