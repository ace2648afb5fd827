# SPDX-License-Identifier: Apache-2.0
"""Re-fit routers in closed form, keep what that needs, and record what was done."""

from vsraq.realignment.fit import (
    DEFAULT_RIDGE,
    Refit,
    RidgeSums,
    realign_routers,
    refit_router,
)

__all__ = ["DEFAULT_RIDGE", "Refit", "RidgeSums", "realign_routers", "refit_router"]
