# SPDX-License-Identifier: Apache-2.0
"""Tiny models as AutoRound prepares them for a plan."""

from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

import tiny
from vsraq.autoround.planning import own_fields
from vsraq.autoround.prepared_model import PreparedModel

UNQUANTIZED = {
    "bits": 16,
    "act_bits": 16,
    "data_type": "float",
    "act_data_type": "float",
}


def arguments(**kwargs):
    """What both `plan_bits` and `AutoRound` take."""
    known = {"tokenizer": tiny.tiny_tokenizer(), **tiny.RUN}
    known |= {"processor": tiny.tiny_tokenizer()}  # of text only
    return known | kwargs


def prepare(model, scheme="W4A16", export_format="auto_round", **kwargs):
    kwargs = arguments(dataset=tiny.calibration(), **kwargs)
    return PreparedModel.of(model, scheme, export_format, kwargs)


def resolve(model, scheme, export_format, **kwargs):
    """The scheme of each layer, as AutoRound understands its arguments."""
    run = AutoRound(
        model,
        scheme=scheme,
        alg_configs=SignRoundConfig(),
        dataset=tiny.calibration(),
        **arguments(**kwargs),
    )
    run.formats = export_format
    run.post_init()
    return {name: own_fields(fields) for name, fields in run.layer_config.items()}
