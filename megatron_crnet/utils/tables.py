"""Tables that are aligned in a terminal and are Markdown as well."""

from __future__ import annotations

from collections.abc import Sequence

import tabulate

tabulate.MIN_PADDING = 0  # columns as narrow as their words


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Rows under a header, one line each; the first `text_columns` are aligned left, all others right."""
    align = ["left"] * text_columns + ["right"] * (len(header) - text_columns)
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    return tabulate.tabulate(cells, header, "pipe", disable_numparse=True, colalign=align[: len(header)])
