# SPDX-License-Identifier: Apache-2.0
"""How a model's next tokens are sampled: that decides what counts as its output."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

from torch import nn

from vsraq.metrics import check_sampling

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Sampling:
    """The parameters by which a model's next tokens are sampled.

    Attributes:
        temperature: What the logits are divided by, > 0.
        top_k: How many candidates at most; 0 or None takes the whole vocabulary.
        top_p: Probability that the candidates hold, above 0 to 1; None takes all.

    Raises:
        ValueError: One is not allowed.
    """

    temperature: float = 0.6
    top_k: int | None = 20
    top_p: float | None = 0.95

    def __post_init__(self) -> None:
        check_sampling(**asdict(self))

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return the sampling that a model's publisher recommends, if there is one.

        Args:
            model: A transformers model; one without `generation_config` gives the
                defaults.

        Raises:
            ValueError: A value of the `generation_config` is not allowed.
        """
        return cls.of_config(getattr(model, "generation_config", None))

    @classmethod
    def of_config(cls, config: "GenerationConfig | None") -> Self:
        """Return the same from the `generation_config` itself.

        Each of the three values that it sets counts, if it also sets `do_sample`.
        Values that it leaves open keep the defaults of this class, not those that
        transformers would fill in (1.0, 50, 1.0).
        """
        if getattr(config, "do_sample", None) is not True:
            return cls()
        names = ("temperature", "top_k", "top_p")
        values = {name: getattr(config, name, None) for name in names}
        return cls(**{n: v for n, v in values.items() if v is not None})
