# SPDX-License-Identifier: Apache-2.0
"""What listens to a run: `VSRAQConfig(callbacks=[...])`.

`TensorBoard` and `WandB` are ready-made; a subclass of `Callback` is your own.
"""

from vsraq.callbacks.callback import (
    BlockInfo,
    BlockResult,
    Callback,
    RouterRefit,
    RunInfo,
    RunResult,
    Step,
    check_callbacks,
    listens_to_steps,
)
from vsraq.callbacks.tensorboard import TensorBoard
from vsraq.callbacks.weights_and_biases import WandB

__all__ = [
    "BlockInfo",
    "BlockResult",
    "Callback",
    "RouterRefit",
    "RunInfo",
    "RunResult",
    "Step",
    "TensorBoard",
    "WandB",
    "check_callbacks",
    "listens_to_steps",
]
