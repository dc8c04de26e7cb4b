"""Models before the Transformer: LSTMs (`lstm.py` layers, `recurrent.py` models), NPLM, skip-gram.

Public: the model classes and their configurations, by family in `lm/config/registries.py`.
"""
