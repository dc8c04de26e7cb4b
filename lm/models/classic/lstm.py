"""A stack of LSTM layers (Hochreiter and Schmidhuber 1997) as Zaremba et al. 2014 regularise it.

Shape letters: B batch, L length, D inputs, H hidden units, N layers, G = 4 H gates.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.dense import add_bias
from lm.kernels.lstm_scan import LstmState, SegmentStarts, lstm_scan
from lm.models.layers import init_linear
from lm.models.variables import InitConfig, Kind, Role
from lm.parallel.sharding import constrain


@dataclass(frozen=True)
class RecurrentConfig(InitConfig):
    """A recurrent model; the meaning of each field is in `lm/config/`."""

    n_layers: int
    d_model: int
    d_hidden: int
    vocab_size: int
    bidirectional: bool = False
    carry: bool = False
    n_classes: int = 0
    tie_embeddings: bool = True
    dropout: float = 0.0
    _: KW_ONLY
    init: str = "uniform"
    init_std: float = 0.05
    loss_chunk: int = 0


@flax.struct.dataclass
class Source:
    """What a decoder attends to: an encoder's outputs."""

    encoded_BSH: jax.Array
    segment_ids_BS: jax.Array


@flax.struct.dataclass
class LstmCache:
    """What a recurrent model has of the tokens so far: hidden and cell of every layer, and the
    segment that they are of. Rows are the first axis everywhere."""

    state_BN2H: jax.Array
    segment_B: jax.Array
    source: Source | None = None

    def of_layer(self, index: int) -> LstmState:
        """A layer's state, [B, H] each."""
        return LstmState(self.state_BN2H[:, index, 0], self.state_BN2H[:, index, 1])

    def take(self, rows: jax.Array) -> LstmCache:
        """The memory whose row i is this one's row `rows[i]`: what a beam search goes on with."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)


class Layer(nn.Module):
    """One layer in one direction, with the two biases of Zaremba's code.

    Unless everything starts uniform, the forget gate's bias starts at 1 (Jozefowicz et al. 2015).
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
        """The states [B, L, H] after every token, the first of which follows `before`, or zero."""
        c, H = self.config, self.n_hidden
        if before is None:
            before = LstmState(*jnp.zeros((2, len(x_BLD), H)))
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
    """Biases [4, H]: 1 for the forget gate."""
    return jnp.zeros(shape, dtype).at[1].set(1)


class Stack(nn.Module):
    """`n_layers` layers, dropout on the input of each, none on what goes from token to token.

    `both_ways`, half of the units of each layer read from the end.
    """

    config: RecurrentConfig
    deterministic: bool
    both_ways: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        segments_BL: jax.Array | None = None,
        before: LstmCache | None = None,
        entering: list[LstmState] | None = None,
    ) -> tuple[jax.Array, list[LstmState]]:
        """The outputs [B, L, H], and every layer's states after every token.

        The first token follows `before`. Where another segment starts, the state does too: from
        zero, or from what is `entering` each layer [B, L, H].
        """
        c, here = self.config, None
        if segments_BL is not None:
            previous_B = None if before is None else before.segment_B
            forwards = segment_starts(segments_BL, previous_B)
            here = (forwards, segment_starts(segments_BL, reverse=True))
        states = []
        for i in range(c.n_layers):
            x_BLD = nn.Dropout(c.dropout, deterministic=self.deterministic)(x_BLD)
            directions = []
            for reverse in (False, True)[: 1 + self.both_ways]:
                n_hidden, name_in = c.d_hidden // (1 + self.both_ways), "hidden" if i else "embed"
                name = f"layer_{i}_reverse" if reverse else f"layer_{i}"
                layer = Layer(c, x_BLD.shape[-1], n_hidden, name_in, reverse, name=name)
                state = before.of_layer(i) if before else None
                starts = (
                    SegmentStarts(here[reverse], entering[i] if entering else None)
                    if here
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
    """Whether each token is the first of its segment as one reads; `previous_B` came before."""
    if reverse:
        return segment_starts(segments_BL[:, ::-1], previous_B)[:, ::-1]
    previous_B = segments_BL[:, 0] - 1 if previous_B is None else previous_B
    return segments_BL != jnp.column_stack([previous_B, segments_BL[:, :-1]])


def last(states: list[LstmState]) -> jax.Array:
    """The state after the last token of all layers, [B, N, 2, H]."""
    return jnp.stack([jnp.stack([x[:, -1] for x in state], axis=1) for state in states], axis=1)
