"""Models before the Transformer.

`lstm.py` has LSTM layers, `recurrent.py` LSTM models, `feed_forward.py` NPLM and skip-gram.

Public: the model classes and their configurations, by family in `lm/config/registries.py`.
"""
