# SPDX-License-Identifier: Apache-2.0
"""How a router's rule is learned from the router itself.

A rule is not looked up by a model's name: `learn_rule` runs the router's own code on
random weights, biases and inputs, and keeps the rule that makes the same choices.
Tensors of the router may be on meta; the global random state is not touched.

Shapes: T tokens, E experts, K top-k, H hidden width.
"""

import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vsraq.routers.rule import (
    HIGHEST_LOGITS,
    GroupScore,
    ScoreFunction,
    SelectionRule,
)

_TOKENS = 512  # in a question to a router


@dataclass(frozen=True)
class LearnedRule:
    """The rule by which a router chooses, as far as it is known.

    Attributes:
        rule: The rule, or None if it is unknown.
        correction_bias: Name of the bias that the rule adds, inside the module around
            the router, or None.
        top_k: How many experts it chose, or None if it was not seen choosing.
        unverified: Empty if the rule made every choice that the router made; otherwise
            why that could not be checked.
        calls_linear: Whether the router calls its linear map; some only use its weight.
    """

    rule: SelectionRule | None
    correction_bias: str | None = None
    top_k: int | None = None
    unverified: str = ""
    calls_linear: bool = True


def learn_rule(
    parent: nn.Module,
    owner_name: str,
    linear: str,
    num_experts: int,
    groups: tuple[int, int] = (1, 1),
) -> LearnedRule:
    """Learn a router's rule from its own choices.

    Args:
        parent: The module around the router and its experts.
        owner_name: The router inside it: the module whose forward pass maps hidden
            states to indices of experts.
        linear: The linear map to logits inside the router, "" if it is the router.
        num_experts: E.
        groups: Groups of experts, and how many of them a token may choose from, as the
            configuration has it.

    Returns:
        The simplest rule that chose what the router did. A router that returns logits
        only is assumed to choose the highest, if it has neither a bias nor groups.
    """
    owner = parent.get_submodule(owner_name)
    biases = {
        name: f"{owner_name}.{name}"
        for name, tensor in (*owner.named_parameters(), *owner.named_buffers())
        if name != _inside(linear, "bias")
        and "bias" in name.rpartition(".")[2]
        and tensor.numel() == num_experts
    }
    outer = [
        name
        for name in list(inspect.signature(owner.forward).parameters)[1:]
        if isinstance(tensor := getattr(parent, name, None), Tensor)
        and tensor.numel() == num_experts
    ]
    try:
        answers = [
            _ask(owner, linear, num_experts, biases, outer, index)
            for index in range(len(_BIASES))
        ]
    except _ReturnsLogitsError as error:
        beside = [
            name
            for name, tensor in (
                *parent.named_parameters(recurse=False),
                *parent.named_buffers(recurse=False),
            )
            if "bias" in name and tensor.numel() == num_experts
        ]
        if biases or outer or beside or groups[0] > 1:
            return LearnedRule(None, unverified=str(error))
        return LearnedRule(
            HIGHEST_LOGITS, unverified=f"{error}; the highest are assumed to win"
        )
    except _CannotAskError as error:
        return LearnedRule(None, unverified=str(error))
    top_k = answers[0].chosen.shape[-1]
    calls_linear = answers[0].calls_linear
    if num_experts % groups[0] or num_experts < 2 * groups[0]:
        groups = (1, 1)  # not groups of these experts
    scalars = [v for v in vars(owner).values() if isinstance(v, float) and v > 0]
    names = [*biases.values(), *outer]
    for rule in _rules(len(names) == 1, groups, scalars):
        if all(_agrees(rule, answer) for answer in answers):
            bias = names[0] if rule.biased else None
            return LearnedRule(rule, bias, top_k, "", calls_linear)
    reason = "its choices follow no rule that vsraq knows"
    return LearnedRule(None, None, top_k, reason, calls_linear)


# mean and standard deviation of the correction bias in each question: of the size of
# sigmoids, of the size of softmaxes, and negative, which shows what experts score
# whose group was not chosen
_BIASES = ((0.0, 0.3), (0.0, 0.02), (-1.5, 0.3))


@dataclass(frozen=True)
class _Answer:
    logits: Tensor  # (T, E), raw
    bias: Tensor | None  # (E,)
    chosen: Tensor  # (T, K)
    calls_linear: bool


class _CannotAskError(Exception):
    """A router's own code does not show what it chooses; the message says why."""


class _ReturnsLogitsError(_CannotAskError):
    """The router returns logits, and other code chooses."""


