# SPDX-License-Identifier: Apache-2.0
"""From the words that exports pack to numbers, and from those to weights.

All functions take leading batch dimensions, so that layers of one shape go through
together. Shapes: O outputs, I inputs, G groups of inputs that share a scale.
"""

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1_SIGNED = torch.cat([E2M1, -E2M1])
# AutoAWQ stores the eight values of a word in this order
_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def unpack_last(packed: Tensor, bits: int) -> Tensor:
    """A little-endian bit stream along the last dimension -> one number each.

    Args:
        packed: (..., W), int32 words.
        bits: Of one number, 2 to 8.

    Returns:
        (..., W * 32 / bits), uint8.
    """
    octets = packed.contiguous().view(torch.uint8)  # (..., 4 W), little-endian
    if bits == 8:
        return octets
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((octets.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
    count = octets.shape[-1] * 8 // bits
    start = torch.arange(count) * bits
    octet, shift = start // 8, start % 8
    low = octets[..., octet].short() >> shift
    following = octets[..., (octet + 1).clamp(max=octets.shape[-1] - 1)].short()
    values = (low | (following << (8 - shift))) & ((1 << bits) - 1)
    return values.to(torch.uint8)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The same along the last dimension but one: (..., W, N) -> (..., I, N).

    GPTQ packs the inputs of a layer like this.
    """
    if 8 % bits != 0:
        return unpack_last(packed.mT, bits).mT
    octets = packed.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    octets = octets.movedim(-1, -2)  # (..., W, 4, N)
    if bits < 8:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
        octets = (octets.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)
        octets = octets.flatten(-3, -2)
    return octets.flatten(-3, -2)


def unpack_awq(packed: Tensor, bits: int) -> Tensor:
    """AWQ's order of eight numbers: (..., W) -> (..., W * 32 / bits)."""
    values = unpack_last(packed, bits)
    return values.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2)


def e2m1(packed: Tensor) -> Tensor:
    """4-bit floats, the low nibble first: (..., N) uint8 -> (..., 2 N) float32."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return _E2M1_SIGNED[nibbles.int()]


def e8m0(exponents: Tensor) -> Tensor:
    """Powers of two with a bias of 127, uint8 -> float32."""
    return torch.exp2(exponents.float() - 127)


def scale_levels(levels: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """(level - zero point) * scale.

    Args:
        levels: (..., I, O).
        zeros: (..., G, O), or a single number.
        scales: (..., G, O).

    Returns:
        (..., I, O), float32.
    """
    groups = scales.shape[-2]
    values = levels.unflatten(-2, (groups, -1)).float()
    values -= zeros.unsqueeze(-2) if zeros.ndim else zeros
    values *= scales.float().unsqueeze(-2)
    return values.flatten(-3, -2)


def scale_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """(..., O, I) times one scale per block, (..., O, G)."""
    blocks = values.unflatten(-1, (scales.shape[-1], -1))
    return (blocks * scales.unsqueeze(-1)).flatten(-2)
