"""Clean English web text: `lm corpus --config experiments/corpora/clean.py --output DIR`.

The rules and their order are FineWeb's (Penedo et al. 2024, arXiv:2406.17557): language, Gopher's
and C4's rules, its own, near duplicates by MinHash, personal data masked last. `lm corpus --rules`
lists all rules and their options. Variants: "web", jsonl files in the data directory's folder web;
"stdlib", the source code of the running Python, which no rule of prose fits.
"""

from ml_collections import ConfigDict

VARIANTS = ("web", "stdlib")


def get_config(variant="web"):
    config = ConfigDict()
    if variant == "stdlib":
        config.sources = {"python": {"source": "stdlib", "license": "PSF-2.0"}}
        config.rules = ("exact_duplicates", "near_duplicates", "personal_data")
        return config
    config.sources = {"web": {"source": "jsonl:web/*.jsonl*", "license": "unknown"}}
    config.rules = (
        "language",
        "gopher_repetition",
        "gopher_quality",
        "c4_quality",
        "fineweb_quality",
        "near_duplicates",
        "personal_data",
    )
    config.language = {"languages": ("en",)}
    # FineWeb's bands; the default ones find more (experiments/RESULTS.md).
    config.near_duplicates = {"num_buckets": 14, "hashes_per_bucket": 8}
    # FineWeb leaves C4's rule of terminal punctuation out: alone it removes 30 % of the text.
    config.c4_quality = {"filter_no_terminal_punct": False, "remove_citations": False}
    return config
