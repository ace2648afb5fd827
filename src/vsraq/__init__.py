# SPDX-License-Identifier: Apache-2.0
"""Router-aligned quantization of mixture-of-experts models, as an AutoRound plug-in.

Importing this package registers the algorithm "vsraq" and the data sets of
`vsraq.calibration` with AutoRound: at once where AutoRound is imported already,
otherwise as soon as it is. Names are looked up on their first use, so that
`vsraq.losses` needs no AutoRound.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from vsraq.analysis import (
        RoutingRecord,
        compare,
        record_routing,
        replay_routing,
    )
    from vsraq.autoround.calibration_data import calibration_samples
    from vsraq.autoround.config import VSRAQConfig
    from vsraq.autoround.plan_bits import plan_bits
    from vsraq.autoround.select_tokens import select_tokens
    from vsraq.bits import BitPlan
    from vsraq.evaluation import evaluate
    from vsraq.objectives import OBJECTIVES, Objective
    from vsraq.realignment import realign_routers
    from vsraq.routers import Router, find_routers

_ROOMS = {
    "BitPlan": "vsraq.bits",
    "OBJECTIVES": "vsraq.objectives",
    "Objective": "vsraq.objectives",
    "Router": "vsraq.routers",
    "RoutingRecord": "vsraq.analysis",
    "VSRAQConfig": "vsraq.autoround",
    "calibration_samples": "vsraq.autoround",
    "compare": "vsraq.analysis",
    "evaluate": "vsraq.evaluation",
    "find_routers": "vsraq.routers",
    "plan_bits": "vsraq.autoround",
    "realign_routers": "vsraq.realignment",
    "record_routing": "vsraq.analysis",
    "replay_routing": "vsraq.analysis",
    "select_tokens": "vsraq.autoround",
}

__version__ = version("vsraq")
__all__ = [
    "OBJECTIVES",
    "BitPlan",
    "Objective",
    "Router",
    "RoutingRecord",
    "VSRAQConfig",
    "__version__",
    "calibration_samples",
    "compare",
    "evaluate",
    "find_routers",
    "plan_bits",
    "realign_routers",
    "record_routing",
    "replay_routing",
    "select_tokens",
]


def __getattr__(name: str) -> Any:
    """Import a name of this package on its first use (PEP 562)."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@when_imported("auto_round")
def _register(_auto_round: object) -> None:
    import_module("vsraq.autoround")
