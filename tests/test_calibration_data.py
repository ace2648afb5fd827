# SPDX-License-Identifier: Apache-2.0
"""Calibration text: the hub's layouts, samples of it, and AutoRound's use of them."""

import inspect
import json
import time
from functools import partial

import datasets
import httpx2
import huggingface_hub
import pytest
import torch
from auto_round import calib_dataset
from auto_round.calib_dataset import CALIB_DATASETS, get_dataloader, get_dataset
from datasets import Dataset

import tiny
import vsraq
from vsraq.autoround import calibration_data
from vsraq.autoround.calibration_data import register
from vsraq.calibration import MIXTURES, choose_balanced, hub
from vsraq.calibration.documents import document_ids
from vsraq.calibration.sources import Source
from vsraq.recipe import preflight, recipe

# A turn, then what the model writes.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
THOUGHT = "<think>because</think>yes"

# config, split -> rows: layout and columns of the sets' cards
COLUMNS = {
    "nvidia/OpenCodeReasoning": {
        ("split_0", "split_0"): "id input output source license dataset split "
        "difficulty solution"
    },
    "nvidia/OpenScienceReasoning-2": {
        ("default", "train"): "expected_answer input output"
    },
    "nvidia/OpenMathReasoning": {
        ("default", "cot"): "expected_answer problem_type problem_source "
        "generation_model pass_rate_72b_tir problem generated_solution inference_mode",
    },
    "nvidia/Nemotron-Post-Training-Dataset-v2": {
        ("default", split): "uuid license generator version category reasoning messages"
        for split in ("stem", "chat", "math", "code")
    },
    "allenai/c4": {("en", "train"): "text timestamp url"},
}


def text_of(repo, split, row):
    return f"{repo}, {split}, row {row}. " + "words " * (row % 12)


def write_set(root, repo, layout, rows=24):
    """A data set in parquet with a card, as on the hub."""
    folder = root / repo
    configs = {}
    for (config, split), columns in layout.items():
        table = {name: [f"{name} {i}" for i in range(rows)] for name in columns.split()}
        question = next(n for n in ("input", "problem", "text", "uuid") if n in table)
        table[question] = [text_of(repo, split, i) for i in range(rows)]
        if "messages" in table:
            table["messages"] = [
                [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": THOUGHT},
                ]
                for text in table[question]
            ]
        folder.joinpath(config).mkdir(parents=True, exist_ok=True)
        file = f"{config}/{split}-00000-of-00001.parquet"
        Dataset.from_dict(table).to_parquet(folder / file)
        files = configs.setdefault(config, [])
        files.append(f"  - split: {split}\n    path: {config}/{split}-*\n")
    card = "".join(
        f"- config_name: {config}\n  data_files:\n{''.join(files)}"
        for config, files in configs.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for repo, layout in COLUMNS.items():
        write_set(root, repo, layout)
    return root


@pytest.fixture
def local(copies, monkeypatch):
    monkeypatch.setenv("VSRAQ_DATASETS", str(copies))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return tiny.save_text(tmp_path_factory.mktemp("text") / "text.jsonl", 32)


@pytest.fixture
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def online(monkeypatch):
    """The hub's libraries with a network that a test answers for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    asked = []

    def answer(with_):
        def handle(request):
            asked.append(request.url)
            return with_(request)

        huggingface_hub.set_client_factory(
            lambda: httpx2.Client(transport=httpx2.MockTransport(handle))
        )
        return asked

    yield answer
    huggingface_hub.set_client_factory(
        huggingface_hub.utils._http.default_client_factory
    )


def decode(ids, tokenizer):
    """The text of byte tokens; the tiny tokenizer cannot go back."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).translate(
        {288: " ", 266: "\n"}
    )


def decoded(ids, tokenizer):
    return [decode(row, tokenizer) for row in torch.as_tensor(ids).tolist()]


def drawn(dataset, tokenizer, **options):
    options = {"nsamples": 12, "seqlen": 32} | options
    return vsraq.calibration_samples(dataset, tokenizer, **options)


