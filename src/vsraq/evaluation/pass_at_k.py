# SPDX-License-Identifier: Apache-2.0
"""pass@k: whether at least one of k sampled answers is right."""

from math import comb
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

PASS_AT = "vsraq_pass_at"  # k, in the metadata of a task


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimate pass@k of one question without bias.

    1 - C(n - c, k) / C(n, k): the share of all choices of k answers that hold a right
    one (Chen et al., arXiv:2107.03374, Eq. 1). For n a multiple of k it has the
    expectation of the mean over n / k runs of k answers, and less variance.

    Args:
        samples: n, how many answers there are.
        right: c, how many of them are right.
        k: How many count, 1 to n.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(
            f"pass@{k} with {right} right of {samples} answers: allowed is k from 1 to "
            "the number of answers"
        )
    return 1 - comb(samples - right, k) / comb(samples, k)


class SampledTask(ConfigurableTask):
    """A task of lm-eval that takes several answers to a question.

    lm-eval asks `repeats` times, and the last filter of each way to extract keeps the
    first answer. Here it keeps all. Each of them is scored as the task scores one, by
    a metric that is 0 or 1, and each metric's name becomes `pass@k`.

    Args:
        config: That of the task, with `repeats`, and k in its metadata.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        given = {n: v for n, v in config.items() if n != "class"}
        self.k: int = given["metadata"][PASS_AT]
        self.samples: int = given["repeats"]
        keep_all = {"function": "take_first_k", "k": self.samples}
        ways = given.get("filter_list") or [{"name": "none", "filter": []}]
        given["filter_list"] = [
            {
                "name": way["name"],
                "filter": [
                    *(f for f in way["filter"] if f["function"] != "take_first"),
                    keep_all,
                ],
            }
            for way in ways
        ]
        super().__init__(config=given)

    def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, float]:
        """Score all answers to a question.

        Args:
            doc: The question.
            results: A list of one list of answers.
        """
        score_one = super().process_results
        scores = [score_one(doc, [answer]) for answer in results[0]]
        right = {name: 0 for name in scores[0]}
        for score in scores:
            for name, value in score.items():
                if value not in (0, 1):
                    raise ValueError(
                        f"{self.config.task}: {name}={value} of one answer; allowed "
                        "for pass@k are metrics that are 0 or 1"
                    )
                right[name] += int(value)
        return {
            self._name(name): pass_at_k(self.samples, count, self.k)
            for name, count in right.items()
        }

    def aggregation(self) -> dict[str, Any]:
        """Return how values of questions become one: by their mean."""
        return {self._name(name): mean for name in super().aggregation()}

    def higher_is_better(self) -> dict[str, bool]:
        """Return the direction of each metric."""
        return {self._name(name): True for name in super().higher_is_better()}

    def _name(self, metric: str) -> str:
        return pass_at_name(metric, self.k)


def pass_at_name(metric: str, k: int) -> str:
    """Return what lm-eval's results call pass@k over a metric."""
    return f"{metric}_pass@{k}"
