# SPDX-License-Identifier: Apache-2.0
"""`vsraq.evaluate`: models, tasks of lm-eval, the table and its files."""

import gc
import json
import math
import re
import sys
import weakref
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from lm_eval.models.huggingface import HFLM

import tiny
import vsraq
from exports import make
from local_tasks import (
    CHOICE,
    GROUP,
    MEMBERS,
    QUESTIONS,
    TOKENS,
    WRITE,
    shares_right,
    write_tasks,
)
from vsraq.analysis import sources
from vsraq.cli import main
from vsraq.demo.run import load_tokenizer, model_path
from vsraq.evaluation import Evaluation
from vsraq.evaluation.harness import RunOptions, run_tasks
from vsraq.evaluation.pass_at_k import pass_at_k
from vsraq.evaluation.results import (
    AverageUsed,
    ColumnUsed,
    Figure,
    MethodFigures,
    SettingsUsed,
    average,
)
from vsraq.evaluation.task_index import TaskIndex
from vsraq.evaluation.tasks import GROUPS, WIKITEXT2, Column
from vsraq.evaluation.wikitext import nll_of, nll_of_engine, perplexity, read_wikitext
from vsraq.tokens import Sampling

COUNT = len(QUESTIONS)
TEXT = " A router chooses experts , and a list of them is kept . \n\n" * 30


