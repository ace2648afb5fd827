# SPDX-License-Identifier: Apache-2.0
"""Whether AutoRound streams a model: what a recipe expects, and what AutoRound does."""

import json
import os
import subprocess
import sys

import pytest

# AutoRound splits the experts of gpt_oss itself, and puts a layer of its own in the
# place of deepseek_v3's.
STREAMED = {"nemotron_h": True, "gpt_oss": False, "deepseek_v3": False}

# in a process of its own: AutoRound changes what transformers loads
LOAD = """
import json
import sys
from pathlib import Path
from auto_round import AutoRound
from transformers import AutoConfig
import tiny
from vsraq.recipe.streaming import is_streamed

path = str(tiny.save(sys.argv[1], Path(sys.argv[2])))
before = is_streamed(AutoConfig.from_pretrained(path), path)
with tiny.bfloat16():
    run = AutoRound(path, dataset=tiny.calibration(), **tiny.RUN)
    run.post_init()
found = run.model_context._disk_stream_index is not None
after = is_streamed(AutoConfig.from_pretrained(path), path)
print(json.dumps([before, found, after]))
"""


@pytest.mark.parametrize("family", STREAMED)
def test_as_autoround_decides(family, tmp_path):
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, family, str(tmp_path)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    decided = json.loads(done.stdout.splitlines()[-1])
    assert decided == [STREAMED[family]] * 3
