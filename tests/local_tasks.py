# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval on questions that a test writes itself."""

import json
from pathlib import Path

import torch

CHOICE, WRITE = "vsraq_test_choice", "vsraq_test_write"
GROUP, MEMBERS = "vsraq_test_group", {"vsraq_test_few": 2, "vsraq_test_more": 4}
QUESTIONS = [
    ("Experts are chosen by a", ["router", "wheel of fortune", "poll"], 0),
    ("The sum of two and two is", ["five", "four", "a very large number"], 1),
    ("A list in Python is made with", ["round signs", "square brackets"], 1),
    ("An import may raise", ["an ImportError", "the roof"], 0),
    ("A string is", ["immutable", "a file on the disk of another machine"], 0),
    ("The keyword for functions is", ["fun", "function", "def", "lambda only"], 2),
]
TOKENS = 4

_CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: "{file}"}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""
_WRITE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: "{file}"}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: {tokens}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - name: stripped
    filter:
      - {{function: regex, regex_pattern: "(?s)^\\\\s*(.*?)\\\\s*$"}}
      - {{function: take_first}}
metadata: {{version: 2.0}}
"""
_GROUP = f"""group: {GROUP}
task: [{", ".join(MEMBERS)}]
aggregate_metric_list:
  - {{metric: acc, weight_by_size: true}}
metadata: {{version: 3}}
"""


def write_tasks(folder, model, tokenizer):
    """Write all into a folder; every second answer of WRITE is what a model writes."""
    folder = Path(folder)
    folder.mkdir()
    rows = [
        {"question": q, "choices": choices, "answer": answer}
        for q, choices, answer in QUESTIONS
    ]
    _task(folder, CHOICE, _CHOICE, rows)
    start = 0
    for name, count in MEMBERS.items():
        _task(folder, name, _CHOICE, rows[start : start + count])
        start += count
    (folder / "group.yaml").write_text(_GROUP)
    rows = [
        {"question": q, "answer": answer_of(model, tokenizer, q) if i % 2 else "-"}
        for i, (q, *_) in enumerate(QUESTIONS)
    ]
    _task(folder, WRITE, _WRITE, rows)
    return folder


def _task(folder, name, yaml, rows):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = yaml.format(name=name, file=file, tokens=TOKENS)
    (folder / f"{name}.yaml").write_text(text)


def answer_of(model, tokenizer, question):
    """What a model writes without sampling, TOKENS tokens, an argmax at a time."""
    prompt = ids = tokenizer(question, return_tensors="pt")["input_ids"]
    for _ in range(TOKENS):
        with torch.no_grad():
            best = model(input_ids=ids).logits[0, -1].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    text = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    return text.split("\n\n")[0].strip()


def shares_right(model, tokenizer):
    """acc and acc_norm of CHOICE, an answer at a time."""
    right = [0, 0]
    for question, choices, answer in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, question, f" {c}") for c in choices]
        normed = [s / len(c) for s, c in zip(scores, choices, strict=True)]
        for i, values in enumerate((scores, normed)):
            right[i] += values.index(max(values)) == answer
    return [count / len(QUESTIONS) for count in right]


def log_likelihood(model, tokenizer, context, continuation):
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
