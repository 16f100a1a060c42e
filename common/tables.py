"""Tables and numbers for terminals and Markdown."""

import math
from collections.abc import Sequence


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, text_columns: int = 1
) -> str:
    """A Markdown table: the first ``text_columns`` columns flush left, the others flush right."""
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = _column_widths(escaped)
    rule = ["-" * width for width in widths[:text_columns]]
    rule += ["-" * (width - 1) + ":" for width in widths[text_columns:]]
    aligned = [_aligned(row, widths, text_columns) for row in escaped]
    lines = [aligned[0], rule, *aligned[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column flush left, the others flush right."""
    widths = _column_widths([header, *rows])
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(_aligned(line, widths)).rstrip() for line in lines)


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: ``2 h 05 min``, ``4 min 54 s`` or ``9.5 s``."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_number(value: float | None, digits: int) -> str:
    """``value`` with so many decimals; a dash where there is no number."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _aligned(row: Sequence[str], widths: Sequence[int], text_columns: int = 1) -> list[str]:
    return [
        cell.ljust(width) if i < text_columns else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
