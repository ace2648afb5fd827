# SPDX-License-Identifier: Apache-2.0
"""The measured table of docs/choose.md, from the tables of docs/results.md.

    python benchmarks/choices.py    # after docs/results.md has changed

So both pages have the same numbers.
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKER = "<!-- measured -->\n"

# (table, method as it is called there) -> what a user writes
METHODS = {
    ("headline", "VSRAQ"): '`VSRAQConfig(objective="vsraq", router_weight=0.1)`',
    ("headline", "Top-3K MSE"): "`VSRAQConfig(router_weight=0.1)`",
    ("summary", "SRA"): '`VSRAQConfig(objective="sra", router_weight="auto")`',
    ("headline", "AutoRound + re-fit"): "`VSRAQConfig(realign_routers=True)`",
    ("summary", "Top-3K MSE, both"): "`VSRAQConfig(realign_routers=False)`",
    ("headline", "Top-3K MSE, both + re-fit"): "`VSRAQConfig()`, the default",
    (
        "summary, 128 windows",
        "Top-3K MSE, both + re-fit",
    ): "the default, 128 calibration windows instead of 32",
}
# (schemes, budget, bytes spent by) of the table of plans
PLANS = {
    ("W4A16, W3A16", "0 %", "plan"): "the default on a bit plan of the same bytes",
    ("W4A16", "+3 % vllm", "plan"): "a plan for vLLM with 3 % more bytes",
    ("NVFP4", "+4 %", "plan"): "NVFP4, a plan with 4 % more bytes",
}
HEAD = [
    "| configuration | Jaccard closed % | KL closed % | time ratio | cells |",
    "|---|---|---|---|---|",
]


def rows(text: str, name: str) -> list[list[str]]:
    """Return the cells of a table behind its marker."""
    table = text.partition(f"<!-- {name} -->\n")[2].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    if len(cells) < 3:
        raise ValueError(f"docs/results.md: it has no table {name!r}")
    return cells[2:]


def measured(results: str) -> str:
    """Write the table.

    Raises:
        ValueError: A table or a row is not there.
    """
    lines = list(HEAD)
    for (name, method), configuration in METHODS.items():
        found = [row for row in rows(results, name) if row[0] == method]
        if len(found) != 1:
            raise ValueError(f"docs/results.md: {name!r} has no row {method!r}")
        row = found[0]
        lines.append(f"| {configuration} | {row[1]} | {row[2]} | {row[6]} | {row[7]} |")
    for key, configuration in PLANS.items():
        plans = rows(results, "bits aims")
        found = [row for row in plans if tuple(row[:3]) == key]
        if len(found) != 1:
            raise ValueError(f"docs/results.md: 'bits aims' has no row {key}")
        cells, jaccard, kl = (found[0][column] for column in (3, 4, 6))
        lines.append(f"| {configuration} | {jaccard} | {kl} | | {cells} |")
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """Put the table behind its marker."""
    before, marker, after = page.partition(MARKER)
    if not marker:
        raise ValueError(f"docs/choose.md: it has no line {MARKER.strip()}")
    rest = re.sub(r"\A(\|.*\n)*", "", after)
    return f"{before}{marker}{table}\n{rest}"


if __name__ == "__main__":
    path = DOCS / "choose.md"
    table = measured((DOCS / "results.md").read_text(encoding="utf-8"))
    path.write_text(
        with_table(path.read_text(encoding="utf-8"), table), encoding="utf-8"
    )
