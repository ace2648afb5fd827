# SPDX-License-Identifier: Apache-2.0
"""Our data sets in AutoRound: by name, in any script that imports vsraq.

The names are registered with `register_dataset`. AutoRound hands a registered data set
neither its options nor the number of samples, and tries a failed one again in another
process, and then with another text. So `get_dataset` is wrapped: names of which at
least one is ours are read here, all others go through unchanged.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import wrapt
from auto_round import calib_dataset
from datasets import Dataset
from torch import Tensor, nn

from vsraq.calibration import ALIASES, MIXTURES, Part, draw, parse_names
from vsraq.calibration.balance import BalancedChoice, choose_balanced, sample_loads
from vsraq.calibration.mixture import SourceReport
from vsraq.calibration.names import FILES
from vsraq.calibration.sample_file import write_samples
from vsraq.strict import did_you_mean

PAPER_SAMPLES = 512  # of the VSRAQ paper's mixture
_OURS = "vsraq"  # marks what we have registered


@dataclass(frozen=True)
class CalibrationSamples:
    """Samples of equal length.

    Attributes:
        input_ids: Token ids, (N, S) int64.
        sources: What became of the documents of each source.
        balance: What the balanced choice changed; None without it.
    """

    input_ids: Tensor
    sources: tuple[SourceReport, ...]
    balance: BalancedChoice | None = None

    def save(self, path: str | Path) -> str:
        """Write the samples into a .jsonl file, whole or not at all.

        Returns:
            What to give to AutoRound, or write into a recipe, as `dataset`.

        Raises:
            ValueError: The path is none that AutoRound's names can hold.
        """
        return write_samples(path, self.input_ids.tolist())

    def __len__(self) -> int:
        return len(self.input_ids)

    def __str__(self) -> str:
        lines = [str(source) for source in self.sources]
        return "\n".join(lines if self.balance is None else [*lines, str(self.balance)])


def calibration_samples(
    dataset: str,
    tokenizer: Any,
    *,
    nsamples: int = PAPER_SAMPLES,
    seqlen: int = 2048,
    seed: int = 42,
    balance_experts: bool = False,
    model: nn.Module | None = None,
    candidates: int | None = None,
    router_pattern: str | None = None,
    batch_size: int = 8,
) -> CalibrationSamples:
    """Draw calibration samples, as a run with the same arguments does.

        samples = vsraq.calibration_samples("nvidia-reasoning", tokenizer)
        print(samples)
        dataset = samples.save("samples.jsonl")  # for AutoRound, or a recipe

    Args:
        dataset: The name of one or several data sets, ours or AutoRound's.
        tokenizer: The model's.
        nsamples: N.
        seqlen: S.
        seed: Draws the samples.
        balance_experts: Whether those are chosen, of more candidates, that give the
            experts with the fewest tokens their share.
        model: The full-precision model, for one forward pass over the candidates.
        candidates: How many; None for four times `nsamples`.
        router_pattern: What names the routers, as in `VSRAQConfig`; None finds them.
        batch_size: Samples per forward pass.

    Returns:
        The samples; with `balance_experts`, their coverage before and after, too.

    Raises:
        ValueError: An option is not allowed, a source has too few samples, or the model
            has no MoE router.
        ConnectionError: The hub could not be reached.
        PermissionError: A data set is gated.
        FileNotFoundError: There is no such file or data set.
    """
    _refuse_useless(balance_experts, model, candidates, nsamples)
    count = nsamples if not balance_experts else candidates or 4 * nsamples
    parts = parse_names(dataset) or [Part(dataset, None, dataset)]
    others = _other_sets(calib_dataset.get_dataset, tokenizer, seqlen, seed)
    drawn, reports = draw(parts, tokenizer, count, seqlen, seed, others)
    input_ids = torch.tensor(drawn)
    if model is None:
        return CalibrationSamples(input_ids, tuple(reports))
    loads = sample_loads(
        model, drawn, router_pattern=router_pattern, batch_size=batch_size
    )
    choice = choose_balanced(loads, nsamples)
    return CalibrationSamples(input_ids[list(choice.chosen)], tuple(reports), choice)


def _refuse_useless(
    balance_experts: bool, model: object, candidates: int | None, nsamples: int
) -> None:
    if balance_experts and model is None:
        raise ValueError(
            "balance_experts=True: it needs model=, the full-precision model, which is "
            "run once over the candidates"
        )
    if not balance_experts and (model is not None or candidates is not None):
        name = "model" if candidates is None else "candidates"
        raise ValueError(
            f"{name}: it does nothing without balance_experts=True; leave it out, or "
            "switch that on"
        )
    if candidates is not None and candidates < nsamples:
        raise ValueError(
            f"candidates={candidates}: allowed is an int >= nsamples={nsamples}"
        )


def _other_sets(
    get_dataset: Callable[..., Any], tokenizer: Any, seqlen: int, seed: int
) -> Callable[[str, int], Iterator[Sequence[int]]]:
    """Return what reads AutoRound's own data sets."""

    def read(name: str, count: int) -> Iterator[Sequence[int]]:
        rows = get_dataset(tokenizer, seqlen, name, seed, count)
        for row in rows:
            yield torch.as_tensor(row["input_ids"]).tolist()

    return read


