# SPDX-License-Identifier: Apache-2.0
"""WikiText-2: its raw test split, and the perplexity that quantization papers print.

The convention is that of GPTQ (Frantar et al., arXiv:2210.17323; `opt.py` and
`datautils.py` of github.com/IST-DASLab/gptq). The rows of the raw test split are joined
with two newlines and tokenized in one go, with the special tokens that the tokenizer
adds to a text. The ids are cut into windows of S tokens, one after another; the last
partial one is dropped. A window starts without context, so S - 1 of its tokens are
predicted. With the mean NLL of each window,

    NLL_w = 1 / (S - 1) sum_{t=2}^{S} -log p(x_t | x_1 ... x_{t-1}),
    perplexity = exp(1 / W sum_w NLL_w).

GPTQ multiplies each mean by S and divides the sum by W S, which is the same. All
windows predict equally many tokens, so it is also the mean over all predicted tokens.

Shapes: W windows, S tokens of each, B windows at once, V vocabulary.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vsraq.calibration.hub import FOLDER

REPO, CONFIG, SPLIT = "Salesforce/wikitext", "wikitext-2-raw-v1", "test"
SEQLEN = 2048
_FILES = ("wiki.test.raw", "test.txt")  # in a folder
# of the words of the tokenized variant, about 2 % are <unk>; the raw one has the words
_UNKNOWN, _MOST_UNKNOWN = "<unk>", 0.001
_ALLOWED = (
    "allowed are the raw test split as a text file (wiki.test.raw), a .jsonl or "
    ".parquet file with its rows in the column text, or a folder with one of these, "
    f"such as `hf download {REPO} --repo-type dataset --local-dir DIR` makes"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WikiText:
    """The text.

    Attributes:
        source: Where it comes from.
        text: All rows, joined.
    """

    source: str
    text: str

    def windows(self, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Tensor:
        """Return windows of token ids, (W, S) int64.

        Args:
            tokenizer: The models'.
            seqlen: S.

        Raises:
            ValueError: The text has no whole window.
        """
        ids = torch.tensor(tokenizer(self.text, verbose=False)["input_ids"])
        whole = ids[: len(ids) // seqlen * seqlen].long().view(-1, seqlen)
        if not len(whole):
            raise ValueError(
                f"wikitext2={self.source!r}: {len(ids)} tokens, and a window has "
                f"{seqlen}; allowed are longer texts, or a smaller seqlen"
            )
        return whole


def read_wikitext(path: str | Path | None = None) -> WikiText:
    """Read the raw test split.

    Args:
        path: A file or folder, see docs/evaluate.md. None takes the copy in the folder
            that VSRAQ_DATASETS names, else the data set of Hugging Face.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: A file has no text.
    """
    if path is None and (root := os.environ.get(FOLDER)):
        path = Path(root).expanduser() / REPO
    if path is None:
        found = WikiText(f"{REPO}, {CONFIG}, {SPLIT}", _joined(_rows_of_hub()))
    else:
        file = _file_in(Path(path))
        found = WikiText(str(path), _joined(_rows_of_file(file)))
    words = found.text.split()
    if not words:
        raise ValueError(f"wikitext2={found.source!r}: no text in it; {_ALLOWED}")
    share = words.count(_UNKNOWN) / len(words)
    if share > _MOST_UNKNOWN:
        _log.warning(
            "vsraq: wikitext2=%r: %.1f %% of its words are %s: it is the tokenized "
            "variant, not the raw one, and papers' perplexities are of the raw one",
            found.source,
            100 * share,
            _UNKNOWN,
        )
    return found


def _joined(rows: Iterable[str]) -> str:
    return "\n\n".join(rows)


def _rows_of_hub() -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(REPO, CONFIG, split=SPLIT)
    except Exception as error:  # it raises errors of many libraries
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"wikitext2: the data set {REPO} cannot be loaded ({type(error).__name__}: "
            f"{reason}); without a network, name a copy; {_ALLOWED}"
        ) from error
    return list(rows["text"])


def _file_in(path: Path) -> Path:
    """Find the file of the test split."""
    if path.is_file():
        return path
    found = [path / name for name in _FILES if (path / name).is_file()]
    found += sorted((path / CONFIG).glob(f"{SPLIT}*.parquet"))
    if len(found) != 1:
        what = "no such file or folder"
        if path.is_dir():
            names = ", ".join(f.name for f in found) or "none"
            what = f"files of the test split there: {names}"
        raise FileNotFoundError(f"wikitext2={str(path)!r}: {what}; {_ALLOWED}")
    return found[0]


def _rows_of_file(path: Path) -> list[str]:
    """Return the rows as the data set has them: a line each, "" for a blank one."""
    if path.suffix not in (".jsonl", ".parquet"):
        with path.open(encoding="utf-8", newline="\n") as file:
            return [line if line.strip() else "" for line in file]
    from datasets import load_dataset

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
    found = [row.get("text") for row in rows]
    if not all(isinstance(row, str) for row in found):
        raise ValueError(f"wikitext2={str(path)!r}: no column text; {_ALLOWED}")
    return found


WindowNLL = Callable[[Tensor], Tensor]


def nll_of(model: nn.Module) -> WindowNLL:
    """Return what computes the mean NLL of windows, (B, S) -> (B,), float32.

    Args:
        model: A causal language model of transformers.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    device = next(embedding.parameters(), torch.empty(0)).device

    @torch.no_grad()
    def compute(windows: Tensor) -> Tensor:
        ids = windows.to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        # a window at a time: float32 logits of all would be the largest tensor by far
        losses = [
            nn.functional.cross_entropy(row[:-1].float(), window[1:].to(row.device))
            for row, window in zip(logits, ids, strict=True)
        ]
        return torch.stack(losses).cpu()

    return compute


def nll_of_engine(lm: Any) -> WindowNLL:
    """Return the same for a model that lm-eval runs, such as in vLLM."""

    def compute(windows: Tensor) -> Tensor:
        requests = [(("", ""), w[:1].tolist(), w[1:].tolist()) for w in windows]
        found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        predicted = windows.shape[1] - 1
        return torch.tensor([-total / predicted for total, _ in found])

    return compute


@dataclass(frozen=True)
class Perplexity:
    """What the windows gave.

    Attributes:
        value: exp of the mean NLL; None where it is not finite.
        stderr: Its standard error, by the delta method: value times the standard error
            of the mean over windows. None for one window.
        windows: W.
    """

    value: float | None
    stderr: float | None
    windows: int


def perplexity(
    compute: WindowNLL, windows: Tensor, batch_size: int, *, progress: bool = False
) -> Perplexity:
    """Compute the perplexity of a text; the module's docstring has the equation.

    Args:
        compute: See `nll_of`.
        windows: Token ids, (W, S).
        batch_size: B.
        progress: Show a bar on stderr.
    """
    losses = torch.cat(
        [compute(batch) for batch in _shown(windows.split(batch_size), progress)]
    ).double()
    mean = float(losses.mean())
    value = math.exp(mean) if mean < math.log(1e300) else math.inf
    if not math.isfinite(value):  # NaN, too
        return Perplexity(None, None, len(losses))
    stderr = None
    if len(losses) > 1:
        stderr = value * float(losses.std() / math.sqrt(len(losses)))
    return Perplexity(value, stderr, len(losses))


def _shown(batches: tuple[Tensor, ...], progress: bool) -> Iterator[Tensor]:
    from tqdm import tqdm

    yield from tqdm(batches, desc="wikitext2", disable=not progress)
