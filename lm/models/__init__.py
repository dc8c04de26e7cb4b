"""Models: from token ids to logits.

Reading order: `transformer_config.py` (configuration of a model), `layers.py` and `variables.py`
(parameters and their roles), `attention.py` (token mixers and their caches), `transformer.py`
(block and stack), then a family: `decoder.py` with the common base class, `encoder.py`,
`encoder_decoder.py`. `latent_attention.py`, `mamba.py` and `gated_delta.py` are further token
mixers; `moe.py` has experts, `expert_choice.py` their choice, `model_state.py` their state besides
parameters, `positions.py` position information other than plain RoPE, `cache.py` the decoding
cache, `cross_attention.py` attention to a source, `copying.py` copies of its tokens,
`sharded_attention.py` and `sharded_experts.py` both sublayers on a mesh, `parameter_groups.py` the
choice of trained parameters, `lora.py` low-rank factors for any model, `quantized_kernel.py`
kernels in 8 or 4 bits, `quantized_layers.py` their products, `embedding_noise.py` noise in
training, `classic/` the models before the Transformer.

Public: `transformer_config.make_model` builds the model of a configuration. Models do not depend on
a mesh: parameters and activations carry logical axis names.
"""
