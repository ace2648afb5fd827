# SPDX-License-Identifier: Apache-2.0
"""The table of docs/recipes.md: PYTHONPATH=benchmarks python tests/recipe_table.py."""

import re
import sys
import tempfile
from pathlib import Path

from public_models import public_name, save_public
from vsraq.bits.engines import ENGINES
from vsraq.recipe import estimate, inspect, load_recipe
from vsraq.recipe.serving import why_not_served

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
HEAD = (
    "| recipe | GPU memory, GB | host memory, GB | model and export on disk, GB | "
    "time, h | loaded by |\n|---|---|---|---|---|---|"
)


def needs_line(found):
    """What the comment of a recipe says that it needs."""
    needs = estimate(found)
    device, host = (
        sum(parts.values()) for parts in (needs.memory.device, needs.memory.host)
    )
    disk = needs.download_bytes + needs.export_bytes
    sizes = [
        f"{size / 1e9:.2g}" if size < 1e10 else f"{size / 1e9:.0f}"
        for size in (device, host, disk)
    ]
    return "# Needs about {} GB on the GPU, {} on the host, {} on the disk.".format(
        *sizes
    )


def _gb(count):
    return f"{count / 1e9:.0f}" if count >= 1e11 else f"{count / 1e9:.3g}"


def row(path, found):
    needs = estimate(found)
    memory = needs.memory
    cells = [sum(memory.device.values()), sum(memory.host.values())]
    sizes = [_gb(cell) for cell in cells]
    disk = f"{_gb(needs.download_bytes)} + {_gb(needs.export_bytes)}"
    comment = path.read_text().partition("\nmodel: ")[0]
    named = {n for n in ENGINES if re.search(rf"^# {n}: ", comment, re.M)}
    loads = [
        name
        for name, engine in ENGINES.items()
        if name not in named and not why_not_served(engine, found)
    ]
    name = f"[`{path.stem}`](../configs/{path.name})"
    time = f"{needs.seconds / 3600:.2g}"
    return f"| {name} | {' | '.join(sizes)} | {disk} | {time} | {', '.join(loads)} |"


if __name__ == "__main__":
    print(HEAD)
    for path in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            model = save_public(public_name(path.stem), Path(folder))
            found = inspect(load_recipe(path, [f"model={model}"]))
            print(row(path, found))
            if "--write" in sys.argv:
                text = re.sub(r"(?m)^# Needs about .*\n", "", path.read_text())
                head, _, body = text.partition("\nmodel: ")
                path.write_text(f"{head}\n{needs_line(found)}\nmodel: {body}")
