# SPDX-License-Identifier: Apache-2.0
"""Files as `vsraq compare` and `vsraq quantize` write them, with made-up numbers."""

import json

import numpy as np
from safetensors.numpy import save_file

from test_bit_plan_figure import made_up

METHODS = {"round to nearest": 1.0, "AutoRound": 0.62, "VSRAQ": 0.5}


def interval(value, spread=0.03):
    value = float(value)
    low, high = value - spread * abs(value), value + spread * abs(value)
    return {"value": value, "low": low, "high": high}


def histogram(values, edges):
    counts, _ = np.histogram(values, edges)
    return {
        "edges": [float(edge) for edge in edges],
        "counts": [int(count) for count in counts],
        "below": int((values < edges[0]).sum()),
        "above": int((values > edges[-1]).sum()),
    }


class MadeUp:
    """A comparison of some methods; `damage` says how far each is from fp."""

    def __init__(self, methods=METHODS, layers=6, experts=32, top_k=4, tokens=2000):
        self.random = np.random.default_rng(7)
        self.names = [f"model.layers.{i}.mlp.gate" for i in range(layers)]
        self.experts, self.top_k, self.tokens = experts, top_k, tokens
        self.loads = [self.load() for _ in self.names]
        self.sampled = {}
        self.results = {
            "format": "vsraq-compare/1",
            "created": "2026-01-01T00:00:00Z",
            "versions": {"vsraq": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "data": {
                "source": "held-out.txt",
                "tokens": 40_960,
                "sequences": 160,
                "seqlen": 256,
            },
            "sampling": {
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "source": "default",
            },
            "thresholds": {"sampled_jsd": 1e-4, "routing_shift": 0.05},
            "full_precision": {
                "source": "models/tiny",
                "mebibytes": 6.32,
                "perplexity": interval(46.05),
                "seconds": 12.0,
                "tokens_per_second": 3413.0,
            },
            "layers": [
                {
                    "name": name,
                    "block": block,
                    "top_k": top_k,
                    "num_experts": experts,
                    "load": load,
                }
                for block, (name, load) in enumerate(
                    zip(self.names, self.loads, strict=True)
                )
            ],
            "methods": {name: self.method(name, d) for name, d in methods.items()},
        }

    def load(self):
        shares = self.random.dirichlet(np.full(self.experts, 3.0))
        load = (shares * self.top_k * 40_960).astype(int)
        load[self.random.integers(self.experts)] *= self.random.integers(2)
        return [int(count) for count in load]

    def layer(self, index, damage):
        depth = (index + 1) / len(self.names)
        lost = damage * 0.12 * depth + 0.004 * self.random.random()
        beyond = np.arange(self.experts - self.top_k)
        injected = (20_000 * lost * np.exp(-beyond / (0.5 * self.top_k))).astype(int)
        near = [injected[: n * self.top_k].sum() for n in (1, 2)]
        share = injected.sum() or None
        noise = self.random.normal(0, 0.06 * damage, self.experts)
        load = np.maximum(0, np.array(self.loads[index]) * (1 + noise)).astype(int)
        return {
            "name": self.names[index],
            "metrics": {
                "jaccard": interval(1 - lost, 0.004),
                "routing_shift": interval(lost * 0.7),
                "weights_only": interval(1 - 2.4 * lost),
                "order_shift": interval(0.9 * lost),
                "drop_inject": interval(1.5 * lost),
                **{
                    f"inside_{n}k": (
                        interval(count / share, 0.01)
                        if share
                        else dict.fromkeys(("value", "low", "high"))
                    )
                    for n, count in zip((2, 3), near, strict=True)
                },
            },
            "dropped_ranks": [
                int(20_000 * lost * 1.8 ** (rank - self.top_k))
                for rank in range(self.top_k)
            ],
            "injected_ranks": [int(count) for count in injected],
            "load": [int(count) for count in load],
        }

    def method(self, name, damage):
        layers = [self.layer(i, damage) for i in range(len(self.names))]
        shift = self.random.gamma(2.0, 0.03 * damage, self.tokens)
        jsd = self.random.lognormal(-8.5 + damage + 8 * shift, 1.6)
        sampled = np.minimum(jsd * self.random.lognormal(0.4, 0.5, self.tokens), 0.69)
        sampled[self.random.random(self.tokens) < 0.1] = 0.0
        kl = 3 * jsd
        values = {"sampled_jsd": sampled, "jsd": jsd, "kl": kl, "routing_shift": shift}
        for metric, of_tokens in values.items():
            self.sampled[f"{name}/{metric}"] = of_tokens.astype(np.float32)
        high, moved = sampled > 1e-4, shift > 0.05
        regions = (high & ~moved, high & moved, ~high & ~moved, ~high & moved)
        mean = {
            key: interval(
                np.mean([layer["metrics"][key]["value"] or 0 for layer in layers])
            )
            for key in layers[0]["metrics"]
        }
        log_edges = np.geomspace(1e-7, 1, 36)
        return {
            "source": f"out/{name}",
            "mebibytes": 2.65,
            "seconds": 13.0,
            "tokens_per_second": 3150.0,
            "metrics": {
                "perplexity": interval(46.05 + damage * 0.6),
                "excess_nll": interval(damage * 0.013, 0.4),
                "kl": interval(kl.mean()),
                "jsd": interval(jsd.mean()),
                "sampled_jsd": interval(sampled.mean()),
                "top1_agreement": interval(1 - 0.06 * damage, 0.004),
                **mean,
                **{
                    f"region_{letter}": interval(chosen.mean())
                    for letter, chosen in zip("abcd", regions, strict=True)
                },
            },
            "layers": layers,
            "histograms": {
                **{
                    key: histogram(values[key], log_edges)
                    for key in ("sampled_jsd", "jsd", "kl")
                },
                "routing_shift": histogram(shift, np.linspace(0, 1, 41)),
            },
        }

    def replay(self, method="AutoRound"):
        change = self.random.normal(-0.012, 0.015, 900)
        return {
            "format": "vsraq-replay/1",
            "method": method,
            "tokens": 40_960,
            "chosen": 900,
            "region": "B",
            "before": {"sampled_jsd": interval(0.031)},
            "after": {"sampled_jsd": interval(0.019)},
            "improved": interval(float((change < 0).mean())),
            "change": histogram(change, np.linspace(-0.04, 0.04, 41)),
        }

    def write(self, folder, replay=True):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(self.results))
        places = {
            name: np.arange(self.tokens, dtype=np.int32)
            for name in ("sequence", "position", "token")
        }
        save_file(places | self.sampled, folder / "tokens.safetensors")
        if replay:
            (folder / "replay.json").write_text(json.dumps(self.replay()))
        return folder