def _inside(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _ask(
    owner: nn.Module,
    linear: str,
    num_experts: int,
    biases: Collection[str],
    outer: Collection[str],
    question: int,
) -> _Answer:
    """Run a router's own code on random numbers."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(question))
    mean, spread = _BIASES[question]
    bias = None
    tensors: dict[str, Tensor] = {}
    for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
        if not tensor.is_floating_point():
            tensors[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        elif name in biases:
            tensors[name] = bias = random(tensor.shape) * spread + mean
        elif tensor.ndim == 2:  # to logits where a sigmoid still bends
            tensors[name] = random(tensor.shape) * 1.5 / tensor.shape[1] ** 0.5
        else:  # gains and scales
            tensors[name] = random(tensor.shape) * 0.1 + 1
    arguments = {}
    parameters = inspect.signature(owner.forward).parameters
    for name, parameter in list(parameters.items())[1:]:
        if name in outer:
            arguments[name] = bias = random(num_experts) * spread + mean
        elif parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise _CannotAskError(f"it chooses by more than its input: by {name}")
    width = next(tensor.shape[1] for tensor in tensors.values() if tensor.ndim == 2)
    hidden = random(_TOKENS, width)
    failure: Exception | None = None
    for shaped in (hidden, hidden.unsqueeze(0)):
        try:
            seen, output = _call(owner, linear, tensors, shaped, arguments)
        except Exception as error:  # foreign code; some take one of the shapes only
            failure = error
            continue
        chosen = _indices(output, num_experts)
        if chosen is None:
            raise _ReturnsLogitsError("it returns logits, and other code chooses")
        logits = F.linear(
            (hidden if seen is None else seen).reshape(_TOKENS, -1),
            tensors[_inside(linear, "weight")],
            tensors.get(_inside(linear, "bias")),
        )
        return _Answer(
            logits[:, :num_experts],
            None if bias is None else bias.flatten(),
            chosen,
            seen is not None,
        )
    raise _CannotAskError(
        f"its code failed on random inputs ({type(failure).__name__}: {failure})"
    )


def _call(
    owner: nn.Module,
    linear: str,
    tensors: Mapping[str, Tensor],
    hidden: Tensor,
    arguments: Mapping[str, Tensor],
) -> tuple[Tensor | None, Any]:
    """Return the linear map's input, None if it was not called, and the output."""
    seen: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    handle = owner.get_submodule(linear).register_forward_pre_hook(record)
    training = owner.training
    owner.eval()  # some add noise while training
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            output = torch.func.functional_call(
                owner, dict(tensors), (hidden.clone(),), dict(arguments)
            )
    finally:
        owner.train(training)
        handle.remove()
    return seen[0].float() if seen else None, output


def _indices(output: Any, num_experts: int) -> Tensor | None:
    """Find the indices (T, K) among a router's outputs, if there are any."""
    outputs = output if isinstance(output, tuple | list) else (output,)
    for value in outputs:
        if (
            isinstance(value, Tensor)
            and not value.is_floating_point()
            and value.dtype != torch.bool
            and value.ndim >= 2
            and value.numel() == _TOKENS * value.shape[-1]
            and value.shape[-1] <= num_experts
        ):
            if not 0 <= int(value.min()) <= int(value.max()) < num_experts:
                raise _CannotAskError(
                    f"it returns indices outside of its {num_experts} experts"
                )
            return value.reshape(_TOKENS, -1)
    return None


def _rules(
    biased: bool, groups: tuple[int, int], scalars: list[float]
) -> Iterator[SelectionRule]:
    """Yield every rule to try, the simplest first."""
    transforms: list[tuple[float, float | None]] = [(1.0, None)]
    transforms += [(s, None) for s in scalars]
    transforms += [(1.0, s) for s in scalars]
    functions: tuple[ScoreFunction, ...] = get_args(ScoreFunction)
    for scale, softcap in transforms:
        for with_bias in (False, True)[: 1 + biased]:
            for function in functions:
                rule = partial(
                    SelectionRule,
                    score_function=function,
                    biased=with_bias,
                    logit_scale=scale,
                    logit_softcap=softcap,
                )
                yield rule()
                if groups[0] > 1:
                    for group_score in get_args(GroupScore):
                        for masked in (-math.inf, 0.0):
                            yield rule(
                                num_groups=groups[0],
                                topk_groups=groups[1],
                                group_score=group_score,
                                masked_score=masked,
                            )


def _agrees(rule: SelectionRule, answer: _Answer) -> bool:
    top_k = answer.chosen.shape[-1]
    scores = rule.scores(answer.logits, answer.bias)
    best = scores.topk(min(top_k + 1, scores.shape[-1]), dim=-1)
    chosen = best.indices[:, :top_k].sort(dim=-1).values
    equal = (chosen == answer.chosen.sort(dim=-1).values).all(-1)
    if best.values.shape[-1] > top_k:  # two scores may be equal up to rounding
        equal |= best.values[:, top_k - 1] - best.values[:, top_k] < 1e-6
    return bool(equal.all())
