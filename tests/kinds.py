"""Every kind of training: each objective with each family that it trains, in different styles."""

from __future__ import annotations

# "OBJECTIVE FAMILY …": what else is set.
KINDS: dict[str, dict[str, object]] = {
    "causal decoder": {
        "model.positions": "rotary",
        "model.norm": "rmsnorm",
        "model.activation": "swiglu",
        "model.n_kv_heads": 2,
    },
    "span_corruption encoder_decoder experts": {
        "model.n_experts": 4,
        "model.experts_per_token": 1,
        "model.experts_every": 2,
        "model.expert_capacity": 1.0,
        "model.router_jitter": 0.01,
        "model.router_z_loss": 1e-3,
        "model.positions": "relative",
        "model.activation": "relu",
    },
    "chat decoder": {
        "objective.neftune": 5.0,
        "objective.z_loss": 1e-4,
        "model.positions": "rotary",
        "train.loss_chunk": 8,
        "lora.rank": 4,
        "lora.base": "int8",
        "lora.targets": "kernel",
    },
    "prefix decoder": {"model.positions": "alibi"},
    "masked encoder": {
        "objective.next_sentence": True,
        "model.token_types": 2,
        "model.embedding_norm": True,
        "model.norm_placement": "post",
    },
    "span_corruption encoder_decoder": {
        "objective.z_loss": 1e-4,
        "model.positions": "relative",
        "model.norm": "rmsnorm",
        "model.activation": "geglu",
        "model.bias": False,
        "model.attention_scale": 1.0,
        "model.tie_embeddings": False,
        "model.init": "fan_in",
    },
    "seq2seq encoder_decoder": {
        "objective.label_smoothing": 0.1,
        "model.positions": "sinusoidal",
        "model.norm_placement": "post",
        "model.activation": "relu",
        "model.scale_embeddings": True,
        "model.init": "xavier",
    },
    "seq2seq lstm_encoder_decoder": {"model.bidirectional": True},
    "classification encoder": {"model.token_types": 2},
    "classification decoder": {},
    "classification encoder_decoder": {},
    "classification lstm": {"model.bidirectional": True},
    "token_classification encoder": {},
    "span_qa encoder": {"model.token_types": 2, "data.doc_stride": 4},
    "causal lstm": {
        "model.carry": True,
        "model.init": "uniform",
        "model.init_std": 0.1,
        "data.order": "contiguous",
        "data.isolate_documents": False,
    },
    "causal nplm": {"model.direct": True},
    "dpo decoder": {"objective.beta": 0.5},
    "skip_gram skip_gram": {"objective.subsample": 0.0},
}
