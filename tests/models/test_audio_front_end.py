"""Convolutions and positions of a speech encoder, against PyTorch's and Whisper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from transformers.models.whisper.modeling_whisper import sinusoids

from lm.models.audio_front_end import AudioFrontEnd, split_sinusoidal
from lm.models.transformer_config import TransformerConfig

CONFIG = TransformerConfig(
    n_layers=1, d_model=6, n_heads=1, n_kv_heads=1, head_dim=6, d_ff=8, vocab_size=9,
    max_length=4, n_mels=5, init_std=0.5,
)  # fmt: skip


@pytest.mark.parametrize("n_frames", [8, 7, 1])
def test_front_end_is_two_convolutions_with_gelu_and_sinusoids(n_frames):
    features_BFM = np.random.default_rng(0).normal(size=(2, n_frames, 5)).astype(np.float32)
    front_end = AudioFrontEnd(CONFIG)
    params = meta.unbox(front_end.init(jax.random.key(0), features_BFM, None))
    params = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.shape[-1]), params)  # biases not 0
    found_BSD, positions = front_end.apply(params, features_BFM, None)

    x = torch.tensor(features_BFM).mT
    for name, stride in (("conv1", 1), ("conv2", 2)):
        own = jax.tree.map(np.array, params["params"][name])
        kernel, bias = torch.tensor(own["kernel"]).permute(2, 1, 0), torch.tensor(own["bias"])
        x = torch.nn.functional.conv1d(x, kernel, bias, stride, padding=1)
        x = torch.nn.functional.gelu(x)
    expected_BSD = x.mT + sinusoids(x.shape[-1], 6)
    np.testing.assert_allclose(found_BSD, expected_BSD, atol=1e-5)
    assert positions.tolist() == [list(range(-(-n_frames // 2)))]


def test_positions_are_whispers_to_the_longest_audio():
    found_SD = split_sinusoidal(jnp.arange(1500)[None], 384)[0]
    # The angle 1499 rad has 1e-4 of precision in float32.
    np.testing.assert_allclose(found_SD, sinusoids(1500, 384), atol=2e-4)
    np.testing.assert_allclose(found_SD[:50], sinusoids(50, 384), atol=1e-5)
