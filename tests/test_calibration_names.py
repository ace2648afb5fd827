# SPDX-License-Identifier: Apache-2.0
"""What a name of data sets means, and which names stay AutoRound's own."""

import pytest

from vsraq.calibration import count_samples, parse_names


def summary(dataset):
    return [(p.name, round(p.weight, 3)) for p in parse_names(dataset)]


@pytest.mark.parametrize(
    "dataset",
    [
        "NeelNanda/pile-10k",
        "pile-10k:num=64,own.jsonl",
        "own.jsonl:split=train:num=3:concat=true:apply_chat_template=true",
        "own.jsonl:concat:apply_chat_template",
        "mbpp:split=train+test",
    ],
)
def test_autoround_reads_its_own_names(dataset):
    assert parse_names(dataset) == []


def test_a_set_of_the_hub_that_is_a_mixture_by_itself():
    assert parse_names("allenai/c4") == parse_names("c4")
    assert parse_names("allenai/c4:concat=true") == parse_names("c4:concat=true")
    with pytest.raises(ValueError, match="unknown key concta"):
        parse_names("allenai/c4:concta=true")


def test_a_mixture_has_equal_shares():
    parts = parse_names("nvidia-reasoning")
    assert [part.name.partition(":")[2] for part in parts] == [
        "code",
        "science",
        "math",
    ]
    assert count_samples(parts, 512) == [171, 171, 170]
    assert all(part.source.chat and not part.concat for part in parts)


@pytest.mark.parametrize("separator", [",", ":"])
def test_shares_may_stand_after_commas_too(separator):
    options = separator.join(["code=2", "science=1", "math=1"])
    assert [w for _, w in summary(f"nvidia-reasoning:{options}")] == [0.5, 0.25, 0.25]
    three = summary(f"nvidia-reasoning:{options}:concat=true,pile-10k:num=4,a.jsonl:b")
    assert [name for name, _ in three][3:] == ["pile-10k", "a.jsonl"]


def test_a_share_of_0_leaves_a_set_out():
    assert summary("nemotron-post-training-v2:chat=0,stem=2") == [
        ("nemotron-post-training-v2:stem", 0.5),
        ("nemotron-post-training-v2:math", 0.25),
        ("nemotron-post-training-v2:code", 0.25),
    ]


def test_files_with_fields_and_weights():
    one, two = parse_names("a.jsonl:text:weight=3, b.parquet:question+answer")
    assert (one.source.columns, one.source.chat) == (("text",), False)
    assert (two.source.columns, two.source.chat) == (("question", "answer"), True)
    assert count_samples([one, two], 8) == [6, 2]
    (part,) = parse_names("a.json:text:concat=true:apply_chat_template=true")
    assert part.concat
    assert part.source.chat


def test_weights_beside_fixed_numbers():
    parts = parse_names("pile-10k:num=4,a.jsonl:text:weight=1,b.jsonl:text:weight=2")
    assert parts[0].text == "pile-10k"
    assert count_samples(parts, 10) == [4, 2, 4]


def test_the_chat_template_by_set():
    parts = parse_names("nvidia-reasoning:apply_chat_template=code+math")
    assert [part.source.chat for part in parts] == [True, False, True]
    parts = parse_names("nvidia-reasoning:apply_chat_template=false")
    assert not any(part.source.chat for part in parts)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("nvidia-reasoning:cod=2", "unknown key cod; did you mean code"),
        ("nvidia-reasoning:code=-1", "allowed is a number >= 0"),
        ("nvidia-reasoning:code=much", "allowed is a number >= 0"),
        ("nvidia-reasoning:num=3", "a mixture has shares"),
        ("nvidia-reasoning:code=0,science=0,math=0", "every share is 0"),
        ("nvidia-reasoning:concat=maybe", "allowed are true and false"),
        ("nvidia-reasoning:apply_chat_template=cod", "sets of code, science, math"),
        ("a.jsonl:text:split=train", "unknown key split"),
        ("a.jsonl:a+b+c", "one field after the file's name, or two"),
        ("a.jsonl:text:num=0", "allowed is an int >= 1"),
        ("a.jsonl:text:weight=0", "every share is 0"),
    ],
)
def test_errors_say_what_is_allowed(dataset, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_names(dataset)
    assert str(error.value).startswith("dataset=")


def test_fixed_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="nsamples=8: the data sets have num=9"):
        count_samples(parse_names("a.jsonl:text:num=9"), 8)
    with pytest.raises(ValueError, match="allowed is exactly that"):
        count_samples(parse_names("a.jsonl:text:num=7"), 8)
