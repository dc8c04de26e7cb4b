"""Analysis of runs: `lm report` (a page and figures) and `lm scaling` (scaling laws).

Read `run_records` (runs read from their folders: curves, spikes, incidents), `plotting` (style of
all figures) and `report_page` with its template `page.html`; then `scaling_law` (runs, a fit of
L(N, D), IsoFLOP profiles) and `scaling_study`. `coordinate_check` is muP's. The verbs call
`report_page.write_page` and `scaling_study.study`.
"""