def _read(
    get_dataset: Callable[..., Any], _instance: object, args: Any, kwargs: Any
) -> Any:
    """Read data sets of which some are ours; `get_dataset` is AutoRound's."""
    given = inspect.signature(get_dataset).bind(*args, **kwargs)
    given.apply_defaults()
    options = given.arguments
    refuse_parts_of_names(options["dataset_name"])
    parts = parse_names(options["dataset_name"])
    if not parts or _has_theirs(options["dataset_name"]):
        return get_dataset(*args, **kwargs)
    tokenizer, seqlen, seed = (options[n] for n in ("tokenizer", "seqlen", "seed"))
    others = _other_sets(get_dataset, tokenizer, seqlen, seed)
    samples, _ = draw(parts, tokenizer, options["nsamples"], seqlen, seed, others)
    return _as_dataset(samples)


def _as_dataset(samples: Sequence[Sequence[int]]) -> Dataset:
    # no padding: every token counts, end tokens between documents too
    masks = [[1] * len(ids) for ids in samples]
    data = Dataset.from_dict({"input_ids": list(samples), "attention_mask": masks})
    data.set_format(type="torch", columns=["input_ids", "attention_mask"])
    return data


def _registered(name: str) -> Callable[..., Dataset]:
    def load(
        tokenizer: Any, seqlen: int, dataset_name: str = name, **options: Any
    ) -> Dataset:
        seed = options.get("seed", 42)
        drawn = draw(parse_names(name), tokenizer, PAPER_SAMPLES, seqlen, seed)
        return _as_dataset(drawn[0])

    load.__dict__[_OURS] = True
    return load


def _is_ours(name: str) -> bool:
    """Whether a name leads to us: AutoRound, or a user, may have registered it too."""
    return hasattr(calib_dataset.CALIB_DATASETS.get(name), _OURS)


def _has_theirs(dataset: str) -> bool:
    """Whether a name that would be ours was registered by somebody else."""
    named = _names(dataset)
    if any(alias in calib_dataset.CALIB_DATASETS for alias in named & ALIASES.keys()):
        return True
    return any(not _is_ours(name) for name in named & MIXTURES.keys())


def _names(dataset: str) -> set[str]:
    return {part.split(":")[0].strip() for part in dataset.split(",")}


def refuse_parts_of_names(dataset: str) -> None:
    """Refuse what AutoRound would take for one of our names.

    It takes the first data set that an unknown name is a part of, and hands it neither
    options nor the number of samples.

    Args:
        dataset: The name of one or several data sets.

    Raises:
        ValueError: A name is unknown, and a part of one of ours.
    """
    known = calib_dataset.CALIB_DATASETS
    for name in sorted(_names(dataset) - known.keys() - ALIASES.keys()):
        last = name.split("/")[-1]
        found = next((key for key in known if last in key), None)
        is_share = "=" in name or name.endswith(FILES)
        if found is None or is_share or calib_dataset.is_local_path(name):
            continue
        if _is_ours(found):
            raise ValueError(
                f"dataset={name!r}: unknown{did_you_mean(name, MIXTURES)} Allowed are "
                f"{', '.join([*MIXTURES, *ALIASES])}, a file, or AutoRound's own names"
            )


def register() -> None:
    """Register our data sets with AutoRound; doing it twice is doing it once."""
    for name in MIXTURES:
        if name not in calib_dataset.CALIB_DATASETS or _is_ours(name):
            calib_dataset.register_dataset(name)(_registered(name))
    if not isinstance(calib_dataset.get_dataset, wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper(calib_dataset, "get_dataset", _read)
