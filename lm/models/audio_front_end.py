"""Front end of a speech encoder: convolutions of log-mel features (Radford et al. 2022, §2.2).

Shape letters: B batch, F frames of 10 ms, S source length, C channels, M mel bins, D model.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.elementwise import gelu_erf
from lm.models.layers import Linear
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role, Stream

TAPS = 3  # kernel width of the convolutions, in frames
STRIDE = 2  # of the second convolution: frames per encoder position


class AudioFrontEnd(nn.Module):
    """Convolutions of strides 1 and 2 with GELU; adds sinusoidal positions if the stack has none.

    Each convolution is a linear map of windows of frames, [3, C] to D.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config

        def convolution(channels: int, axis: str, stream: Stream) -> Linear:
            role = Role(Kind.MATRIX, stream, "body")
            init, names = c.kernel_init(c.stddev(TAPS * channels, c.d_model)), ("taps", axis)
            shapes = (TAPS, channels), (c.d_model,)
            return Linear(*shapes, (*names, "residual"), role, c.bias, init, c.dtype)

        self.conv1 = convolution(c.n_mels, "mels", "frames")
        self.conv2 = convolution(c.d_model, "embed", "source")

    def __call__(
        self, features_BFM: jax.Array, positions_BS: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Embed log-mel features.

        Args:
            features_BFM: features; zeros are appended to an odd number of frames.
            positions_BS: positions of the outputs; None: 0 … S-1.

        Returns:
            Embeddings [B, S, D] with S = F / 2, and their positions.
        """
        c = self.config
        x_BFD = gelu_erf(self.conv1(windows(features_BFM.astype(c.dtype), 1)))
        x_BSD = gelu_erf(self.conv2(windows(x_BFD, STRIDE)))
        if positions_BS is None:
            positions_BS = jnp.arange(x_BSD.shape[1])[None]
        if c.positions in ("learned", "sinusoidal"):
            x_BSD += split_sinusoidal(positions_BS, c.d_model).astype(c.dtype)
        return x_BSD, positions_BS


def windows(x_BLC: jax.Array, stride: int) -> jax.Array:
    """Return the inputs of each convolution output, [B, ceil(L / stride), 3, C].

    Output i reads inputs `stride` i - 1, `stride` i and `stride` i + 1; outside are zeros.
    """
    L = x_BLC.shape[1]
    padded = jnp.pad(x_BLC, ((0, 0), (1, 1), (0, 0)))
    return jnp.stack([padded[:, i : i + L : stride] for i in range(TAPS)], axis=2)


def split_sinusoidal(positions_BS: jax.Array, d_model: int) -> jax.Array:
    """Return Whisper's position vectors [B, S, D] (released code of Radford et al. 2022).

    The first half are sines, the second cosines, of wavelengths from 2π to 10,000 · 2π:
    PE(pos, i) = sin(pos / 10000^(i / (D/2 - 1))), and PE(pos, D/2 + i) its cosine.
    """
    step = np.float32(math.log(10_000) / (d_model // 2 - 1))
    angles_BSR = positions_BS[..., None] * np.exp(-step * np.arange(d_model // 2, dtype=np.float32))
    return jnp.concatenate([jnp.sin(angles_BSR), jnp.cos(angles_BSR)], axis=-1)
