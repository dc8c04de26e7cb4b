"""Attention maps and residual streams of imported models, against those of `transformers`."""

import copy

import jax
import numpy as np
import pytest
from hf_models import ENCODER_DECODERS, torch

from lm.insight.capture import run_and_capture
from lm.interop import huggingface

KINDS = ["gpt2", "bert", "deberta", "bart", "t5", "llama-grouped-tied", "gemma2"]


@pytest.mark.parametrize("name", KINDS)
def test_attention_maps_match_transformers(make_theirs, name):
    theirs, folder = make_theirs(name)
    model, params = huggingface.load(folder)
    ids = np.random.default_rng(0).integers(4, 96, (2, 9))
    inputs = (ids, ids[:, :6]) if name in ENCODER_DECODERS else (ids,)
    capture = ("attention", "cross_attention", "residual")
    run = jax.jit(lambda v: run_and_capture(model, v, capture, lambda model: model(*inputs))[1])
    ours = run({"params": params})
    theirs = copy.deepcopy(theirs)  # other tests compare the bits of its own attention
    theirs.set_attn_implementation("eager")
    options = {"output_attentions": True, "output_hidden_states": True}
    if name in ENCODER_DECODERS:
        options["decoder_input_ids"] = torch.tensor(inputs[1])
    with torch.no_grad():
        out = theirs(torch.tensor(ids), **options)
    if name in ENCODER_DECODERS:
        expected = {
            "encoder/attention": out.encoder_attentions,
            "decoder/attention": out.decoder_attentions,
            "decoder/cross_attention": out.cross_attentions,
            "encoder/residual": out.encoder_hidden_states,
            "decoder/residual": out.decoder_hidden_states,
        }
    else:
        expected = {"attention": out.attentions, "residual": out.hidden_states}
    for path, arrays in expected.items():
        theirs_here = np.stack([x.numpy() for x in arrays])
        if path.endswith("residual"):  # their last one is after the final norm
            np.testing.assert_allclose(ours[path][:-1], theirs_here[:-1], atol=1e-4, rtol=0)
        else:
            np.testing.assert_allclose(ours[path], theirs_here, atol=1e-5, rtol=0)
