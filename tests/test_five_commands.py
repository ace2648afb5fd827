# SPDX-License-Identifier: Apache-2.0
"""The README's commands in their order, in real processes, on the embedded model."""

import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALLER = {  # what makes a command small enough for a test
    "quantize": [
        "algorithm.iters=1",
        "calibration.nsamples=4",
        "calibration.seqlen=64",
        "calibration.dataset={text}",
    ],
    "compare": ["--seqlen=64", "--sequences=4"],
    "evaluate": ["--wikitext2=docs/options.md", "--seqlen=64"],
}


def commands():
    """The README's block that goes from a recipe to an evaluation."""
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    (block,) = (b for b in blocks if "vsraq quantize" in b)
    return [shlex.split(line) for line in block.strip().splitlines()]


def test_from_a_model_to_its_evaluation(text_file, tmp_path):
    """As they stand there, in a folder that has what the checkout has."""
    for name in ("src", "docs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    printed = {}
    for program, command, *arguments in commands():
        assert program == "vsraq"
        more = [a.format(text=text_file) for a in SMALLER.get(command, [])]
        done = subprocess.run(
            [
                Path(sysconfig.get_path("scripts")) / program,
                *(command, *arguments, *more),
            ],
            cwd=tmp_path,
            # not every CPU can stream 16 bits; the recipe says so
            env=os.environ | {"AR_DISABLE_META_LOAD": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
        printed[command] = done.stdout
    assert list(printed) == ["quantize", "verify", "compare", "report", "evaluate"]
    assert "exported to out/embedded/model-w4g32" in printed["quantize"]
    assert "Verification(kind=" in printed["verify"]
    assert "jaccard" in printed["compare"].lower()
    (report,) = (tmp_path / "out").rglob("*.html")
    assert str(report.relative_to(tmp_path)) in printed["report"]
    assert "WikiText-2 PPL" in printed["evaluate"]
    assert "W4A16" in printed["evaluate"]
