"""Write the README's list of families from the records (`--check`: only say whether it is up to date)."""

from __future__ import annotations

import sys
from pathlib import Path

from expertsmith.arch import families

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"


def section() -> str:
    """The text between the marks."""
    rows = list(families().values())
    full = [row for row in rows if row.status == "full"]
    partial = [row for row in rows if row.status == "partial"]
    refused = [row for row in rows if row.status == "refused"]
    lines = [
        f"{len(full) + len(partial)} model types of transformers 5.23, each tested through the whole flow on a tiny random model:",
        "",
        ", ".join(f"`{row.model_type}`" for row in full) + ".",
        "",
        *(f"- `{row.model_type}` in part: {row.notes}" for row in partial),
        *(f"- `{row.model_type}` is refused: {row.notes}" for row in refused),
        "",
        "`expertsmith architectures` lists them with what is particular to each.",
    ]
    return "\n".join(lines)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    wanted = f"{head}{BEGIN}\n{section()}\n{END}{tail}"
    if "--check" in sys.argv:
        sys.exit(
            0 if wanted == text else "README.md: the list of families is out of date: run python scripts/readme_families.py"
        )
    README.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
