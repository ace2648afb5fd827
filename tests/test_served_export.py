# SPDX-License-Identifier: Apache-2.0
"""An export of the embedded model behind `transformers serve`, asked over HTTP."""

import os
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from openai import OpenAI

import tiny
from vsraq.checkpoint import load_model
from vsraq.demo import model_path
from vsraq.demo.run import load_tokenizer
from vsraq.demo.text import documents
from vsraq.recipe import parse_recipe, run

TOKENS = 24
PROMPTS = [document[:200] for document in documents("heldout")[:2]]


@pytest.fixture(scope="module")
def export(tmp_path_factory, text_file):
    """A W4A16 export; quick, because serving does not depend on how it was tuned."""
    recipe = parse_recipe(
        {
            "model": str(model_path()),
            "scheme": "W4A16",
            "output": str(tmp_path_factory.mktemp("served") / "out"),
            "algorithm": {"iters": 1, "group_size": 32},
            "calibration": {"dataset": text_file, "nsamples": 4, "seqlen": 64},
            "runtime": {"device_map": "cpu", "enable_torch_compile": False},
        }
    )
    with tiny.bfloat16():
        (path,) = run(recipe)
    return Path(path)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def client(export, tmp_path_factory):
    """A client of a server process that has the export."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    port = free_port()
    program = Path(sysconfig.get_path("scripts")) / "transformers"
    options = ["--host=127.0.0.1", f"--port={port}", "--device=cpu"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [program, "serve", export, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                with urlopen(f"{url}/health", timeout=10) as answer:
                    assert answer.status == 200
                break
            except URLError:  # it is still loading
                time.sleep(0.2)
        with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as asking:
            yield asking
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture(scope="module")
def greedy(export):
    """What the loaded export generates after each prompt."""
    model, tokenizer = load_model(export, dtype="auto"), load_tokenizer()
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def ask(client, export, prompt, **options):
    return client.completions.create(
        model=str(export),
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        **options,
    )


def test_a_server_answers_what_the_export_generates(client, export, greedy):
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        answer = ask(client, export, prompt)
        assert answer.choices[0].text == expected
        assert answer.choices[0].text.strip()
        assert answer.usage.completion_tokens <= TOKENS


def test_a_server_streams_the_same(client, export, greedy):
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        chunks = list(ask(client, export, prompt, stream=True))
        assert len(chunks) > 2
        assert "".join(c.choices[0].text for c in chunks) == expected
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