def run_record(blocks=6, experts=32, iters=50):
    """A run's record; the last block has no next router, three experts no token."""
    random = np.random.default_rng(3)
    found = []
    for block in range(blocks):
        steps = np.arange(iters)
        decay = 0.55 + 0.45 * np.exp(-steps / 12)
        losses = {
            "reconstruction": 0.004 * (block + 1) * decay,
            "router": 0.02 * (block + 1) * (0.3 + 0.7 * decay),
        }
        if block < blocks - 1:
            losses["next router"] = 0.05 * (block + 1) * decay
        losses = {
            name: list(values * random.normal(1, 0.03, iters))
            for name, values in losses.items()
        }
        name = f"model.layers.{block}"
        router = {
            "name": f"{name}.mlp.gate",
            "refit": True,
            "logit_error": [0.02 * (block + 1), 0.015 * (block + 1)],
            "jaccard": [0.95 - 0.01 * block, 0.96 - 0.01 * block],
        }
        found.append(
            {
                "name": name,
                "seconds": 6.0 + block / 10,
                "iterations": iters,
                "best_iteration": 0 if block == 2 else int(iters - 1 - block),
                "losses": losses,
                "weights": {"router": 0.1, "next router": 0.02},
                "routers": [router],
            }
        )
    coverage = {
        block["routers"][0]["name"]: [int(n) for n in random.integers(20, 900, experts)]
        for block in found
    }
    for block, expert in ((1, 4), (4, 9), (4, 21)):
        if block < blocks:
            coverage[f"model.layers.{block}.mlp.gate"][expert] = 0
    return {
        "format": "vsraq-run/1",
        "created": "2026-01-01T00:00:00Z",
        "versions": {"vsraq": "0.1.0", "torch": "2.13.0", "auto-round": "0.16.1"},
        "model": "models/tiny",
        "scheme": "W4A16",
        "recipe": None,
        "seconds": {"planning": 18.5, "tuning": 49.0},
        "peak_mebibytes": {"host": 1380.0, "devices": {}},
        "blocks": found,
        "coverage": coverage,
    }


def write_export(folder, plan=True):
    """The parts of an export that a report reads, without its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vsraq_run.json").write_text(json.dumps(run_record()))
    if plan:
        made_up(blocks=6).save(folder / "vsraq_bit_plan.json")
    return folder
