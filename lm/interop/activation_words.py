"""Names of activations in `transformers`, preferred ones first."""

from __future__ import annotations

ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu_erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Of gated feed-forward layers.
GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu_erf",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu_fast": "geglu",
    "gelu_accurate": "geglu",
    "gelu_python": "geglu_erf",
    "relu": "reglu",
}
# Of T5, in which "gated-gelu" stands for the approximation.
T5_ACTIVATIONS = (
    {f"gated-{word}": name for word, name in GATED_ACTIVATIONS.items()}
    | {"gated-gelu": "geglu"}
    | ACTIVATIONS
)
