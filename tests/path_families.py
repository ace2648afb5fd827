# SPDX-License-Identifier: Apache-2.0
"""Quantize one tiny model of each family from a path; print one JSON line for each.

    python path_families.py export|keep FAMILY...

A process of its own: AutoRound replaces classes of transformers for the rest of the
process when it loads some families from a path.
"""

import json
import sys
import tempfile
from pathlib import Path

from auto_round import AutoRound

import tiny
from vsraq import VSRAQConfig
from vsraq.checkpoint import CheckpointError, verify


def quantize(family, folder, way):
    source = tiny.save(family, folder / "model")
    autoround = AutoRound(
        str(source),
        scheme="W4A16",
        group_size=32,
        alg_configs=VSRAQConfig(iters=2, router_weight=1.0, next_router_weight=0.1),
        dataset=tiny.calibration(),
        **tiny.RUN,
    )
    if way == "keep":  # in memory, as far as AutoRound does not put blocks on disk
        autoround.quantize()
        return str(source), None
    _, exported = autoround.quantize_and_save(str(folder / "out"), format="auto_round")
    return str(source), exported


def attempt(family, way):
    with (
        tiny.bfloat16(),
        tiny.LogLines() as messages,
        tempfile.TemporaryDirectory() as folder,
    ):
        result = {"family": family, "log": messages}
        try:
            source, exported = quantize(family, Path(folder), way)
            if exported is not None:
                result["verified"] = verify(exported, source).routers
        except CheckpointError as error:
            result["faults"] = error.faults
        except RuntimeError as error:
            result["error"] = str(error)
    return result


if __name__ == "__main__":
    way, *families = sys.argv[1:]
    for family in families:
        print("RESULT", json.dumps(attempt(family, way)), flush=True)
