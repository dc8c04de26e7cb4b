"""Models: from token ids to logits.

Read `transformer_config.py` (a model is a value of it), `layers.py` and `variables.py` (parameters
and their roles), `attention.py` (token mixers and the cache that each brings), `transformer.py`
(block and stack), then a family: `decoder.py`, `encoder.py`, `encoder_decoder.py`, on `base.py`.
`moe.py` has experts, `positions.py` RoPE and other position information, `cache.py` the decoding
cache, `sharded_attention.py` attention on a mesh, `classic/` the models before the Transformer.

Public: `families.make_model` builds the model of a configuration. Models know no mesh: parameters
and activations carry logical axis names.
"""
