"""Analysis of runs: `lm report` (page and figures) and `lm scaling` (scaling laws).

Read `run_records` (runs read from their folders: curves, spikes, incidents), `plotting` (figure
style) and `report_page` with its template `page.html`; then `scaling_law` (runs, fit of L(N, D),
IsoFLOP profiles) and `scaling_study`. `coordinate_check` is for muP. The commands call
`report_page.write_page` and `scaling_study.study`.
"""
