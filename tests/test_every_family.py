# SPDX-License-Identifier: Apache-2.0
"""Every MoE family of transformers: what `vsraq families` says of it is still so."""

import families
import family_table
from family_table import TABLE, WORKS, every_type, examine, read

# one or two of each kind of layout: run with every `pytest`, the others with
# --full
REPRESENTATIVE = [
    "afmoe",  # bias beside the router, linear map inside it
    "axk2",  # groups with another score for refused experts
    "cohere2_moe",  # experts parallel to attention: the own router reaches nothing
    "deepseek_v2",  # groups by their best expert
    "ernie4_5_moe",  # bias on softmax
    "gemma4_text",  # AutoRound fails
    "glm_moe_dsa",  # more than hidden states between blocks
    "inkling_text",  # rows for shared experts
    "jetmoe",  # two routers in a layer
    "laguna",  # capped logits
    "longcat_flash",  # rows for zero experts, a map that is never called
    "nemotron_h",  # one mixer per layer
    "qwen3_vl_moe (with images)",
]


def pytest_generate_tests(metafunc):
    if "model_type" in metafunc.fixturenames:
        every = metafunc.config.getoption("--full")
        names = every_type() if every else REPRESENTATIVE
        metafunc.parametrize("model_type", names)


def test_a_family_is_as_the_table_says(model_type):
    assert examine(model_type) == read()[model_type]


def test_every_family_has_a_row():
    rows = read()
    assert list(rows) == every_type()
    assert all(row.status for row in rows.values())
    working = [row for row in rows.values() if row.works]
    causal = families.causal_moe_types()
    assert sum(row.works for name, row in rows.items() if name in causal) >= 50
    for row in rows.values():
        reasons = (WORKS, "AutoRound fails: ", "refused: router ")
        assert row.status.startswith(reasons)
    headline = f"{len(working)} of {len(rows)} work."
    assert headline in TABLE.read_text()


def test_the_table_is_written_as_it_is_read():
    rows = list(read().values())
    assert family_table.render(rows) == TABLE.read_text()


def test_the_command_prints_it(capsys):
    from vsraq.cli import main

    assert main(["families"]) == 0
    assert capsys.readouterr().out == TABLE.read_text()
