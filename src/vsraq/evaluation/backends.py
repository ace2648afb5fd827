# SPDX-License-Identifier: Apache-2.0
"""What runs a model: transformers, or vLLM."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from vsraq.analysis.forward import evaluating
from vsraq.analysis.sources import LoadOptions, ModelSource
from vsraq.evaluation.results import Backend
from vsraq.evaluation.wikitext import WindowNLL, nll_of, nll_of_engine
from vsraq.tokens import Sampling

BATCH_SIZE = 8


@dataclass(frozen=True)
class Opened:
    """A model that is ready.

    Attributes:
        nll: Computes the mean NLL of windows.
        lm: Gives the model as lm-eval's `LM`; made once, on the first call.
        sampling: How its publisher samples.
    """

    nll: WindowNLL
    lm: Callable[[], Any]
    sampling: Sampling


@dataclass(frozen=True)
class BackendOptions:
    """How models are run.

    Attributes:
        backend: What runs them.
        load: How they are loaded.
        batch_size: Sequences at once; None is 8 in transformers, and vLLM's own choice.
        think_end_token: What ends the reasoning.
    """

    backend: Backend
    load: LoadOptions
    batch_size: int | None
    think_end_token: str | None

    @property
    def windows_at_once(self) -> int:
        """How many windows of a text go through together."""
        return self.batch_size or BATCH_SIZE


def check_backend(options: BackendOptions, sources: dict[str, ModelSource]) -> None:
    """Check that the models can be run so.

    Raises:
        RuntimeError: vLLM or lm-eval is not installed.
        ValueError: vLLM cannot take a model or an option.
    """
    if options.backend == "hf":
        return
    if options.backend != "vllm":
        raise ValueError(f"backend={options.backend!r}: allowed are 'hf' and 'vllm'")
    for package, command in (("vllm", "vllm"), ("lm_eval", "vsraq[evaluate]")):
        if find_spec(package) is None:
            raise RuntimeError(
                f"backend='vllm': {package} is not installed; run `pip install "
                f"{command}`, or take backend='hf'"
            )
    if options.load.device is not None:
        raise ValueError(
            f"device={options.load.device!r}: vLLM takes the devices that "
            "CUDA_VISIBLE_DEVICES names; allowed is None with backend='vllm'"
        )
    for name, source in sources.items():
        if source.folder is None:
            raise ValueError(
                f"{name}: a model in memory, but vLLM loads folders; allowed is a "
                "path, or backend='hf'"
            )


@contextmanager
def opened(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    options: BackendOptions,
) -> Iterator[Opened]:
    """Yield a model; it is gone once nobody holds what was yielded."""
    run = _in_transformers if options.backend == "hf" else _in_vllm
    with run(source, tokenizer, options) as found:
        yield found


@contextmanager
def _in_transformers(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, options: BackendOptions
) -> Iterator[Opened]:
    with source.opened(options.load) as model, evaluating(model):
        lm = cache(partial(_transformers_lm, model, tokenizer, options))
        yield Opened(nll_of(model), lm, Sampling.of(model))


def _transformers_lm(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: BackendOptions
) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",  # also for a model with images around it
        batch_size=options.windows_at_once,
        think_end_token=options.think_end_token,
    )


@contextmanager
def _in_vllm(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, options: BackendOptions
) -> Iterator[Opened]:
    from lm_eval.models.vllm_causallms import VLLM

    assert source.folder is not None
    remote = options.load.trust_remote_code
    dtype = options.load.dtype
    lm = VLLM(
        pretrained=str(source.folder),
        dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
        batch_size=options.batch_size or "auto",
        trust_remote_code=remote,
        think_end_token=options.think_end_token,
    )
    config = None
    if (source.folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(source.folder)
    yield Opened(nll_of_engine(lm), partial(_same, lm), Sampling.of_config(config))
    del lm.model  # its engine ends with it


def _same(lm: Any) -> Any:
    return lm
