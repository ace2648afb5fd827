# SPDX-License-Identifier: Apache-2.0
"""The figures: a new one is a file in this folder and one row here."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vsraq.report.figures import (
    bits_by_layer,
    expert_load,
    histograms,
    jaccard_by_layer,
    ranks,
    scatter,
    tuning_curves,
)
from vsraq.report.folder import Folder, read_folder
from vsraq.report.picture import Picture, check_matplotlib, house_style

# In the order of the report. Each returns nothing where its data are not there.
FIGURES: tuple[Callable[[Folder], list[Picture]], ...] = (
    jaccard_by_layer.draw,
    scatter.draw_regions,
    ranks.draw_dropped,
    ranks.draw_injected,
    histograms.draw_distributions,
    histograms.draw_replay,
    scatter.draw_divergences,
    expert_load.draw,
    bits_by_layer.draw,
    tuning_curves.draw,
)


def draw_all(folder: Folder) -> list[Picture]:
    """Draw all figures of a folder.

    Args:
        folder: What it holds.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    with house_style():
        pictures = [picture for draw in FIGURES for picture in draw(folder)]
        for picture in pictures:  # lay it out once, not for each file
            picture.figure.draw_without_rendering()
            picture.figure.set_layout_engine("none")
    return pictures


def write_figures(
    folders: str | Path | Sequence[str | Path], out: str | Path
) -> list[Path]:
    """Write all figures of some folders as PNG and SVG.

    Args:
        folders: A folder of `vsraq compare`, an export, or several; of several, each
            has a folder in `out`.
        out: Where to put them; made if it is not there.

    Returns:
        The files.

    Raises:
        FileNotFoundError: A folder has nothing to show.
        ValueError: A file of it cannot be read.
        RuntimeError: matplotlib is not installed.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    check_matplotlib()
    written: list[Path] = []
    for index, found in enumerate([read_folder(path) for path in paths]):
        pictures = draw_all(found)
        target = Path(out)
        if len(paths) > 1:
            target /= f"{index + 1}-{found.name}"
        target.mkdir(parents=True, exist_ok=True)
        with house_style():
            written += [path for picture in pictures for path in picture.save(target)]
    return written
