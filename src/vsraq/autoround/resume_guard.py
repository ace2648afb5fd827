# SPDX-License-Identifier: Apache-2.0
"""Refuse to resume a run that was tuned with other settings.

AutoRound's resume directory (`AR_RESUME_DIR`) is keyed by model, scheme, data set and
blocks, not by the algorithm: without this guard, a run that stopped half-way could be
continued with another objective, learning rate or seed, and nobody would notice.
"""

import json
from collections.abc import Mapping
from pathlib import Path

_SETTINGS = "vsraq_run.json"


def guard_resume(resume_dir: str | Path, settings: Mapping[str, str]) -> None:
    """Write the run's settings, or compare them with those of the unfinished run.

    Args:
        resume_dir: AutoRound's resume directory.
        settings: Everything that decides the tuned weights, as text.

    Raises:
        ValueError: The directory holds an unfinished run with other settings.
    """
    directory = Path(resume_dir)
    path = directory / _SETTINGS
    if not any(directory.glob("group_*/resume_manifest.json")):
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(settings), indent=2, sort_keys=True))
        return
    if not path.is_file():
        raise ValueError(
            f"AR_RESUME_DIR={str(directory)!r}: it holds an unfinished run of another "
            "algorithm; allowed is an unfinished run with the same settings, or an "
            "empty folder"
        )
    stored = json.loads(path.read_text())
    different = [
        f"{name} was {stored.get(name)}, now {settings.get(name)}"
        for name in sorted(stored.keys() | settings.keys())
        if stored.get(name) != settings.get(name)
    ]
    if different:
        raise ValueError(
            f"AR_RESUME_DIR={str(directory)!r}: its unfinished run has other settings "
            f"({'; '.join(different)}); allowed are the same ones; restore them, or "
            "use an empty folder"
        )
