"""`lm corpus`: clean documents, drop duplicates and test data, write shards and a data card.

The blocks and executors are those of `datatrove`; here are a configuration that names them
(`corpus_config.py`, `corpus_rules.py`), blocks that need no download (`text_blocks.py`,
`decontamination.py`, `classifier_rule.py`), what every rule did (`rule_tally.py`), the stages and
how they are run (`corpus_stages.py`, `corpus_run.py`), and the card (`data_card.py`).
"""
