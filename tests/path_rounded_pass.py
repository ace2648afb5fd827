# SPDX-License-Identifier: Apache-2.0
"""Select tokens of one tiny model in memory and from a path; print JSON lines.

    python path_rounded_pass.py FAMILY

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
from vsraq.autoround import VSRAQQuantizer
from vsraq.autoround.token_selection import select_tokens_of_run
from vsraq.checkpoint import load_model
from vsraq.run_inside import run_inside
from vsraq.tokens.recorder import TokenRecorder


def state(model):
    tensors = model.state_dict(keep_vars=True).items()
    return {name: (str(t.device), t.shape) for name, t in tensors}


class Selecting(VSRAQQuantizer):
    """Selects tokens where a run would; AutoRound builds it for `VSRAQConfig`."""

    def bind(self, orchestrator):
        super().bind(orchestrator)
        self.recorder = TokenRecorder(self.model)
        run_inside(orchestrator, "cache_data", lambda: self.recorder)

    def prepare_run(self, composer=None):
        super().prepare_run(composer=composer)
        before = state(self.model)
        ids = self.recorder.take()
        mask = select_tokens_of_run(self.run.orchestrator, composer, ids, tau=0.05).mask
        result = {
            "masks": [m.tolist() for m in mask.masks],
            "untouched": state(self.model) == before,
            "emptied": any(p.numel() == 0 for p in self.model.parameters()),
        }
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    VSRAQQuantizer.__new__ = lambda cls, config: object.__new__(Selecting)
    with tiny.bfloat16(), tempfile.TemporaryDirectory() as folder:
        source = tiny.save(sys.argv[1], Path(folder) / "model")
        for model in (load_model(source), str(source)):
            AutoRound(
                model,
                tiny.tiny_tokenizer(),
                scheme="W4A16",
                alg_configs=VSRAQConfig(iters=1, **tiny.PLAIN),
                dataset=tiny.calibration(),
                **tiny.RUN,
            ).quantize()
