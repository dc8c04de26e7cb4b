"""LSTM layers (Hochreiter and Schmidhuber 1997), regularized as in Zaremba et al. 2014.

Shape letters: B batch, L length, D inputs, H hidden units, N layers, G = 4 H gates.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.elementwise import add_bias
from lm.kernels.lstm_scan import LstmState, SegmentStarts, lstm_scan
from lm.models.classic.linear import init_linear
from lm.models.copying import EncodedSource
from lm.models.transformer_config import InitConfig
from lm.models.variables import Kind, Role
from lm.parallel.mesh import constrain


@dataclass(frozen=True)
class RecurrentConfig(InitConfig):
    """Configuration of recurrent models; fields are documented in `lm/config/keys.py`."""

    n_layers: int
    d_model: int
    d_hidden: int
    vocab_size: int
    bidirectional: bool = False
    carry: bool = False
    n_classes: int = 0
    tie_embeddings: bool = True
    copy: bool = False
    dropout: float = 0.0
    _: KW_ONLY
    init: str = "uniform"
    init_std: float = 0.05
    loss_chunk: int = 0


@flax.struct.dataclass
class LstmCache:
    """State of all layers after the tokens so far, and the segment of the last token.

    The batch is the first axis of every array.
    """

    state_BN2H: jax.Array
    segment_B: jax.Array
    source: EncodedSource | None = None

    def layer(self, index: int) -> LstmState:
        """Return the state of one layer, [B, H] each."""
        return LstmState(self.state_BN2H[:, index, 0], self.state_BN2H[:, index, 1])

    def take(self, rows: jax.Array) -> LstmCache:
        """Return a cache whose row i is row `rows[i]` of this one, as beam search needs."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)


class LstmLayer(nn.Module):
    """LSTM layer in one direction, with the two biases of Zaremba's code.

    Unless all initialization is uniform, the forget bias starts at 1 (Jozefowicz et al. 2015).
    """

    config: RecurrentConfig
    n_in: int
    n_hidden: int
    name_in: str
    reverse: bool = False

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, before: LstmState | None, starts: SegmentStarts | None
    ) -> LstmState:
        """Return the states [B, L, H] after every token, starting from `before`, or 0."""
        c, H = self.config, self.n_hidden
        if before is None:
            before = LstmState(*jnp.zeros((2, x_BLD.shape[0], H)))
        names = ("gates", "hidden")
        role = Role(Kind.MATRIX, c.stream, "body")
        inputs = init_linear(
            c,
            self.n_in,
            (4, H),
            (self.name_in, *names),
            role,
            bias_init=forget_bias_init,
            name="input",
        )
        recurrent = init_linear(c, H, (4, H), ("hidden", *names), role, name="recurrent")
        gates_BLG = inputs(x_BLD).reshape(*x_BLD.shape[:2], 4 * H)
        gates_BLG = add_bias(gates_BLG, recurrent.bias.reshape(4 * H))
        kernel_HG = recurrent.kernel.reshape(H, 4 * H)
        return lstm_scan(gates_BLG, kernel_HG, before, starts, reverse=self.reverse, dtype=c.dtype)


def forget_bias_init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Initialize biases [4, H]: 1 for the forget gate, 0 for the others."""
    return jnp.zeros(shape, dtype).at[1].set(1)


class LstmStack(nn.Module):
    """Stack of `n_layers` layers, with dropout on the inputs of each but not on its recurrence.

    Attributes:
        config: configuration.
        deterministic: True turns dropout off.
        bidirectional: half of the units of each layer read from the end.
    """

    config: RecurrentConfig
    deterministic: bool
    bidirectional: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        segments_BL: jax.Array | None = None,
        before: LstmCache | None = None,
        entering: list[LstmState] | None = None,
    ) -> tuple[jax.Array, list[LstmState]]:
        """Return the outputs [B, L, H], and the states of every layer after every token.

        Args:
            x_BLD: inputs.
            segments_BL: segments; the state is reset at the start of each segment.
            before: state before the first token; default 0.
            entering: for each layer, initial states [B, L, H] of segments; default 0.
        """
        c, all_starts = self.config, None
        if segments_BL is not None:
            previous_B = None if before is None else before.segment_B
            forwards = segment_starts(segments_BL, previous_B)
            all_starts = (forwards, segment_starts(segments_BL, reverse=True))
        states = []
        for i in range(c.n_layers):
            x_BLD = nn.Dropout(c.dropout, deterministic=self.deterministic)(x_BLD)
            directions = []
            for reverse in (False, True)[: 1 + self.bidirectional]:
                n_hidden, name_in = (
                    c.d_hidden // (1 + self.bidirectional),
                    "hidden" if i else "embed",
                )
                name = f"layer_{i}_reverse" if reverse else f"layer_{i}"
                layer = LstmLayer(c, x_BLD.shape[-1], n_hidden, name_in, reverse, name=name)
                state = before.layer(i) if before else None
                starts = (
                    SegmentStarts(all_starts[reverse], entering[i] if entering else None)
                    if all_starts
                    else None
                )
                directions.append(layer(x_BLD, state, starts))
            states.append(
                LstmState(*(jnp.concatenate(xs, -1) for xs in zip(*directions, strict=True)))
            )
            x_BLD = constrain(states[-1].hidden.astype(c.dtype), "batch", "length", "hidden")
        return x_BLD, states


def segment_starts(
    segments_BL: jax.Array, previous_B: jax.Array | None = None, reverse: bool = False
) -> jax.Array:
    """Return [B, L], true for the first token of each segment in reading direction.

    `previous_B` are the segments before the first token.
    """
    if reverse:
        return segment_starts(segments_BL[:, ::-1], previous_B)[:, ::-1]
    previous_B = segments_BL[:, 0] - 1 if previous_B is None else previous_B
    return segments_BL != jnp.column_stack([previous_B, segments_BL[:, :-1]])


def last_states(states: list[LstmState]) -> jax.Array:
    """Return the state of all layers after the last token, [B, N, 2, H]."""
    return jnp.stack([jnp.stack([x[:, -1] for x in state], axis=1) for state in states], axis=1)
