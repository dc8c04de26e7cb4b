"""Safety evaluation: the sets of `lm eval --safety` and of `eval.safety` during training.

Read `suite.py` (interface of a set, running several), then `bias.py`; `lm/config/registries.py`
lists the sets and their options. Metrics go to metrics.jsonl as "eval/safety/SET/FIGURE", whose
trend `lm/tools/reports/safety_page.py` plots. All data are local files; generated text is never
printed or stored.
"""
