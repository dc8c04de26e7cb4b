"""Tools that the trainer does not import: planning, launching, reports, corpora.

`planning` (`lm plan`: memory, FLOPs and time on a described machine), `launching` (`lm launch`,
`lm sweep`), `reports` (`lm report`, `lm scaling`), and the shared `formatting`.
"""
