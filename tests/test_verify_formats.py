# SPDX-License-Identifier: Apache-2.0
import pytest

from vsraq.checkpoint import check_formats


@pytest.mark.parametrize("format", ["auto_round", "auto_round, llm_compressor"])
def test_formats_that_can_be_verified(format):
    check_formats(format)


@pytest.mark.parametrize("format", ["gguf:q4_k_m", "auto_round,mlx", "fake", "", "x,"])
def test_other_formats_are_refused_before_the_run(format):
    with pytest.raises(ValueError, match=r"cannot be verified; allowed are auto_round"):
        check_formats(format)
