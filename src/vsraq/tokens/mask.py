# SPDX-License-Identifier: Apache-2.0
"""Which calibration tokens the routers are aligned on, kept as a file.

M(x) = 1[Sampled-JSD(x) > tau] (Selective Router Alignment, SRA, Eq. 7), computed once
before tuning.

Shapes: T tokens, S tokens of one sample.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vsraq.tensor_file import read_tensor_file, write_tensor_file
from vsraq.tokens.sampling import Sampling

_FORMAT = "vsraq token mask 1"


@dataclass(frozen=True, eq=False)
class TokenMask:
    """The selected tokens of each calibration sample.

    Attributes:
        masks: One per sample, bool, (S,); samples may differ in length.
        hashes: SHA-256 of the token ids of each sample.
        model: The model that the mask was made for.
        scheme: The quantization scheme whose rounding was compared.
        tau: Tokens are selected whose Sampled-JSD is above it, nats.
        shift_threshold: And whose mean routing shift is above this one, a fraction;
            None if the routing was not compared.
        sampling: How outputs were sampled.
        vsraq: Version that made it.

    Raises:
        ValueError: There are not as many masks as hashes, or one is not a bool vector.
    """

    masks: tuple[Tensor, ...]
    hashes: tuple[str, ...]
    model: str
    scheme: str
    tau: float
    shift_threshold: float | None
    sampling: Sampling
    vsraq: str

    def __post_init__(self) -> None:
        if len(self.masks) != len(self.hashes) or not self.masks:
            raise ValueError(
                f"masks of {len(self.masks)} samples and hashes of {len(self.hashes)}: "
                "allowed is one of each per sample, and at least one sample"
            )
        for index, mask in enumerate(self.masks):
            if mask.dtype != torch.bool or mask.ndim != 1:
                raise ValueError(
                    f"masks[{index}] is {mask.dtype} of shape {tuple(mask.shape)}: "
                    "allowed is torch.bool of shape (tokens,)"
                )

    @classmethod
    def of(
        cls, masks: Sequence[Tensor], token_ids: Sequence[Tensor], **origin: Any
    ) -> Self:
        """Bind masks to the tokens that they were computed from.

        Args:
            masks: One per sample, bool, S elements each.
            token_ids: The ids of the same samples, S elements each.
            **origin: `model`, `scheme`, `tau`, `shift_threshold` and `sampling`.

        Raises:
            ValueError: Masks and token ids differ in number or length.
        """
        lengths = [mask.numel() for mask in masks]
        tokens = [ids.numel() for ids in token_ids]
        if lengths != tokens:
            at = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(lengths, tokens, strict=False))
                    if a != b
                ),
                min(len(lengths), len(tokens)),
            )
            raise ValueError(
                f"masks of {len(masks)} samples and token_ids of {len(token_ids)}, the "
                f"first difference at sample {at}: allowed are as many, of equal "
                "lengths"
            )
        return cls(
            masks=tuple(mask.detach().flatten().cpu() for mask in masks),
            hashes=tuple(hash_tokens(ids) for ids in token_ids),
            vsraq=version("vsraq"),
            **origin,
        )

    @property
    def selected(self) -> int:
        """How many tokens are selected."""
        return sum(int(mask.sum()) for mask in self.masks)

    @property
    def total(self) -> int:
        """How many tokens there are."""
        return sum(mask.numel() for mask in self.masks)

    @property
    def share(self) -> float:
        """Selected tokens, as a fraction of all."""
        return self.selected / max(self.total, 1)

    @property
    def digest(self) -> str:
        """SHA-256 of the selected tokens and what they are, for comparing masks."""
        parts = [
            f"{h}{mask.tolist()}"
            for h, mask in zip(self.hashes, self.masks, strict=True)
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def of_samples(self, samples: Sequence[int]) -> Tensor:
        """Join the masks of some samples, bool, (T,)."""
        return torch.cat([self.masks[i] for i in samples])

    def warning(self) -> str | None:
        """Return what is unusual about the share of selected tokens, or None."""
        if 0.01 <= self.share <= 0.99:
            return None
        if self.share < 0.01:
            meaning = "hardly any token counts for the routers"
            remedy = "lower the thresholds, or calibrate on other text"
        else:
            meaning = "nearly every token counts for the routers"
            remedy = "raise tau, or align on all tokens with a plain objective"
        return (
            f"{self.selected} of {self.total} tokens ({self.share:.2%}) are selected "
            f"with tau={self.tau:g} and shift_threshold={self.shift_threshold}: "
            f"{meaning}; {remedy}"
        )

    def check(self, token_ids: Sequence[Tensor]) -> None:
        """Refuse tokens other than those that the mask was computed from.

        Args:
            token_ids: The ids of each calibration sample, S elements each.

        Raises:
            ValueError: A sample differs; the first one is named.
        """
        remedy = (
            "use the calibration data (dataset, nsamples, seqlen, seed, tokenizer) "
            "that it was made with, or make a new mask"
        )
        for index, ids in enumerate(token_ids[: len(self.masks)]):
            tokens, actual = self.masks[index].numel(), hash_tokens(ids)
            if actual != self.hashes[index]:
                raise ValueError(
                    f"token mask: calibration sample {index} has {ids.numel()} tokens "
                    f"with hash {actual[:12]}, the mask was made for {tokens} with "
                    f"hash {self.hashes[index][:12]}; {remedy}"
                )
        if len(token_ids) != len(self.masks):
            raise ValueError(
                f"token mask: it was made for {len(self.masks)} calibration samples, "
                f"this run has {len(token_ids)}, the same as far as they go; {remedy}"
            )

    def save(self, path: str | Path) -> None:
        """Write the mask as one safetensors file, completely or not at all.

        Args:
            path: The file; its folder must exist.
        """
        tensors = {
            "selected": torch.cat(self.masks),
            "lengths": torch.tensor([mask.numel() for mask in self.masks]),
        }
        metadata = {
            "model": self.model,
            "scheme": self.scheme,
            "tau": repr(self.tau),
            "shift_threshold": json.dumps(self.shift_threshold),
            "sampling": json.dumps(asdict(self.sampling)),
            "vsraq": self.vsraq,
            "hashes": json.dumps(self.hashes),
        }
        write_tensor_file(path, _FORMAT, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a token mask.
        """
        refused = (
            f"token mask {str(path)!r}: not a mask of this version; allowed is a file "
            "that TokenMask.save has written, so make a new one"
        )
        names = ("selected", "lengths")
        tensors, found = read_tensor_file(path, _FORMAT, refused, names)
        selected, lengths = (tensors[name] for name in names)
        return cls(
            masks=tuple(mask.clone() for mask in selected.split(lengths.tolist())),
            hashes=tuple(json.loads(found["hashes"])),
            model=found["model"],
            scheme=found["scheme"],
            tau=float(found["tau"]),
            shift_threshold=json.loads(found["shift_threshold"]),
            sampling=Sampling(**json.loads(found["sampling"])),
            vsraq=found["vsraq"],
        )


def check_mask_file(path: str | Path) -> None:
    """Check that a token mask exists, before a run that reads it later.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"token_mask={str(path)!r}: there is no such file; allowed is one that "
            "`vsraq select-tokens` or TokenMask.save has written, or None to select "
            "tokens in the run"
        )


def check_thresholds(tau: float, shift_threshold: float | None) -> None:
    """Check what decides whether a token is selected.

    Raises:
        ValueError: A threshold is not allowed.
    """
    if not isinstance(tau, int | float) or not 0 <= tau < float("inf"):
        raise ValueError(f"tau={tau!r}: allowed is a finite number >= 0, in nats")
    if shift_threshold is not None and not 0 <= shift_threshold < 1:
        raise ValueError(
            f"shift_threshold={shift_threshold!r}: allowed is a fraction from 0 to "
            "below 1, or None"
        )


def hash_tokens(token_ids: Tensor) -> str:
    """Compute the SHA-256 of token ids as little-endian 64-bit integers, in order.

    Args:
        token_ids: Any integer tensor.
    """
    ids = token_ids.detach().flatten().cpu().to(torch.int64)
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
