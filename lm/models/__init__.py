"""Models: from token ids to logits.

Read `transformer_config.py` (a model is a value of it), `layers.py` and `variables.py` (parameters
and their roles), `attention.py` (token mixers and the cache that each brings), `transformer.py`
(block and stack), then a family: `decoder.py` with the base of all, `encoder.py`,
`encoder_decoder.py`. `moe.py` has experts, `positions.py` position information other than RoPE,
`cache.py` the decoding cache, `sharded_attention.py` attention on a mesh, `classic/` the models
before the Transformer.

Public: `transformer_config.make_model` builds the model of a configuration. Models know no mesh:
parameters and activations carry logical axis names.
"""