@pytest.mark.usefixtures("local")
@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_reads_every_set(name, tokenizer):
    samples = drawn(name, tokenizer)
    texts = decoded(samples.input_ids, tokenizer)
    share = 12 // len(MIXTURES[name])
    assert [source.samples for source in samples.sources] == [share] * (12 // share)
    for source in MIXTURES[name].values():
        found = sum(text.startswith(source.repo[:32]) for text in texts)
        assert found == share * sum(
            other.repo == source.repo for other in MIXTURES[name].values()
        )


@pytest.mark.usefixtures("local")
def test_a_seed_draws_the_samples(tokenizer):
    first, again, other = (
        drawn("c4", tokenizer, seed=seed).input_ids for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_the_stream_is_not_read_further_than_needed(tmp_path, tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(hub, "BUFFER", 2)
    real = hub._open

    def spy(source, seed):
        for row in real(source, seed):
            read.append(row)
            yield row

    monkeypatch.setattr(hub, "_open", spy)
    path = tmp_path / "long.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(99))
    )
    drawn(f"{path}:text", tokenizer, nsamples=4)
    assert len(read) == 4


def test_question_and_reasoning_through_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    row = {"input": "why?", "output": THOUGHT}
    source = Source("a/b", columns=("input", "output"))
    text = decode(document_ids(row, source, tokenizer), tokenizer)
    # this template drops reasoning from answers, but not from the one to learn from
    assert text == "<user>why?<assistant>" + THOUGHT + tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE.replace(
        "<assistant>{%", "<assistant><think>\n{%"
    )
    text = decode(document_ids(row, source, tokenizer), tokenizer)
    assert text.count("<think>") == 1
    tokenizer.chat_template = None
    text = decode(document_ids(row, source, tokenizer), tokenizer)
    assert text == f"why?\n\n{THOUGHT}{tokenizer.eos_token}"


def test_messages_with_and_without_a_system_message(tokenizer, vsraq_log):
    source = Source("a/refuses-system", columns=("messages",))
    user = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "ho"}
    row = {"messages": [{"role": "system", "content": "be kind"}, user, answer]}
    tokenizer.chat_template = TEMPLATE
    assert "be kind" in decode(document_ids(row, source, tokenizer), tokenizer)
    refuse = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    )
    tokenizer.chat_template = refuse + TEMPLATE
    text = decode(document_ids(row, source, tokenizer), tokenizer)
    assert text == "<user>hi<assistant>ho" + tokenizer.eos_token
    assert any("refuses system messages" in line for line in vsraq_log)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match=r"never.*apply_chat_template=false"):
        document_ids(row, source, tokenizer)


def test_short_documents_are_counted_or_joined(tmp_path, tokenizer, vsraq_log):
    path = tmp_path / "short.jsonl"
    texts = ["abcdefghi", "x" * 40, "", "klmnopqrstuvwxyz" * 3]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    with pytest.raises(ValueError, match=r"it has 1 samples.*2 are wanted.*1 are sho"):
        drawn(f"{path}:text", tokenizer, nsamples=2)
    samples = drawn(f"{path}:text", tokenizer, nsamples=1)
    (report,) = samples.sources
    assert "too short" in str(samples)
    assert report.samples == 1
    joined = drawn(f"{path}:text:concat=true", tokenizer, nsamples=2, seqlen=20)
    assert joined.sources[0].too_short == 0
    assert any("calibration data" in line for line in vsraq_log)


def test_documents_end_with_the_end_token(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "abcd"}) + "\n" + json.dumps({"text": "efgh"}))
    samples = drawn(f"{path}:text:concat=true", tokenizer, nsamples=1, seqlen=10)
    assert (samples.input_ids[0, [4, 9]] == tokenizer.eos_token_id).all()


