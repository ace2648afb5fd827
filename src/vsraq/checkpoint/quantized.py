# SPDX-License-Identifier: Apache-2.0
"""Compare the quantized layers of an export with what the original holds."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vsraq.checkpoint.bounds import Sums, judge
from vsraq.checkpoint.formats.format import Scheme, TensorSpec, some_outputs
from vsraq.checkpoint.names import OwnNames
from vsraq.checkpoint.pairing import Pairs, Parts, Piece
from vsraq.checkpoint.reader import Checkpoint

_BATCH = 1 << 20  # weights that go through together: their numbers stay in the cache


class QuantizedLayers:
    """Check the quantized layers of an export.

    Layers of one shape go through in batches, large ones in pieces of their rows.

    Args:
        export: The export.
        pairs: What belongs to what.
        parts: Of the original.
        own_name: The module's name of a stored one; configs use either.
        tuned: The tuned layers by stored name, or empty: then the original's weights
            are compared, within what rounding and clipping may do.

    Attributes:
        faults: What was found.
        compared: Number of layers that were compared with tuned ones.
    """

    def __init__(
        self,
        export: Checkpoint,
        pairs: Pairs,
        parts: Parts,
        own_name: OwnNames,
        tuned: Mapping[str, nn.Linear],
    ) -> None:
        self.faults: list[str] = []
        self.compared = 0
        self._export = export
        self._layers = pairs.layers
        self._parts = parts
        self._own_name = own_name
        self._tuned = tuned
        self._waiting: dict[
            tuple[Scheme, int, int], list[tuple[str, Tensor, dict[str, Tensor]]]
        ] = defaultdict(list)
        self._asymmetric: list[str] = []
        self._off_middle = False

    def check(self, piece: Piece) -> None:
        """Check one layer, or put it into the batch of its shape."""
        layer = piece.layer
        scheme = self._export.schemes(layer, self._own_name(layer))
        if scheme is None:
            self.faults.append(
                f"{layer}: quantized, but the config declares it full precision"
            )
            return
        found = self._complete(layer, scheme, self._parts.shapes(piece))
        if found is None:
            return
        (rows, inputs), layout = found
        tensors = {
            suffix: self._export[f"{layer}.{suffix}"].reshape(spec.shape)
            for suffix, spec in layout.items()
        }
        if not self._sound(layer, scheme, layout, tensors, inputs):
            return
        if self._tuned:
            self._compare(layer, scheme.format.dequantize(tensors, scheme))
        elif piece.part is None:
            weight = self._parts.whole(piece.source)
            self._queue(layer, scheme, weight, tensors)
        else:
            like = scheme.format.dequantize(tensors, scheme)
            part = self._parts.get(piece, like)
            if part is None:
                self.faults.append(
                    f"{layer}: no part of the original is {rows} x {inputs}"
                )
            else:
                self._queue(layer, scheme, part, tensors)

    def finish(self) -> None:
        """Check the layers that still wait in a batch."""
        for key in list(self._waiting):
            self._flush(key)
        if self._asymmetric and not self._off_middle:
            self.faults.append(
                f"{self._asymmetric[0]} and {len(self._asymmetric) - 1} others: "
                "declared asymmetric, but every zero point is the middle level"
            )

    def _complete(
        self,
        layer: str,
        scheme: Scheme,
        shapes: list[tuple[int, ...]],
    ) -> tuple[tuple[int, int], dict[str, TensorSpec]] | None:
        """The layer's shape and layout, if all its tensors are stored like that."""
        faults: list[str] = []
        for shape in shapes:
            if len(shape) != 2:
                faults = [f"{layer}: quantized, but the original is {shape}"]
                continue
            if scheme.group_size > 0 and shape[1] % scheme.group_size:
                faults = [
                    f"{layer}: group_size {scheme.group_size} does not divide its "
                    f"{shape[1]} inputs, so loaders refuse it; give this layer another "
                    "one in layer_config"
                ]
                continue
            layout = scheme.format.layout(scheme, shape[0], shape[1])
            faults = self._wrong(layer, scheme, layout)
            if not faults:
                return (shape[0], shape[1]), layout
        self.faults += faults
        return None

    def _wrong(
        self, layer: str, scheme: Scheme, layout: Mapping[str, TensorSpec]
    ) -> list[str]:
        faults = []
        for suffix, spec in layout.items():
            name = f"{layer}.{suffix}"
            if name not in self._export:
                faults.append(f"{name}: missing")
                continue
            header = self._export.header(name)
            if not spec.allows(header.shape):
                faults.append(
                    f"{name}: shape {header.shape}, but the original's shape and the "
                    f"config ask for {spec.shape}"
                )
            elif header.dtype not in spec.dtypes:
                faults.append(
                    f"{name}: dtype {header.dtype}, allowed is "
                    f"{' or '.join(sorted(spec.dtypes))}"
                )
        known = {*layout, *scheme.format.optional}
        faults += [
            f"{layer}.{suffix}: belongs to no layer of this format"
            for suffix in sorted(self._layers[layer] - known)
        ]
        return faults

    def _sound(
        self,
        layer: str,
        scheme: Scheme,
        layout: Mapping[str, TensorSpec],
        tensors: Mapping[str, Tensor],
        inputs: int,
    ) -> bool:
        """Whether scales, zero points and all that only the format knows are valid."""
        before = len(self.faults)
        for suffix, spec in layout.items():
            if spec.is_scale:
                self._check_scale(f"{layer}.{suffix}", tensors[suffix])
        self._check_zero_points(layer, scheme, tensors)
        optional = {
            suffix: self._export[f"{layer}.{suffix}"]
            for suffix in scheme.format.optional
            if f"{layer}.{suffix}" in self._export
        }
        found = scheme.format.faults({**tensors, **optional}, scheme, inputs)
        self.faults += [f"{layer}.{fault}" for fault in found]
        return len(self.faults) == before

    def _check_zero_points(
        self, layer: str, scheme: Scheme, tensors: Mapping[str, Tensor]
    ) -> None:
        """Zero points are the middle level if, and only if, the config says so.

        In one asymmetric layer they may all be; not in every asymmetric layer, which
        `finish` finds.
        """
        off = scheme.format.zero_points(tensors, scheme)
        if off is None:
            return
        off_middle = bool(off.any())
        if not scheme.sym:
            self._off_middle |= off_middle
            self._asymmetric.append(layer)
        elif off_middle:
            self.faults.append(
                f"{layer}: declared symmetric, but it has zero points that are not "
                "the middle level"
            )

    def _check_scale(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype == torch.uint8:  # exponents; 255 is NaN
            if bool((tensor == 255).any()):
                self.faults.append(f"{name}: has a non-finite scale")
            return
        values = tensor.float()
        if not torch.isfinite(values).all():
            self.faults.append(f"{name}: has a non-finite scale")
        elif zeros := int((values == 0).sum()):
            self.faults.append(f"{name}: {zeros} of {values.numel()} scales are zero")

    def _compare(self, layer: str, exported: Tensor) -> None:
        """Compare with the tuned layer, bit for bit."""
        linear = self._tuned.get(layer)
        if linear is None:
            self.faults.append(f"{layer}: the tuned reference has no such layer")
            return
        self.compared += 1
        tuned = linear.weight.detach().cpu()
        if exported.shape != tuned.shape:
            self.faults.append(
                f"{layer}: shape {tuple(exported.shape)}, tuned {tuple(tuned.shape)}"
            )
        elif not torch.equal(exported.to(tuned.dtype), tuned):
            error = (exported - tuned.float()).abs().max().item()
            self.faults.append(
                f"{layer}: dequantized weight differs from the tuned one by up to "
                f"{error:.3g}"
            )

    def _queue(
        self, layer: str, scheme: Scheme, weight: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        rows, inputs = weight.shape
        key = (scheme, rows, inputs)
        self._waiting[key].append((layer, weight, tensors))
        if len(self._waiting[key]) * rows * inputs >= _BATCH:
            self._flush(key)

    def _flush(self, key: tuple[Scheme, int, int]) -> None:
        scheme, rows, inputs = key
        batch = self._waiting.pop(key)
        layout = scheme.format.layout(scheme, rows, inputs)
        weights = _stack([weight for _, weight, _ in batch])
        tensors = {
            suffix: _stack([stored[suffix] for _, _, stored in batch])
            for suffix in batch[0][2]
        }
        chunk = max(32, _BATCH // (inputs * len(batch)) // 32 * 32)
        sums = []
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            some = some_outputs(tensors, layout, start, stop, rows)
            numbers = scheme.format.dequantize(some, scheme)
            groups = scheme.groups(inputs)
            sums.append(Sums.of(weights[:, start:stop], numbers, groups))
        errors = judge(
            Sums.joined(sums),
            scheme.format.step(scheme),
            one_scale=scheme.group_size == 0,
        )
        for index in errors.suspects():
            self.faults.append(f"{batch[index][0]}: {errors.fault(index)}")


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
