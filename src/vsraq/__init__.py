# SPDX-License-Identifier: Apache-2.0
"""Router-aligned quantization of mixture-of-experts models, as an AutoRound plug-in.

Importing this package registers the algorithm "vsraq" with AutoRound.
"""

from importlib.metadata import version

from vsraq.autoround import VSRAQConfig, select_tokens
from vsraq.objectives import OBJECTIVES, Objective
from vsraq.realignment import realign_routers
from vsraq.routers import Router, find_routers

__version__ = version("vsraq")
__all__ = [
    "OBJECTIVES",
    "Objective",
    "Router",
    "VSRAQConfig",
    "__version__",
    "find_routers",
    "realign_routers",
    "select_tokens",
]
