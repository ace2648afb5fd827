# SPDX-License-Identifier: Apache-2.0
"""How far a dequantized weight may lie from the original one.

Rounding to nearest with a step D leaves an error of D / sqrt(12), tuned rounding moves
it by a step at most (SignRound shifts by half a step before it rounds), and tuned
clipping shrinks what lies outside. So the error e = dq - w of a part of a weight is
split into what lies along w and the rest,

    slope = 1 + <w, e> / <w, w>,     rest^2 = <e, e> / <w, w> - (slope - 1)^2,

and judged in units that do not depend on the size of the weights:

    slope in [low, high],            rest <= factor * r + 2 k max(0, 1 - slope),

where r = D / sqrt(12) over the root mean square of w, and D follows from the format's
levels and the largest weight of each group. Clipping takes from each group's largest
weights: if it took the share c from the largest weight M of each group alone, it would
lower the slope by c sum(M^2) / <w, w>, and add c sqrt(sum(M^2) / <w, w>) to the rest.
That is k = sqrt(<w, w> / sum(M^2)) times as much; groups differ in c, so twice that is
allowed. It matters at 8 bits, where a step is small beside what is clipped. A weight of
another layer, or a random one, has a slope of about 0, whatever its scales; scales that
are 10 % off move the slope by 0.1. A layer is judged as a whole, row by row, and group
by group, each with the margin that its number of weights needs.

Shapes: N layers at once, O outputs, I inputs, G groups of inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SLOPE = (0.5, 1.05)  # of a layer
REST = 3.0
ROW_SLOPE = (0.35, 1.5)  # of one row: a few weights may all be rounded one way
ROW_REST = 6.0
CLIPPED = 2.0  # times what clipping adds to the rest if it is equal in all groups
GROUP_STEPS = 2.0  # root mean square of a group's error, in steps,
GROUP_CLIP = 0.5  # and beyond them in largest weights
_TINY = 1e-5  # AutoRound's smallest scale
_NEGLIGIBLE = 1e-3  # rows below this share of the layer's largest weight may vanish


@dataclass(frozen=True)
class Errors:
    """Errors of N layers of one shape.

    Attributes:
        slope: (N,), of the layer as a whole.
        rest: (N,), over r.
        row_slopes: (N, O); 1 for rows that are too small to be judged.
        row_rests: (N, O); 0 for these.
        groups: (N,), the worst group's root mean square error beyond its steps, over
            its largest weight.
        finite: (N,), whether every dequantized weight is.
    """

    slope: Tensor
    rest: Tensor
    row_slopes: Tensor
    row_rests: Tensor
    groups: Tensor
    finite: Tensor

    def suspects(self) -> list[int]:
        """Indices of the layers that have a fault."""
        low, high = SLOPE
        good = self.finite & (self.slope >= low) & (self.slope <= high)
        good &= (self.rest <= REST) & (self.groups <= GROUP_CLIP)
        low, high = ROW_SLOPE
        rows = (self.row_slopes >= low) & (self.row_slopes <= high)
        good &= (rows & (self.row_rests <= ROW_REST)).all(-1)
        return [int(index) for index in (~good).nonzero().flatten()]

    def fault(self, index: int) -> str | None:
        """What is wrong with a layer, or None."""
        if not self.finite[index]:
            return "its dequantized weight is not finite"
        slope, rest = float(self.slope[index]), float(self.rest[index])
        if not SLOPE[0] <= slope <= SLOPE[1] or not rest <= REST:
            return (
                f"its dequantized weight is not the original's: slope {slope:.3g} "
                f"(allowed {SLOPE[0]} to {SLOPE[1]}), rest {rest:.3g} of the rounding "
                f"error (allowed {REST})"
            )
        slopes, rests = self.row_slopes[index], self.row_rests[index]
        low, high = ROW_SLOPE
        bad = ~((slopes >= low) & (slopes <= high) & (rests <= ROW_REST))
        if bad.any():
            row = int(bad.nonzero()[0])
            return (
                f"{int(bad.sum())} of its {len(bad)} rows are not the original's, the "
                f"first is row {row}: slope {float(slopes[row]):.3g} (allowed {low} to "
                f"{high}), rest {float(rests[row]):.3g} (allowed {ROW_REST})"
            )
        group = float(self.groups[index])
        if not group <= GROUP_CLIP:
            return (
                f"a group of its weights is off by {group:.3g} of its largest weight "
                f"beyond {GROUP_STEPS:g} steps (allowed {GROUP_CLIP})"
            )
        return None


@dataclass(frozen=True)
class Sums:
    """Sums over the weights of each group, (N, O, G).

    Attributes:
        ww: Of w^2.
        ee: Of e^2.
        we: Of w e.
        largest: The largest |w|.
        size: Weights of a group.
    """

    ww: Tensor
    ee: Tensor
    we: Tensor
    largest: Tensor
    size: int

    @classmethod
    def of(cls, weight: Tensor, dequantized: Tensor, groups: int) -> "Sums":
        """Compare dequantized weights with the original ones.

        Args:
            weight: The original, (N, O, I).
            dequantized: The same of the export, float32.
            groups: G.
        """
        # GPTQ's packing gives the transpose; numbers far apart in memory are slow
        by_input = not dequantized.is_contiguous() and dequantized.mT.is_contiguous()
        if by_input:
            weight, dequantized = weight.mT.contiguous(), dequantized.mT
        dim = -2 if by_input else -1
        w = weight.float().unflatten(dim, (groups, -1))
        e = dequantized.unflatten(dim, (groups, -1)) - w
        # torch's own vecdot and vector_norm are slow along short dimensions
        found = [(a * b).sum(dim) for a, b in ((w, w), (e, e), (w, e))]
        found.append(w.abs().amax(dim))
        ww, ee, we, largest = (x.mT if by_input else x for x in found)
        return cls(ww=ww, ee=ee, we=we, largest=largest, size=w.shape[dim])

    @classmethod
    def joined(cls, parts: list["Sums"]) -> "Sums":
        """Join sums of the same layers, each over some of their rows."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            ww=torch.cat([part.ww for part in parts], dim=1),
            ee=torch.cat([part.ee for part in parts], dim=1),
            we=torch.cat([part.we for part in parts], dim=1),
            largest=torch.cat([part.largest for part in parts], dim=1),
            size=parts[0].size,
        )


