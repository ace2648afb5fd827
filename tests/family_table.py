# SPDX-License-Identifier: Apache-2.0
"""What works for each MoE family of transformers, found by running it.

    python tests/family_table.py      # all of them; writes src/vsraq/families.md

A row is what one real AutoRound run (W4A16, 2 iterations) of a tiny random model of
the family has shown; tests compare the rows with the file.
"""

import logging
import os
import re
import sys
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import transformers
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.utils import get_block_names

import families
import tiny
from vsraq import VSRAQConfig
from vsraq.capture import RouterCapture
from vsraq.checkpoint import CheckpointError, verify
from vsraq.routers import expert_containers, find_routers

TABLE = Path(__file__).parents[1] / "src" / "vsraq" / "families.md"
HEADER = """\
# MoE families

What one real AutoRound run (W4A16, 2 iterations) of a tiny random model of each family
of transformers {transformers} has shown: its routers, how they choose (learned from
their own choices, and compared with what reaches the experts), and what the two router
losses reach. Written by `make families`; `make test-families` repeats every run and
compares.

- **own**: MoE blocks in which the loss of the block's own router reaches a quantized
  layer; **next**: blocks that the loss of the next router reaches, of those that have
  a MoE router behind them.
- "(with images)" is the larger model around a language model, calibrated on text: the
  routers of the text decoder are aligned, what is for images stays as it is.
- z are the raw logits. "identity" is the choice of the highest logits, whatever
  increasing function follows. Groups are those of the tiny model.
- Status "works": routers are captured as transformers itself records them, the choice
  is the model's own (where it is known, and seen to reach the experts), the run aligns
  them, and the export keeps them in full precision
  and passes `vsraq verify`.
"""
WORKS = "works"
WITH_IMAGES = " (with images)"  # the larger model around a language model
# routers that text never reaches are for the user to leave out
PATTERNS = {f"ernie4_5_vl_moe{WITH_IMAGES}": r"text_moe\.gate"}
_CONVOLUTIONS = "AutoRound stores three convolutions as one of them"
_ATTENTION = "AutoRound stores a third of the vision tower's merged attention"
UNVERIFIED = {
    "bailing_hybrid": _CONVOLUTIONS,
    "kimi_linear": _CONVOLUTIONS,
    f"glm5_next{WITH_IMAGES}": _CONVOLUTIONS,
    f"kimi_k25{WITH_IMAGES}": _ATTENTION,
    f"nemotron_h_omni{WITH_IMAGES}": _ATTENTION,
    f"unlimited_ocr{WITH_IMAGES}": _ATTENTION,
    f"step3p7{WITH_IMAGES}": f"{_ATTENTION}, and its experts as one of their parts",
    "longcat_flash": "AutoRound stores its experts under names that no loader knows",
    f"dots3_note{WITH_IMAGES}": "it wants the experts of the vision tower quantized",
    f"ernie4_5_vl_moe{WITH_IMAGES}": "its two gates are stored as one tensor",
    f"minimax_m3_vl{WITH_IMAGES}": "merged layers are stored in parts",
}


def every_type():
    return [
        *families.causal_moe_types(),
        *(f"{name}{WITH_IMAGES}" for name in families.multimodal_moe_types()),
    ]


def tiny_model(model_type):
    name = model_type.removesuffix(WITH_IMAGES)
    return families.tiny_family(name, multimodal=name != model_type)


def routers_of(model_type, model):
    """Those inside the blocks that AutoRound tunes: not the ones for images."""
    blocks = tuple(f"{b}." for group in get_block_names(model) for b in group)
    routers = find_routers(model, router_pattern=PATTERNS.get(model_type))
    return [router for router in routers if router.name.startswith(blocks)]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model_type: str
    router: str
    chooses_by: str
    own: str
    next: str
    status: str

    @property
    def works(self) -> bool:
        return self.status.startswith(WORKS)


