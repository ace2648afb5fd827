# SPDX-License-Identifier: Apache-2.0
"""The table of an evaluation: a row per model, a column per task, and the averages.

It has the shape of VSRAQ's Tables 2 to 4. Shares are printed in percent.
"""

from collections.abc import Sequence

from vsraq.evaluation.results import (
    Average,
    ColumnUsed,
    Evaluation,
    Figure,
    MethodFigures,
)
from vsraq.evaluation.tasks import WIKITEXT2_HEADING


def as_text(evaluation: Evaluation) -> str:
    """Return the table for a terminal, and under it what it is limited to."""
    rows = _rows(evaluation)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *_notes(evaluation)])


def as_markdown(evaluation: Evaluation) -> str:
    """Return the table as Markdown, the best quantized figures in bold."""
    head, *body = _rows(evaluation, bold=True)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    table = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in lines]
    return "\n".join([*table, *(f"\n{note}" for note in _notes(evaluation))])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _rows(evaluation: Evaluation, *, bold: bool = False) -> list[list[str]]:
    columns, averages = evaluation.columns, evaluation.averages
    rows = [["", *(c.name for c in columns), *(a.name for a in averages)]]
    best = _best(evaluation) if bold else {}
    for name, method in evaluation.methods.items():
        cells = [(c.name, _cell(method.figures[c.name], c.percent)) for c in columns]
        cells += [(a.name, _cell(method.averages[a.name], True)) for a in averages]
        marked = [f"**{t}**" if best.get(head) == name else t for head, t in cells]
        rows.append([name, *marked])
    return rows


def _cell(figure: Figure | Average, percent: bool) -> str:
    if figure.value is None:
        return "-"
    scale = 100 if percent else 1
    text = f"{scale * figure.value:.2f}"
    if figure.stderr is not None:
        text += f" ±{scale * figure.stderr:.2f}"
    return text


def _best(evaluation: Evaluation) -> dict[str, str]:
    """Return the best of the models after the first, by heading."""
    _, *others = evaluation.methods.items()
    if len(others) < 2:
        return {}
    found = {c.name: _best_of(c, others) for c in evaluation.columns}
    for mean in evaluation.averages:
        values = [(m.averages[mean.name].value, name) for name, m in others]
        found[mean.name] = _largest(values)
    return {head: name for head, name in found.items() if name is not None}


def _best_of(
    column: ColumnUsed, methods: Sequence[tuple[str, MethodFigures]]
) -> str | None:
    if column.higher_is_better is None:
        return None
    sign = 1 if column.higher_is_better else -1
    values = [(m.figures[column.name].value, name) for name, m in methods]
    return _largest([(None if v is None else sign * v, name) for v, name in values])


def _largest(values: Sequence[tuple[float | None, str]]) -> str | None:
    """Return the name with the largest value; None where two share it."""
    known = [(value, name) for value, name in values if value is not None]
    most = max((value for value, _ in known), default=None)
    names = [name for value, name in known if value == most]
    return names[0] if len(names) == 1 else None


def _notes(evaluation: Evaluation) -> list[str]:
    settings, text = evaluation.settings, evaluation.text
    notes = ["± is the standard error over the documents."]
    if text is not None:
        notes.append(
            f"{WIKITEXT2_HEADING}: perplexity of tokens, {text.windows} windows of "
            f"{text.seqlen}, {text.source}."
        )
    if settings.limit is not None:
        notes.append(
            f"LIMITED to the first {settings.limit} documents of each task (windows of "
            "WikiText-2): not the figures of the tasks, and not to be compared with "
            "those of papers."
        )
    return notes