def judge(sums: Sums, step: float, *, one_scale: bool) -> Errors:
    """The errors of each layer, in the units of the bounds.

    Args:
        sums: Of N layers.
        step: The format's step, over the largest weight of a group.
        one_scale: Whether a layer has one scale for all of its weights.
    """
    largest = sums.largest
    layer_largest = largest.amax((-1, -2), keepdim=True)
    if one_scale:
        largest = layer_largest.expand_as(largest)
    steps = sums.size / 12 * (step * largest + _TINY).square()  # energy of rounding
    slope, rest = _slope_and_rest(sums, steps, (-1, -2))
    row_slopes, row_rests = _slope_and_rest(sums, steps, (-1,))
    floor = _NEGLIGIBLE * layer_largest + 20 * _TINY
    small = sums.largest.amax(-1, keepdim=True) < floor
    rms = (sums.ee / sums.size).sqrt()
    beyond = (rms - GROUP_STEPS * (step * largest + _TINY)) / largest.maximum(floor)
    return Errors(
        slope=slope,
        rest=rest,
        row_slopes=row_slopes.masked_fill(small[..., 0], 1),
        row_rests=row_rests.masked_fill(small[..., 0], 0),
        groups=beyond.flatten(1).amax(-1),
        finite=sums.ee.isfinite().flatten(1).all(-1),
    )


def _slope_and_rest(
    sums: Sums, steps: Tensor, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    ww, ee, we, steps = (x.sum(dims) for x in (sums.ww, sums.ee, sums.we, steps))
    zero = ww == 0
    energy = ww.masked_fill(zero, 1)
    along = we / energy
    peaks = sums.largest.square().sum(dims).masked_fill(zero, 1)
    clipped = CLIPPED * (energy / peaks).sqrt() * along.clamp(max=0)
    rest = (ee / energy - along.square()).clamp(min=0).sqrt() + clipped
    return (1 + along).masked_fill(zero, 1), rest / (steps / energy).sqrt()
