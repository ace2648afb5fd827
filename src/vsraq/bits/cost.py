# SPDX-License-Identifier: Apache-2.0
"""What it costs to measure the units of a model: memory and time, before it is done."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from vsraq.bits.allocation import MORE_ROUTING

_PLANS = len(MORE_ROUTING)  # measured as a whole, at most
_VALUE_BYTES = 4  # float32


@dataclass(frozen=True)
class PlanningCost:
    """The cost of measuring, in its parts.

    With S streams of N tokens and hidden width H, the states take S N H values of
    float32. A stream passes the blocks from that of its unit on, and the output head.
    Each pass of a block multiplies with what a token reads of it, and reads the block's
    weights.

    Attributes:
        streams: S.
        passes: The most passes of a block, of all streams and plans.
        tokens: N.
        hidden: H.
        block_weights: Weights of a block, on the mean.
        read_weights: Those that one token reads, on the mean.
        head_weights: Weights of the output projection.
    """

    streams: int
    passes: int
    tokens: int
    hidden: int
    block_weights: float
    read_weights: float
    head_weights: int

    @classmethod
    def of(
        cls,
        starts: Sequence[int],
        blocks: int,
        *,
        tokens: int,
        hidden: int,
        block_weights: float,
        read_weights: float,
        head_weights: int,
    ) -> Self:
        """Compute the cost of a plan.

        Args:
            starts: The index of the first block of each stream.
            blocks: How many blocks the model has.
            tokens: See the attributes, as those below.
            hidden: H.
            block_weights: Weights of a block.
            read_weights: Those that one token reads.
            head_weights: Weights of the output projection.
        """
        # full precision twice, with the units and with the plans
        passes = sum(blocks - start for start in starts) + (2 + _PLANS) * blocks
        return cls(
            len(starts),
            passes,
            tokens,
            hidden,
            block_weights,
            read_weights,
            head_weights,
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of the hidden states of all streams, on the CPU."""
        # full precision before and after a block, and what a stream becomes
        return (self.streams + 3) * self.tokens * self.hidden * _VALUE_BYTES

    @property
    def operations(self) -> float:
        """Floating-point operations: 2 per weight and token."""
        blocks = 2.0 * self.passes * self.tokens * self.read_weights
        return blocks + 2.0 * self._ends * self.tokens * self.head_weights

    @property
    def _ends(self) -> int:
        """Streams that reach the output head; full precision does it twice."""
        return self.streams + _PLANS + 2

    @property
    def traffic(self) -> float:
        """Bytes of weights that are read: a block's, once per pass."""
        return float(self.passes) * self.block_weights * _VALUE_BYTES

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        """Estimate the time.

        Args:
            operations_per_second: What the device reaches in matrix products.
            bytes_per_second: Its memory's bandwidth.
        """
        computing = self.operations / operations_per_second
        return computing + self.traffic / bytes_per_second

    def within(self, state_bytes: int, seqlen: int) -> Self:
        """Return the cost with as many tokens as a limit allows.

        Args:
            state_bytes: The most that the states may take.
            seqlen: Tokens of a sample: there are whole samples only. 1 where samples
                have lengths of their own.

        Raises:
            ValueError: Not even one sample fits.
        """
        of_a_token = self.state_bytes // self.tokens
        tokens = min(self.tokens, state_bytes // of_a_token // seqlen * seqlen)
        if tokens < 1:
            raise ValueError(
                f"state_memory={state_bytes:,}: {self.streams} streams of one sample "
                f"of {seqlen} tokens take {of_a_token * seqlen:,} bytes; allowed is "
                "that or more, a shorter seqlen, or fewer options"
            )
        return replace(self, tokens=tokens)

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.streams} streams of {self.tokens:,} tokens, {self.passes} passes "
            f"of a block: {self.state_bytes / 2**20:,.0f} MiB of hidden states, "
            f"{self.operations / 1e12:,.3g} T operations"
        )
