# SPDX-License-Identifier: Apache-2.0
"""Killed runs end, when they are run again, as if they had never been killed."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

# the slowest test of all: not behind others on one worker
pytestmark = pytest.mark.xdist_group("test_killed_runs")

SOME = {
    "streamed": 5,
    "in memory": 5,
    "streamed, selected tokens": 3,
    "in memory, selected tokens": 3,
    "streamed, mixed bits": 2,
    "in memory, mixed bits": 2,
}
RETURNED = {"SIGKILL": -9, "SIGTERM": -15, "SIGINT": 4, "in the middle": -25}


@pytest.fixture(scope="module")
def results(tmp_path_factory, pytestconfig):
    wanted = dict.fromkeys(SOME, "all") if pytestconfig.getoption("--full") else SOME
    script = Path(__file__).with_name("killed_runs.py")
    folder = tmp_path_factory.mktemp("killed")
    run = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(wanted)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line[:1] == "{"]


def test_they_end_with_the_same_bits_or_are_refused(results):
    wrong = [r for r in results if r["outcome"] not in ("same", "refused")]
    assert not wrong, json.dumps(wrong[:5], indent=1)
    refused = [r["message"] for r in results if r["outcome"] == "refused"]
    assert all("delete these files" in message for message in refused), refused
    # a run that was complete: its export is there, only the process went on a little
    assert len(refused) <= len(results) // 10, refused


def test_they_did_die_at_many_points(results):
    points = {(r["variant"], r["at"]) for r in results}
    assert len(points) >= 20
    for result in results:
        assert result["died"] == RETURNED.get(result["way"], 4), result
    ways = Counter(r["way"] for r in results)
    assert all(ways[way] for way in RETURNED), ways


def test_a_full_disk_says_so(results):
    full = [r for r in results if r["way"] == "disk full"]
    assert full
    for result in full:
        assert "DiskError" in result["said"], result
        assert "make room" in result["said"], result