def check_logits(model, routers, ids, with_images):
    """Every router records what transformers records of it, and the other way round."""
    with torch.no_grad(), RouterCapture(model, routers) as capture:
        output = model(input_ids=ids, output_router_logits=True)
        captured = capture.take()
    if with_images and not hasattr(output, "router_logits"):
        return  # some larger models hand out none
    recorded = [o.flatten(0, -2).float() for o in output.router_logits]
    unknown = set(range(len(recorded)))
    for router in routers:
        logits = torch.cat(captured[router.name])
        rule = router.rule
        forms = [logits, logits.softmax(-1)]
        if rule is not None and rule.logit_softcap is not None:
            cap = rule.logit_softcap
            forms.append((logits / cap).tanh() * cap)
        if rule is not None:
            forms.append(logits * rule.logit_scale)
        same = {
            index
            for index, own in enumerate(recorded)
            for form in forms
            if own.shape == form.shape and torch.allclose(own, form, atol=1e-5)
        }
        # a router that does not choose by its logits need not be recorded
        assert same or rule is None, f"{router.name} is not what transformers records"
        unknown -= same
    assert not unknown, f"{len(unknown)} recorded routers were not found"


def check_choice(model, routers, ids):
    """What the rule names gets the token; for how many routers that was seen."""
    routers = [router for router in routers if router.rule is not None]
    if not routers:
        return 0
    chosen = {router.name: [] for router in routers}
    handles = []
    for router in routers:

        def record(_module, args, kwargs, router=router):
            for value in (*args, *kwargs.values()):
                if (
                    isinstance(value, torch.Tensor)
                    and value.dtype == torch.int64
                    and value.shape[1:] == (router.top_k,)
                ):
                    chosen[router.name].append(value)

        for name in expert_containers(model, [router]):
            experts = model.get_submodule(name)
            hook = experts.register_forward_pre_hook(record, with_kwargs=True)
            handles.append(hook)
    with torch.no_grad(), RouterCapture(model, routers) as capture:
        model(input_ids=ids)
        logits = capture.take()
    for handle in handles:
        handle.remove()
    seen = 0
    for router in routers:
        if not chosen[router.name]:
            continue
        seen += 1
        scores = router.bind(model).scores(torch.cat(logits[router.name]))
        top_k = router.top_k
        best = scores.topk(top_k + 1)
        clear = best.values[:, top_k - 1] - best.values[:, top_k] > 1e-5
        assert clear.float().mean() > 0.9
        predicted = best.indices[:, :top_k].sort(-1).values
        actual = torch.cat(chosen[router.name]).sort(-1).values
        assert torch.equal(predicted[clear], actual[clear]), router.name
    return seen


def run(model, folder, config):
    """A real run; the export's folder and our lines of the log."""
    with tiny.LogLines() as log:
        autoround = AutoRound(
            model,
            tokenizer=tiny.tiny_tokenizer(),
            processor=tiny.tiny_tokenizer(),  # of text only
            scheme="W4A16",
            group_size=32,
            alg_configs=config,
            dataset=tiny.save_text(folder / "text.jsonl"),
            **tiny.RUN,
        )
        _, exported = autoround.quantize_and_save(str(folder), format="auto_round")
    return exported, log


def faults_of(exported, reference, routers):
    try:
        assert verify(exported, reference).routers == routers
    except CheckpointError as error:
        return error.faults
    return []


