# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that needs nothing else."""

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from vsraq import __version__
from vsraq.report.figures import draw_all
from vsraq.report.findings import Finding, compared, replayed
from vsraq.report.folder import Folder, read_folder
from vsraq.report.picture import Picture, check_matplotlib, house_style
from vsraq.report.run_findings import exported
from vsraq.report.svg import inline_svg
from vsraq.report.tables import headline, per_block, per_layer
from vsraq.report.wording import listed
from vsraq.whole_file import write_whole

REPORT_FILE = "report.html"


class Section(NamedTuple):
    """What one folder adds to the report."""

    key: str
    folder: Folder
    title: str
    findings: Sequence[Finding]
    figures: Sequence[tuple[Picture, str]]


def write_report(
    folders: str | Path | Sequence[str | Path], out: str | Path | None = None
) -> Path:
    """Write folders of `vsraq compare`, exports, or both as one page.

    Args:
        folders: One or several.
        out: The file; its folder is made if it is not there. None writes
            `report.html` into the first folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: A folder has nothing to show.
        ValueError: A file cannot be read, or no folder is given.
        RuntimeError: matplotlib or jinja2 is not installed.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    if not paths:
        raise ValueError("folders=[]: allowed is at least one folder")
    check_matplotlib()
    if find_spec("jinja2") is None:
        raise RuntimeError(
            "jinja2 is not installed, and the report needs it; run `pip install "
            "'vsraq[report]'`"
        )
    found = [read_folder(path) for path in paths]
    target = found[0].path / REPORT_FILE if out is None else Path(out)
    page = _render([_section(i, folder) for i, folder in enumerate(found)])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page)
    return target


def _section(index: int, folder: Folder) -> Section:
    results, run = folder.results, folder.run
    found: list[Finding] = []
    if results is not None:
        found += compared(results, folder.replay)
    elif folder.replay is not None and folder.replay.chosen:
        found.append(replayed(folder.replay))
    found += exported(run, folder.plan)
    if results is not None:
        model = Path(results.full_precision.source).name
        title = f"{model}: {listed(results.methods, 4)} against full precision"
    elif run is not None:
        title = f"{Path(run.model).name}: export in {run.scheme}"
    elif folder.replay is not None:
        title = f"{folder.replay.method}: routing replay"
    else:
        title = f"Export {folder.name}"
    # a figure's name is an id of the page
    pictures = [replace(p, name=f"s{index}-{p.name}") for p in draw_all(folder)]
    with house_style():
        figures = [(picture, inline_svg(picture)) for picture in pictures]
    return Section(f"s{index}", folder, title, found, figures)


def _render(sections: Sequence[Section]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        """Escape a text; what stands between backticks is code."""
        return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))

    environment = Environment(
        loader=PackageLoader("vsraq.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    environment.globals.update(
        headline=headline, per_layer=per_layer, per_block=per_block
    )
    loader: Any = environment.loader

    def raw(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    return environment.get_template("report.html").render(
        sections=sections,
        version=__version__,
        style=raw("style.css"),
        script=raw("script.js"),
        safe=Markup,
    )
