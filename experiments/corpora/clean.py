"""Clean English web text: `lm corpus --config experiments/corpora/clean.py --output DIR`.

The rules and their order are FineWeb's (Penedo et al. 2024, arXiv:2406.17557): language, Gopher's
and C4's rules, its own, near duplicates by MinHash, personal data masked last. `lm corpus --rules`
lists all rules and their options. Variants: "web", jsonl files in the folder `web` of the data
directory; "stdlib", Python's standard library, without the rules for prose.
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
    # FineWeb's MinHash bands; the defaults find more duplicates (experiments/RESULTS.md).
    config.near_duplicates = {"num_buckets": 14, "hashes_per_bucket": 8}
    # FineWeb omits C4's terminal-punctuation rule, which alone removes 30 % of the text.
    config.c4_quality = {"filter_no_terminal_punct": False, "remove_citations": False}
    return config
