"""`lm corpus`: clean and deduplicate documents, remove test data, write shards and a data card.

Blocks and executors come from `datatrove`. This package has the configuration (`corpus_config.py`,
`corpus_rules.py`), blocks that need no download (`text_blocks.py`, `decontamination.py`,
`classifier_rule.py`), statistics of every rule (`rule_tally.py`), the stages and their execution
(`corpus_stages.py`, `corpus_run.py`), and the card (`data_card.py`).
"""
