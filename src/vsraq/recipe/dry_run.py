# SPDX-License-Identifier: Apache-2.0
"""The plan of a run, as text, before a weight is loaded."""

from collections import Counter

from vsraq.autoround.config import VSRAQConfig
from vsraq.recipe.estimate import estimate
from vsraq.recipe.inspect import Inspected
from vsraq.recipe.layers import Layer
from vsraq.recipe.serving import describe_serving, served_by


def describe_run(found: Inspected) -> str:
    """Describe what a run of a recipe would do.

    Args:
        found: The recipe and its model; see `inspect`.

    Returns:
        Lines of a name and what it is: model, scheme, objective, bit plan, calibration,
        exports, engines, and the estimate.
    """
    recipe = found.recipe
    calibration = recipe.calibration
    rows = [
        ("model", f"{recipe.model}, {_blocks(found)}, {_routers(found)}"),
        ("scheme", _schemes(found)),
        ("method", _method(found)),
        ("bit plan", _bits(found)),
        (
            "calibration",
            f"{calibration.nsamples} samples of {calibration.seqlen} tokens from "
            f"{calibration.dataset}, batches of {calibration.batch_size}, seed "
            f"{calibration.seed}",
        ),
        ("exports", f"{recipe.format} in {recipe.output}"),
    ]
    lines = [f"{name:12}{text}" for name, text in rows]
    serving = describe_serving(list(served_by(found).items()))
    lines += [f"{'engine':12}{line}" for line in serving]
    return "\n".join([*lines, str(estimate(found))])


def _blocks(found: Inspected) -> str:
    tuned, all_blocks = len(found.tuned_blocks), len(found.blocks)
    return f"{all_blocks} blocks" + (
        f" of which {tuned} are quantized" if tuned < all_blocks else ""
    )


def _routers(found: Inspected) -> str:
    sizes = Counter((r.top_k, r.num_experts) for r in found.routers)
    kinds = [f"{n} choose {k} of {e} experts" for (k, e), n in sizes.items()]
    return f"{len(found.routers)} routers: {', '.join(kinds)}" if kinds else "no router"


def _schemes(found: Inspected) -> str:
    counts: Counter[str] = Counter()
    for layer in found.layers:
        counts[_scheme(layer)] += layer.copies
    parts = [f"{count:,} layers {name}" for name, count in counts.most_common()]
    return f"{found.recipe.scheme}: {', '.join(parts)}"


def _scheme(layer: Layer) -> str:
    fields = layer.fields
    if not layer.is_quantized:
        return "left as they are"
    acts = int(fields.get("act_bits") or 16)
    inputs = f", inputs in {acts} bits" if acts < 16 else ""
    bits, group = fields["bits"], fields["group_size"]
    return f"{fields['data_type']} of {bits} bits in groups of {group}{inputs}"


def _method(found: Inspected) -> str:
    config = found.recipe.algorithm_config()
    if not found.recipe.tunes:
        samples = "" if found.recipe.needs_samples else ", without samples"
        return f"AutoRound, rounded to nearest{samples}"
    if not isinstance(config, VSRAQConfig) or not config.alignment:
        return f"AutoRound, {config.iters} iterations"
    alignment = config.alignment
    terms = []
    if alignment.router_weight != 0:
        terms.append(
            f"own router {alignment.own_objective} x {alignment.router_weight}"
        )
    if alignment.next_router_weight != 0:
        weight = alignment.next_router_weight
        terms.append(f"next router {alignment.next_objective} x {weight}")
    if alignment.realign_routers:
        terms.append("re-fitted routers")
    if alignment.token_selection or alignment.token_mask is not None:
        terms.append("on selected tokens")
    return f"AutoRound, {config.iters} iterations, {', '.join(terms)}"


def _bits(found: Inspected) -> str:
    recipe = found.recipe
    if found.plan is not None:
        return f"{len(found.plan.units)} units, made before"
    cost = found.planning_cost
    if cost is None:
        return "none: one scheme in all layers"
    settings = recipe.bit_settings
    return (
        f"to be made: {len(found.units)} units choose of {', '.join(found.choices)}, "
        f"budget {settings['budget']}, for {settings['engine']}; {cost}"
    )