def test_weights_of_files_and_of_autorounds_own(tmp_path, tokenizer, monkeypatch):
    def load(*_, **__):
        ids = [[*range(i, i + 40)] for i in range(9)]
        return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 40] * 9})

    monkeypatch.setitem(CALIB_DATASETS, "its-own", load)
    for name, letter in (("a", "abcdefgh"), ("b", "stuvwxyz")):
        rows = [{"q": letter * 5, "a": letter, "n": i} for i in range(20)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    dataset = f"{tmp_path}/a.parquet:q:weight=3,{tmp_path}/b.parquet:q+a,its-own:num=4"
    samples = drawn(dataset, tokenizer)
    assert [source.samples for source in samples.sources] == [4, 6, 2]
    texts = decoded(samples.input_ids, tokenizer)
    assert sum(text.startswith("abc") for text in texts) == 6
    assert sum(text.startswith("stu") for text in texts) == 2


@pytest.mark.usefixtures("local")
def test_autoround_reads_the_names(tokenizer):
    assert set(MIXTURES) <= set(CALIB_DATASETS)
    name = "nvidia-reasoning:code=2,science=1,math=1"
    loader = get_dataloader(tokenizer, 32, dataset_name=name, seed=3, bs=4, nsamples=8)
    ids = torch.cat([batch["input_ids"] for batch in loader])
    own = drawn(name, tokenizer, nsamples=8, seed=3)
    assert ids.equal(own.input_ids)
    assert [source.samples for source in own.sources] == [4, 2, 2]


@pytest.mark.usefixtures("local")
def test_autoround_tunes_on_them(quantize):
    run, model = quantize(
        tiny.tiny_model("qwen3_moe"),
        vsraq.VSRAQConfig(**tiny.PLAIN, iters=1),
        dataset="nvidia-reasoning:math=0",
        group_size=32,
    )
    assert model is run.model_context.model


def test_autorounds_own_names_are_unchanged(tokenizer, text_file):
    register()  # once more changes nothing
    assert calib_dataset.get_dataset is get_dataset
    wrapped = inspect.signature(get_dataset.__wrapped__).parameters
    assert list(wrapped) == ["tokenizer", "seqlen", "dataset_name", "seed", "nsamples"]
    same = get_dataset.__wrapped__(tokenizer, 32, text_file, seed=5, nsamples=4)
    ours = get_dataset(tokenizer, 32, text_file, seed=5, nsamples=4)
    assert [r["input_ids"].tolist() for r in same] == [
        r["input_ids"].tolist() for r in ours
    ]


def test_samples_of_autorounds_own_names_keep_its_order(tokenizer, text_file):
    """So a file of them is the run's own calibration data."""
    ours = drawn(text_file, tokenizer, nsamples=8, seed=5).input_ids
    theirs = get_dataset.__wrapped__(tokenizer, 32, text_file, seed=5, nsamples=8)
    assert ours.tolist() == [row["input_ids"].tolist() for row in theirs]


@pytest.mark.usefixtures("local")
def test_the_hubs_name_of_c4_is_read_by_our_rules(tokenizer):
    ids = get_dataset(tokenizer, 32, "allenai/c4", seed=3, nsamples=4)["input_ids"]
    own = drawn("c4", tokenizer, nsamples=4, seed=3).input_ids
    assert torch.stack(list(ids)).equal(own)


@pytest.mark.parametrize(
    "name", ["reasoning", "some/reasoning:num=4", "pile-10k,post-tr"]
)
def test_a_part_of_our_names_is_not_one(name, tokenizer):
    """AutoRound looks such names up by what they are a part of."""
    with pytest.raises(ValueError, match=r"dataset='.*': unknown.*nvidia-reasoning"):
        get_dataset(tokenizer, 32, name, nsamples=4)


def test_an_offline_machine_is_told_so(tokenizer, monkeypatch):
    monkeypatch.delenv("VSRAQ_DATASETS", raising=False)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set.*hf download"):
        get_dataset(tokenizer, 32, "nvidia-reasoning", nsamples=4)


def test_a_hub_that_cannot_be_reached_is_tried_again(tokenizer, online, vsraq_log):
    def refuse(request):
        raise httpx2.ConnectError("no route", request=request)

    asked = online(refuse)
    with pytest.raises(ConnectionError, match=r"3 tries failed.*VSRAQ_DATASETS=DIR"):
        drawn("nvidia-reasoning", tokenizer)
    assert len(asked) >= 3
    assert sum("another try in" in line for line in vsraq_log) == 2


def test_a_gated_set_says_where_to_accept_and_how_to_log_in(tokenizer, online):
    headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
    asked = online(
        lambda request: httpx2.Response(401, headers=headers, request=request)
    )
    with pytest.raises(PermissionError, match="hf auth login") as error:
        drawn("nemotron-post-training-v2", tokenizer)
    page = "huggingface.co/datasets/nvidia/Nemotron-Post-Training-Dataset-v2"
    assert page in str(error.value)
    assert asked


@pytest.mark.usefixtures("local", "online")
def test_a_stream_that_breaks_goes_on_where_it_was(monkeypatch):
    source = MIXTURES["nvidia-reasoning"]["math"]
    whole = list(hub.rows(source, 7))
    real, breaks = hub._open, [3, 9]

    def breaking(source, seed):
        for position, row in enumerate(real(source, seed)):
            if breaks and position == breaks[0]:
                del breaks[0]
                raise ConnectionResetError("gone")
            yield row

    monkeypatch.setattr(hub, "_open", breaking)
    assert list(hub.rows(source, 7)) == whole
    assert not breaks


@pytest.mark.usefixtures("local")
def test_other_faults_name_the_next_step(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl.*no such file"):
        drawn(f"{tmp_path}/gone.jsonl:text", tokenizer)
    path = tmp_path / "broken.jsonl"
    path.write_text("{no json")
    with pytest.raises(ValueError, match="cannot be read"):
        drawn(f"{path}:text", tokenizer)
    path.write_text(json.dumps({"text": "a" * 50}))
    with pytest.raises(ValueError, match="no column txt; it has text"):
        drawn(f"{path}:txt", tokenizer)
    path.write_text(json.dumps({"text": 7}))
    with pytest.raises(ValueError, match="text=7; allowed is a text"):
        drawn(f"{path}:text", tokenizer)
    monkeypatch.setattr(hub, "WAITS", ())
    with pytest.raises(
        ValueError, match=r"split 'nope' cannot be read.*layout may have"
    ):
        next(hub.rows(Source("allenai/c4", "en", "nope"), 0))
    monkeypatch.setenv("VSRAQ_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hf download nvidia/OpenCodeReas"):
        drawn("nvidia-reasoning", tokenizer)


def test_a_balanced_choice_reaches_the_rare_experts():
    generator = torch.Generator().manual_seed(0)
    loads = torch.randint(0, 9, (40, 8), generator=generator)
    loads[:, 7] = 0
    loads[33, 7] = 1
    choice = choose_balanced({"gate": loads}, 6)
    assert 33 in choice.chosen
    assert len(set(choice.chosen)) == 6
    assert (choice.before.unreached, choice.after.unreached) == (1, 0)
    assert choice.after.spread < choice.before.spread
    assert choice.after.tokens["gate"].equal(loads[list(choice.chosen)].sum(0))
    with pytest.raises(ValueError, match="40 candidates"):
        choose_balanced({"gate": loads}, 41)


def test_balanced_samples_are_read_back_by_name(tmp_path, tokenizer, text_file):
    model = tiny.tiny_model("qwen3_moe")
    samples = drawn(text_file, tokenizer, nsamples=4, balance_experts=True, model=model)
    total = 4 * 32 * tiny.TOP_K
    for counts in samples.balance.after.tokens.values():
        assert counts.sum() == total
    assert "before:" in str(samples)
    name = samples.save(tmp_path / "samples.jsonl")
    data = get_dataset(tokenizer, 32, name, nsamples=4)
    assert sorted(row["input_ids"].tolist() for row in data) == sorted(
        samples.input_ids.tolist()
    )
    with pytest.raises(ValueError, match=r"\.jsonl file without spaces"):
        samples.save(tmp_path / "my samples.jsonl")


def test_a_balance_needs_a_model(tokenizer, text_file):
    with pytest.raises(ValueError, match="it needs model="):
        drawn(text_file, tokenizer, balance_experts=True)
    with pytest.raises(ValueError, match="does nothing without balance_experts"):
        drawn(text_file, tokenizer, candidates=9)
    with pytest.raises(ValueError, match="candidates=3: allowed is an int >= "):
        drawn(text_file, tokenizer, balance_experts=True, model=1, candidates=3)
    with pytest.raises(ValueError, match="no MoE router"):
        drawn(
            text_file,
            tokenizer,
            nsamples=2,
            balance_experts=True,
            model=tiny.tiny_model("llama"),
        )


def test_a_recipe_names_them(tmp_path, text_file):
    folder = tmp_path / "model"
    tiny.save("qwen3_moe", folder)
    data = {"model": str(folder), "scheme": "W4A16", "output": str(tmp_path / "out")}

    def check(dataset, **options):
        options = {"nsamples": 4, "seqlen": 32, "dataset": dataset} | options
        preflight.check(recipe.parse_recipe(data | {"calibration": options}))

    check("nvidia-reasoning:code=2,science=1")
    check(f"{text_file}:text")
    with pytest.raises(ValueError, match=r"calibration\.dataset=.*are wanted"):
        check(f"{text_file}:text", nsamples=100_000)
    with pytest.raises(ValueError, match="unknown key cod"):
        check("nvidia-reasoning:cod=2")
    with pytest.raises(ValueError, match=r"calibration\.dataset='reasoning': unknown"):
        check("reasoning")
    with pytest.raises(FileNotFoundError, match=r"calibration\.dataset='gone\.jsonl'"):
        check("gone.jsonl:text")


def test_a_name_that_somebody_else_has_registered_stays_theirs(monkeypatch):
    def theirs(tokenizer, seqlen, dataset_name="c4", **options):
        return "theirs"

    monkeypatch.setitem(calib_dataset.CALIB_DATASETS, "c4", theirs)
    register()
    assert calib_dataset.CALIB_DATASETS["c4"] is theirs

    def get_dataset(tokenizer, seqlen, dataset_name, seed, nsamples):
        return calib_dataset.CALIB_DATASETS[dataset_name](tokenizer, seqlen)

    read = partial(calibration_data._read, get_dataset, None)
    assert read((None, 64, "c4", 42, 4), {}) == "theirs"
