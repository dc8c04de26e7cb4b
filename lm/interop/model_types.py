"""Table of the model families that are imported and exported, by `model_type`."""

from __future__ import annotations

from lm.interop import bert, gemma, gpt2, llama, t5
from lm.interop.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        gpt2.GPT2,
        bert.BERT,
        bert.ROBERTA,
        t5.T5,
        llama.LLAMA,
        llama.MISTRAL,
        llama.MIXTRAL,
        llama.QWEN2,
        llama.QWEN3,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
    )
}