def reach(model_type, router_model, folder):
    """Own and next reach of a run, and what is wrong with its export."""
    router_model.save_pretrained(folder / "fp")
    options = {"iters": 2, "router_weight": 1.0}
    if model_type in PATTERNS:
        options["router_pattern"] = PATTERNS[model_type]
    without = ""
    try:
        both = VSRAQConfig(**options, next_router_weight=0.1)
        exported, log = run(router_model, folder, both)
    except NotImplementedError as error:
        without = str(error).partition("; allowed")[0].rpartition(": ")[2]
        if "hands more than" in str(error):
            without = str(error).rpartition(": ")[2]
        model = tiny.in_bfloat16(tiny_model(model_type))
        exported, log = run(model, folder, VSRAQConfig(**options))
    lines = tiny.block_lines(log)
    own = [line for line in lines if line["reached"] is not None]
    following = [line for line in lines if line["next_reached"] is not None]
    for line in own:
        warned = any(
            line["block"] in message and "reaches no quantized layer" in message
            for message in log
        )
        assert warned == (line["reached"] == "0")
    status = WORKS
    inside = routers_of(model_type, router_model)
    faults = faults_of(exported, folder / "fp", len(inside))
    if model_type in PATTERNS:
        status += f" with router_pattern={PATTERNS[model_type]!r}"
    if model_type in UNVERIFIED:
        assert faults
        status += f"; `vsraq verify` does not: {UNVERIFIED[model_type]}"
    elif faults:
        assert all("no quantized experts" in fault for fault in faults), faults
        status += "; AutoRound leaves the experts in full precision"
    if without:
        status += f"; no next-router loss: {without}"
    return (
        f"{sum(line['reached'] != '0' for line in own)} of {len(own)}",
        f"{sum(line['next_reached'] != '0' for line in following)} of {len(following)}",
        status,
    )


def examine(model_type):
    """Run a family and say what works."""
    model = tiny_model(model_type)
    ids = torch.cat(tiny.calibration())
    try:
        routers = routers_of(model_type, model)
    except ValueError as error:
        return Row(model_type, "", "", "", "", f"refused: {error}")
    check_logits(model, routers, ids, WITH_IMAGES in model_type)
    seen = check_choice(model, routers, ids)
    classes = dict.fromkeys(type(model.get_submodule(r.name)).__name__ for r in routers)
    rules = dict.fromkeys(
        f"{router.rule}, K = {router.top_k}"
        if router.rule is not None
        else f"unknown: {router.unverified}"
        for router in routers
    )
    described = (
        model_type,
        f"{len(routers)} {', '.join(classes)}",
        "; ".join(rules) + ("" if seen else " (not seen choosing)"),
    )
    del model
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = tiny.in_bfloat16(tiny_model(model_type))
            found = reach(model_type, model, Path(folder))
        except (Exception, SystemExit) as error:
            model = tiny.in_bfloat16(tiny_model(model_type))
            plain_folder = Path(folder) / "plain"
            plain_folder.mkdir()
            try:
                run(model, plain_folder, SignRoundConfig(iters=2))
            except (Exception, SystemExit) as plain:
                reason = f"{type(plain).__name__}: {plain}".split("\n")[0]
                return Row(*described, "", "", f"AutoRound fails: {reason}")
            raise error from None
    return Row(*described, *found)


def render(rows):
    works = sum(row.works for row in rows)
    titles = [field.name.replace("_", " ") for field in fields(Row)]
    lines = [
        HEADER.format(transformers=transformers.__version__),
        f"{works} of {len(rows)} work.\n",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cells(row):
    return [str(cell).replace("|", "\\|") for cell in astuple(row)]


def read(path=TABLE):
    """The rows of the table, by model type."""
    rows = {}
    for line in path.read_text().splitlines():
        columns = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(columns) == len(fields(Row)) and columns[0] not in ("---", "model type"):
            row = Row(*(c.replace("\\|", "|") for c in columns))
            rows[row.model_type] = row
    return rows


def main():
    os.environ.setdefault("AR_WORK_SPACE", tempfile.mkdtemp(prefix="vsraq-families-"))
    logging.getLogger("autoround").setLevel(logging.WARNING)
    logging.getLogger("autoround.vsraq").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    names = sys.argv[1:] or every_type()
    rows = []
    for name in names:
        rows.append(examine(name))
        print(" | ".join(cells(rows[-1])), flush=True)
    if not sys.argv[1:]:
        TABLE.write_text(render(rows))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
