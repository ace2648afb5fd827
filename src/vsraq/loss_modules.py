# SPDX-License-Identifier: Apache-2.0
"""The losses as modules, for training loops of your own: a mean over tokens.

Each has the hyper-parameters and the defaults of its function in `vsraq.losses`; a test
compares them.
"""

from typing import Any, Literal

from torch import Tensor, nn

from vsraq import losses
from vsraq.hyperparameters import check_hyperparameters
from vsraq.losses import TokenLoss, reduce_tokens
from vsraq.ranks import FpLogits


class RouterLoss(nn.Module):
    """A per-token loss with its hyper-parameters, reduced to a scalar.

    Args:
        token_loss: A function of `vsraq.losses`, or one with its signature.
        **hyperparameters: Its keyword arguments, checked here once.

    Raises:
        ValueError: A hyper-parameter is not allowed.
    """

    def __init__(self, token_loss: TokenLoss, **hyperparameters: Any) -> None:
        super().__init__()
        check_hyperparameters(**hyperparameters)
        self.token_loss = token_loss
        self.hyperparameters = hyperparameters

    def forward(
        self, q_logits: Tensor, fp_logits: FpLogits, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the mean loss over the tokens whose `mask` is 1.

        Args:
            q_logits: Quantized router logits, (..., E).
            fp_logits: Full-precision router logits, (..., E) or ranked.
            mask: (...), or None when every token counts.

        Returns:
            A scalar.

        Raises:
            ValueError: A shape is not allowed.
        """
        loss = self.token_loss(q_logits, fp_logits, **self.hyperparameters)
        return reduce_tokens(loss, mask)

    def extra_repr(self) -> str:
        """Return the hyper-parameters, for `repr`."""
        return ", ".join(f"{k}={v!r}" for k, v in self.hyperparameters.items())


class TopKMSELoss(RouterLoss):
    """`topk_mse` as a module (VSRAQ Eq. 7; SRA Table 3 for other multipliers)."""

    def __init__(self, top_k: int, multiplier: int | Literal["all"] = 1) -> None:
        super().__init__(losses.topk_mse, top_k=top_k, multiplier=multiplier)


class SigmoidAwareLoss(RouterLoss):
    """`sigmoid_aware_mse` as a module (VSRAQ Eq. 8-10)."""

    def __init__(self, top_k: int, gamma: float = 1.0, eps: float = 1e-3) -> None:
        super().__init__(losses.sigmoid_aware_mse, top_k=top_k, gamma=gamma, eps=eps)


class RankLoss(RouterLoss):
    """`rank` as a module (VSRAQ Eq. 13)."""

    def __init__(self, top_k: int, margin: float = 0.0) -> None:
        super().__init__(losses.rank, top_k=top_k, margin=margin)


class MarginLoss(RouterLoss):
    """`margin` as a module (VSRAQ Eq. 14-15)."""

    def __init__(self, top_k: int, boundary: int = 1) -> None:
        super().__init__(losses.margin, top_k=top_k, boundary=boundary)


class PairwiseMarginLoss(RouterLoss):
    """`pairwise_margin` as a module (a reconstruction of DREAM-MoE)."""

    def __init__(self, top_k: int, boundary: int = 1) -> None:
        super().__init__(losses.pairwise_margin, top_k=top_k, boundary=boundary)


class RouterKLLoss(RouterLoss):
    """`router_kl` as a module (EAQuant)."""

    def __init__(self, top_m: int | None = None) -> None:
        super().__init__(losses.router_kl, top_m=top_m)


class MSEKLLoss(RouterLoss):
    """`mse_kl` as a module (EAQuant)."""

    def __init__(self, kl_weight: float = 1.0, top_m: int | None = None) -> None:
        super().__init__(losses.mse_kl, kl_weight=kl_weight, top_m=top_m)


class SRALoss(RouterLoss):
    """Top-3K MSE over the selected tokens (SRA Eq. 8-9); its mask is required."""

    def __init__(self, top_k: int, multiplier: int | Literal["all"] = 3) -> None:
        super().__init__(losses.topk_mse, top_k=top_k, multiplier=multiplier)

    def forward(
        self, q_logits: Tensor, fp_logits: FpLogits, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the mean loss over the selected tokens.

        Raises:
            ValueError: `mask` is None, or a shape is not allowed.
        """
        if mask is None:
            raise ValueError(
                "mask=None: SRALoss aligns selected tokens only, so pass their mask, "
                "or use TopKMSELoss(top_k, multiplier=3) for all tokens"
            )
        return super().forward(q_logits, fp_logits, mask)


class VSRAQLoss(RouterLoss):
    """`vsraq` as a module (VSRAQ Eq. 17, defaults of Table 1)."""

    def __init__(
        self,
        top_k: int,
        boundary: int = 1,
        alpha: float = 0.3,
        gamma: float = 1.0,
        eps: float = 1e-3,
        rank_margin: float = 0.0,
        rank_weight: float = 0.01,
        margin_weight: float = 0.05,
    ) -> None:
        super().__init__(
            losses.vsraq,
            top_k=top_k,
            boundary=boundary,
            alpha=alpha,
            gamma=gamma,
            eps=eps,
            rank_margin=rank_margin,
            rank_weight=rank_weight,
            margin_weight=margin_weight,
        )
