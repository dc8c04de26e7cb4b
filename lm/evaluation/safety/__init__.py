"""Standing safety evaluation: the sets of `lm eval --safety` and of `eval.safety` while training.

Read `suite.py` (what a set is, and running several), then `bias.py`; `lm/config/registries.py`
names the sets and their options. Figures go to metrics.jsonl as "eval/safety/SET/FIGURE", of which
`lm/tools/reports/safety_page.py` draws the trend. All data are local files; no text of a model is
printed or kept.
"""
