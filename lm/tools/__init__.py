"""Tools around training; the trainer imports none of them.

`planning` (`lm plan`: memory, FLOPs and time of a described machine), `launching` (`lm launch`,
`lm sweep`), `reports` (`lm report`, `lm scaling`), and `formatting`, which they share.
"""