@pytest.fixture(scope="module")
def demo():
    """The embedded model, in memory and in float32."""
    model = sources.load_model(model_path(), dtype="float32")
    return model, load_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo):
    """Tasks, and a text."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "wiki.test.raw").write_text(TEXT)
    return write_tasks(root / "tasks", *demo).parent


@pytest.fixture(scope="module")
def run(folder):
    """The embedded model from disk, twice, and how many were there at each load."""
    alive, seen = [], []
    load = sources.load_model

    def watched(*args, **kwargs):
        gc.collect()
        seen.append(sum(ref() is not None for ref in alive))
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load_model", watched)
        found = vsraq.evaluate(
            {"full precision": model_path(), "x|y": model_path()},
            [CHOICE, WIKITEXT2, WRITE, GROUP],
            folder / "out",
            wikitext2=folder,
            include_path=folder / "tasks",
            seqlen=64,
            dtype="float32",
        )
    return found, seen


@pytest.fixture(scope="module")
def found(run):
    return run[0]


def test_models_are_gone_before_the_next_one_comes(run):
    assert run[1] == [0, 0]


def test_figures_are_those_of_slow_twins(found, folder, demo):
    model, tokenizer = demo
    assert [c.name for c in found.columns] == ["WikiText-2 PPL", CHOICE, WRITE, GROUP]
    method = found.methods["full precision"]
    acc, acc_norm = shares_right(model, tokenizer)
    choice = method.figures[CHOICE]
    assert choice.value == choice.metrics["acc_norm,none"] == pytest.approx(acc_norm)
    assert choice.metrics["acc,none"] == pytest.approx(acc)
    assert choice.stderr == pytest.approx(
        math.sqrt(acc_norm * (1 - acc_norm) / (COUNT - 1))
    )
    # the questions of the group are those of the task: all have the same weight
    assert method.figures[GROUP].value == pytest.approx(acc)
    assert method.figures[WRITE].value == 0.5  # every second one is the model's own
    windows = read_wikitext(folder).windows(tokenizer, 64)
    with torch.no_grad():
        expected = perplexity(nll_of(model), windows, 3)
    assert method.figures["WikiText-2 PPL"].value == pytest.approx(expected.value)
    assert (found.text.windows, found.text.seqlen) == (len(windows), 64)


def test_a_second_model_finds_nothing_of_the_first(found):
    first, second = found.methods.values()
    assert second.figures == first.figures
    assert first.mebibytes > 1
    assert first.source == str(model_path())


def test_what_lm_eval_says_of_a_task_is_kept(found):
    _, choice, write, group = found.columns
    assert (group.metric, group.filter, group.version) == ("acc", "none", "3")
    assert (group.higher_is_better, group.num_fewshot) == (True, 0)
    assert group.documents == group.all_documents == sum(MEMBERS.values()) == COUNT
    assert (choice.metric, choice.filter, choice.percent) == ("acc_norm", "none", True)
    assert (write.metric, write.filter) == ("exact_match", "stripped")
    assert choice.higher_is_better
    assert choice.documents == choice.all_documents == COUNT
    assert (choice.version, write.version) == ("1.5", "2.0")
    assert (choice.num_fewshot, choice.generation) == (0, {})
    assert write.generation["max_gen_toks"] == TOKENS
    assert set(found.versions) == {"vsraq", "torch", "transformers", "lm_eval"}


def test_the_file_is_what_was_found(found, folder):
    path = folder / "out" / "evaluation.json"
    assert Evaluation.load(folder / "out") == found
    content = json.loads(path.read_text())
    assert content == json.loads(json.dumps(found.as_dict()))
    assert content["format"] == "vsraq-evaluation/1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", content["created"])
    assert content["settings"]["tasks"] == [CHOICE, WIKITEXT2, WRITE, GROUP]


@pytest.mark.parametrize(
    ("old", "new"),
    [("vsraq-evaluation/1", "vsraq-evaluation/0"), ('"columns"', '"column"')],
)
def test_a_file_of_another_version_is_refused(found, tmp_path, old, new):
    path = found.save(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"no evaluation of this version; allowed"):
        Evaluation.load(tmp_path)


def test_the_table_has_a_row_for_each_model(found):
    head, *rows, error, ppl = str(found).splitlines()
    assert re.split(r"\s{2,}", head)[1:] == [c.name for c in found.columns]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == list(found.methods)
    assert "50.00 ±22.36" in rows[0]
    assert error == "± is the standard error over the documents."
    assert f"perplexity of tokens, {found.text.windows} windows of 64" in ppl
    assert "LIMITED" not in str(found)
    assert "| x\\|y | " in found.markdown()
    assert "**" not in found.markdown()  # nothing to be better than


COLUMN = ColumnUsed(
    name="MMLU",
    task="mmlu",
    metric="acc",
    filter="none",
    percent=True,
    higher_is_better=True,
    num_fewshot=0,
    documents=9,
    all_documents=9,
    generation={},
    samples=1,
    version="1",
)
SETTINGS = SettingsUsed(["mmlu"], "hf", None, 8, None, None, None, False, None, None)


def evaluation(**methods):
    """A result with three columns and a mean over two of them."""
    columns = [
        replace(COLUMN, name="PPL", percent=False, higher_is_better=False),
        COLUMN,
        replace(COLUMN, name="BoolQ"),
    ]
    return Evaluation(
        created="2026-01-01T00:00:00Z",
        versions={},
        settings=SETTINGS,
        text=None,
        columns=columns,
        averages=[AverageUsed("Mean", "some", ["MMLU", "BoolQ"])],
        methods={
            name: MethodFigures(
                source=name,
                mebibytes=None,
                seconds=1.0,
                figures=dict(zip([c.name for c in columns], figures, strict=True)),
                averages={"Mean": average(figures[1:])},
            )
            for name, figures in methods.items()
        },
    )


def test_the_best_quantized_figures_are_bold():
    table = evaluation(
        fp=[Figure(6.0, None, {}), Figure(0.9, 0.03, {}), Figure(0.8, 0.04, {})],
        a=[Figure(7.0, None, {}), Figure(0.7, 0.03, {}), Figure(0.7, 0.04, {})],
        b=[Figure(7.5, None, {}), Figure(0.8, 0.03, {}), Figure(None, None, {})],
    )
    lines = table.markdown().splitlines()
    assert lines[0] == "|  | PPL | MMLU | BoolQ | Mean |"
    assert lines[2] == "| fp | 6.00 | 90.00 ±3.00 | 80.00 ±4.00 | 85.00 ±2.50 |"
    assert lines[3] == (
        "| a | **7.00** | 70.00 ±3.00 | **70.00 ±4.00** | **70.00 ±2.50** |"
    )
    assert lines[4] == "| b | 7.50 | **80.00 ±3.00** | - | - |"


def test_errors_of_independent_tasks_add_up_in_squares():
    draws = torch.Generator().manual_seed(0)
    sizes, shares = (40, 90, 250), (0.3, 0.5, 0.8)
    means = []  # of many repetitions of three tasks
    for _ in range(4000):
        scores = [
            torch.rand(n, generator=draws).lt(p).double()
            for n, p in zip(sizes, shares, strict=True)
        ]
        means.append(sum(float(s.mean()) for s in scores) / 3)
    figures = [
        Figure(p, math.sqrt(p * (1 - p) / n), {})
        for n, p in zip(sizes, shares, strict=True)
    ]
    found = average(figures)
    assert found.value == pytest.approx(sum(shares) / 3)
    assert found.stderr == pytest.approx(
        math.sqrt(sum(f.stderr**2 for f in figures)) / 3
    )
    assert found.stderr == pytest.approx(float(torch.tensor(means).std()), rel=0.05)
    assert average([*figures, Figure(0.5, None, {})]).stderr is None


def test_a_limit_is_in_the_table(folder, capsys):
    status = main(
        [
            *("evaluate", str(model_path()), "--tasks", f"wikitext2,{CHOICE}"),
            *("--include-path", str(folder / "tasks"), "--wikitext2", str(folder)),
            *("--method", f"again={model_path()}", "--limit", "2", "--seqlen", "32"),
            *("--out", str(folder / "limited"), "--batch-size", "2"),
        ]
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    found = Evaluation.load(folder / "limited")
    assert list(found.methods) == ["full precision", "again"]
    assert [(c.documents, c.all_documents > 2) for c in found.columns] == [
        (2, True)
    ] * 2
    assert "LIMITED to the first 2 documents of each task" in printed
    assert "again: " in printed.partition("WikiText-2")[0]  # where it is
    log = (folder / "limited" / "vsraq_evaluate.log").read_text()
    assert "Running loglikelihood requests" in log  # what lm-eval says is there
    assert "Running loglikelihood requests" not in printed
    assert str(found) in printed
    markdown = (folder / "limited" / "evaluation.md").read_text()
    assert markdown == found.markdown() + "\n"
    assert "LIMITED" in markdown


def test_an_export_is_evaluated(tmp_path_factory, folder):
    root = tmp_path_factory.mktemp("export")
    ((path, tuned, source),) = make(root, ["W3"]).values()
    found = vsraq.evaluate(
        {"full precision": source, "W3": path},
        [WIKITEXT2, CHOICE],
        wikitext2=folder,
        seqlen=64,
        include_path=folder / "tasks",
    )
    tokenizer = tiny.tiny_tokenizer()
    windows = read_wikitext(folder).windows(tokenizer, 64)
    with torch.no_grad():
        expected = perplexity(nll_of(tuned), windows, 8)
    fp, q = found.methods.values()
    head = "WikiText-2 PPL"
    assert q.figures[head].value == pytest.approx(expected.value, rel=0.02)
    assert q.figures[head].value != fp.figures[head].value
    assert q.mebibytes < fp.mebibytes
    assert q.figures[CHOICE].metrics["acc,none"] * COUNT % 1 == pytest.approx(0)


def test_an_engine_of_lm_eval_gives_the_same_perplexity(folder, demo):
    model, tokenizer = demo
    windows = read_wikitext(folder).windows(tokenizer, 64)[:3]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    with torch.no_grad():
        assert nll_of_engine(lm)(windows) == pytest.approx(
            nll_of(model)(windows), rel=1e-5
        )


@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 4), (5, 1), (3, 2)])
def test_pass_at_k_is_the_share_of_all_choices(n, k):
    for right in range(n + 1):
        answers = [True] * right + [False] * (n - right)
        choices = list(combinations(answers, k))
        assert pass_at_k(n, right, k) == pytest.approx(
            sum(map(any, choices)) / len(choices)
        )
    with pytest.raises(ValueError, match="allowed is k from 1"):
        pass_at_k(n, 0, n + 1)


def test_several_answers_to_a_question(folder, demo):
    index = TaskIndex([WRITE], [folder / "tasks"])
    column = Column("w", WRITE, "exact_match", "stripped", samples=4, pass_at=2)
    built = index.build(column)
    doc = built.top.eval_docs[1]
    wrong, right = "no", doc["answer"]
    scored = built.top.process_results(doc, [[wrong, right, wrong, wrong]])
    assert scored == {"exact_match_pass@2": pytest.approx(1 - 3 / 6)}

    lm = HFLM(pretrained=demo[0], tokenizer=demo[1], batch_size=8)
    # so cold that every answer is the greedy one
    once = index.build(Column("once", WRITE, generation={"max_gen_toks": 1}))
    (figure, used), (short, other) = run_tasks(
        lm, [built, once], Sampling(1e-3, 1, 1.0), RunOptions()
    )
    assert (used.name, other.name) == ("w", "once")
    assert other.generation["max_gen_toks"] == 1
    assert short.value < figure.value  # answers of one token
    assert figure.value == 0.5
    assert figure.stderr == pytest.approx(math.sqrt(0.25 / (COUNT - 1)))
    assert (used.metric, used.samples, used.percent) == ("exact_match_pass@2", 4, True)
    assert used.generation["do_sample"] is True
    assert used.generation["temperature"] == 1e-3
    assert used.generation["until"] == ["\n\n"]  # the task's own stays
    assert len(built.top.instances[0].resps) == 4


def test_answers_longer_than_the_model_are_refused(folder):
    with pytest.raises(ValueError, match="1024 tokens, and the model has 1024 posit"):
        vsraq.evaluate(
            model_path(), WRITE, include_path=folder / "tasks", max_gen_toks=1024
        )


# --- names ---


@pytest.fixture(scope="module")
def index():
    """Everything that the installed lm-eval knows."""
    names = [c.task for group in GROUPS for c in group.columns]
    return TaskIndex([*names, "wikitext"])


def test_every_task_of_the_papers_is_in_lm_eval(index):
    manager = index._manager
    known = set(manager.all_tasks)
    assert not known & {WIKITEXT2, *(group.name for group in GROUPS)}
    for group in GROUPS:
        for column in group.columns:
            config = manager.task_index[column.task].cfg
            if "group" in config:  # it has an average of its own
                (aggregate,) = config["aggregate_metric_list"]
                assert aggregate["metric"] == column.metric
                ways = aggregate.get("filter_list", "none")
                assert ways == column.filter
                continue
            metrics = [entry["metric"] for entry in config["metric_list"]]
            assert column.metric in metrics
            # acc_norm counts wherever a task has it
            assert ("acc_norm" in metrics) == (column.metric == "acc_norm")
            ways = [
                way["name"] for way in config.get("filter_list", [{"name": "none"}])
            ]
            assert column.filter in ways
            written = config["output_type"] == "generate_until"
            assert written == (column.metric == "exact_match")
            assert written or not column.generation
            assert column.samples == 1 or "max_gen_toks" in column.generation


def test_headings_differ():
    heads = [c.name for group in GROUPS for c in group.columns]
    heads += [group.average for group in GROUPS if group.average]
    assert len(heads) == len(set(heads))


def test_an_unknown_name_lists_close_ones(index):
    with pytest.raises(ValueError, match=r"'hellaswg' is no task.*hellaswag.*allowed"):
        index.check(["arc_easy", "hellaswg"])
    with pytest.raises(ValueError, match=r"close are .*vsraq_likelihood"):
        index.check(["vsraq_likelyhood"])
    assert index.members("arc_easy") == ["arc_easy"]
    assert index.members("ai2_arc") == ["arc_challenge", "arc_easy"]
    group = index._manager.task_index["mmlu"].name
    assert index.members(group) == ["mmlu"]


# --- what is refused ---


def test_a_task_without_its_data_is_refused(folder, tmp_path):
    text = (folder / "tasks" / f"{WRITE}.yaml").read_text()
    broken = text.replace(f"{WRITE}.jsonl", "nowhere.jsonl")
    (tmp_path / "task.yaml").write_text(broken)
    with pytest.raises(RuntimeError, match=r"write: lm-eval cannot build it .*HF_HOME"):
        vsraq.evaluate(model_path(), WRITE, include_path=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder; allowed is one with"):
        vsraq.evaluate(model_path(), WRITE, include_path=tmp_path / "nowhere")


def test_a_group_without_a_figure_is_refused(folder, tmp_path):
    (tmp_path / "group.yaml").write_text(f"group: both\ntask: [{CHOICE}, {WRITE}]\n")
    own = TaskIndex([CHOICE], [folder / "tasks", tmp_path])
    with pytest.raises(ValueError, match=f"allowed are its members: {CHOICE}, {WRITE}"):
        own.build(Column("both", "both"))


def test_a_model_without_a_chat_template_is_refused(folder):
    with pytest.raises(
        ValueError, match="full precision: its tokenizer has no chat te"
    ):
        vsraq.evaluate(
            model_path(),
            CHOICE,
            include_path=folder / "tasks",
            apply_chat_template=True,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"limit": 0}, "limit=0: allowed is an int >= 1"),
        ({"batch_size": 1.5}, "batch_size=1.5: allowed is an int >= 1"),
        ({"num_fewshot": 2}, "num_fewshot='2': it does nothing with tasks=wikitext2"),
        ({"max_gen_toks": 9}, "max_gen_toks='9': it does nothing"),
        ({"apply_chat_template": True}, "apply_chat_template='True': it does nothing"),
        ({"think_end_token": "</think>"}, "think_end_token='</think>': it does nothi"),
        ({"samples": 9}, "samples='9': it does nothing"),
        ({"include_path": "."}, "include_path: it has tasks, and none is asked for"),
        ({"backend": "tgi"}, "backend='tgi': allowed are 'hf' and 'vllm'"),
        (
            {"seqlen": 4096},
            "seqlen=4096: allowed is an int from 2 to 1024, as full pre",
        ),
        ({"seqlen": 1}, "seqlen=1: allowed"),
        ({"models": {}}, "at least one model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_are_refused(folder, options, message):
    given = {"models": model_path(), "wikitext2": folder} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        vsraq.evaluate(**given)


def test_options_of_the_text_need_the_text(folder):
    own = {"include_path": folder / "tasks"}
    for option in ({"seqlen": 64}, {"wikitext2": folder}):
        with pytest.raises(ValueError, match="does nothing with tasks=vsraq_test_choi"):
            vsraq.evaluate(model_path(), CHOICE, **option, **own)
    with pytest.raises(ValueError, match="max_gen_toks='9': it does nothing"):
        vsraq.evaluate(model_path(), CHOICE, max_gen_toks=9, **own)


def test_perplexity_needs_no_lm_eval(folder, demo, monkeypatch, capsys):
    monkeypatch.setattr("vsraq.evaluation.task_index.find_spec", lambda _: None)
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    model, tokenizer = demo
    with pytest.raises(ValueError, match="model: no tokenizer beside it; allowed"):
        vsraq.evaluate(model, wikitext2=folder, seqlen=64)
    found = vsraq.evaluate(model, wikitext2=folder, seqlen=64, tokenizer=tokenizer)
    assert found.methods["model"].figures["WikiText-2 PPL"].value > 1
    assert found.methods["model"].mebibytes is None
    assert "lm_eval" not in found.versions
    assert main(["evaluate", str(model_path()), "--tasks", "vsraq_likelihood"]) == 1
    assert "run `pip install vsraq[evaluate]`" in capsys.readouterr().err


def test_vllm_says_what_it_needs(demo, monkeypatch, capsys):
    command = ["evaluate", str(model_path()), "--backend", "vllm"]
    monkeypatch.setattr("vsraq.evaluation.backends.find_spec", lambda _: None)
    assert main(command) == 1
    assert "vllm is not installed; run `pip install vllm`" in capsys.readouterr().err
    monkeypatch.setattr("vsraq.evaluation.backends.find_spec", lambda name: name)
    assert main([*command, "--device", "cuda:0"]) == 1
    assert "CUDA_VISIBLE_DEVICES" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a model in memory, but vLLM loads folders"):
        vsraq.evaluate(demo[0], tokenizer=demo[1], backend="vllm")


def test_names_are_given_once(capsys):
    twice = ["--method", f"full precision={model_path()}"]
    assert main(["evaluate", str(model_path()), *twice]) == 1
    assert "allowed is each name once" in capsys.readouterr().err
