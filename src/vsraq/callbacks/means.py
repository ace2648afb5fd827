# SPDX-License-Identifier: Apache-2.0
"""The single numbers of a block, by the names that trackers show."""

from statistics import fmean

from vsraq.callbacks.callback import BlockResult


def block_means(block: BlockResult) -> dict[str, float]:
    """Return a block's values, one by name; those of its routers are means.

    Args:
        block: The block.

    Returns:
        `kept/<loss>` at the iteration that is kept, `weight/<loss>`, `seconds`, and if
        routers were re-fitted `re-fit/kept`, the share that holds new weights, and
        `re-fit/<measure> before` and `after`.
    """
    values = {
        f"kept/{label}": losses[block.best_iteration]
        for label, losses in block.losses.items()
        if losses
    }
    values |= {f"weight/{label}": weight for label, weight in block.weights.items()}
    values["seconds"] = block.seconds
    if not block.routers:
        return values
    values["re-fit/kept"] = fmean(router.refit for router in block.routers)
    overlaps = [r.jaccard for r in block.routers if r.jaccard is not None]
    errors = [router.logit_error for router in block.routers]
    for measure, pairs in (("logit error", errors), ("Jaccard", overlaps)):
        if pairs:
            before, after = zip(*pairs, strict=True)
            values[f"re-fit/{measure} before"] = fmean(before)
            values[f"re-fit/{measure} after"] = fmean(after)
    return values
