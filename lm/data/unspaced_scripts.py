"""Scripts written without spaces between words."""

from __future__ import annotations

import re

# Chinese, Japanese, Thai, Lao, Tibetan, Burmese and Khmer; Korean has spaces.
UNSPACED = re.compile(
    r"[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f]"
)
