"""GPT-3 (Brown et al. 2020, Table 2.1 and Appendix B).

| variant | parameters      | paper's | tokens | FLOPs  | expected     |
|---------|-----------------|---------|--------|--------|--------------|
| 125m    | 125,226,240     | 125M    | 300B   | 1.5e20 | LAMBADA 42.7 |
| 350m    | 355,871,744     | 350M    | 300B   | 5.4e20 | LAMBADA 54.3 |
| 760m    | 760,300,032     | 760M    | 300B   | 1.2e21 | LAMBADA 60.4 |
| 1.3b    | 1,315,723,264   | 1.3B    | 300B   | 2.2e21 | LAMBADA 63.6 |
| 2.7b    | 2,651,553,280   | 2.7B    | 300B   | 4.5e21 | LAMBADA 67.1 |
| 6.7b    | 6,658,404,352   | 6.7B    | 300B   | 1.2e22 | LAMBADA 70.3 |
| 13b     | 12,853,386,240  | 13.0B   | 300B   | 2.3e22 | LAMBADA 72.5 |
| 175b    | 174,604,259,328 | 175.0B  | 300B   | 3.1e23 | LAMBADA 76.2 |

LAMBADA is zero-shot accuracy (Appendix H; for 175b also Table 3.2: 76.2, perplexity 3.00). Two rows
of the paper's table are inconsistent: 1.3B lists 24 heads of 128 for a width of 2,048 (16 here),
and 13B a width of 5,140 for 40 heads of 128 (5,120 here). These values reproduce its parameter
counts.

GPT-2's model with 2,048 tokens. Adam (0.9, 0.95, eps 1e-8), weight decay 0.1, clipping at 1; warmup
over 375M tokens, a cosine to 10 % at 260B, then constant to 300B; batches of 0.5M to 3.2M tokens;
documents are packed, and attention crosses them. Different from the paper: batches have their full
size from the start (in the paper they grow over the first 4 to 12 billion tokens), and attention is
dense in every layer (in the paper, every other layer is locally banded with an unpublished width:
set `--config.model.window=W --config.model.global_every=2` for such a model).

    lm train --config experiments/gpt3.py:125m --workdir runs/gpt3 --config.parallel.preset=fsdp \
        --config.data.source=jsonl:DIR/*.jsonl.gz --config.data.tokenizer=gpt2:DIR
"""

from lm.config import choose, default, fill

COLUMNS = "paper model.n_layers model.d_model model.n_heads optimizer.learning_rate data.batch_size"
VARIANTS = {
    "125m": ("gpt3-125m", 12, 768, 12, 6e-4, 256),
    "350m": ("gpt3-350m", 24, 1024, 16, 3e-4, 256),
    "760m": ("gpt3-760m", 24, 1536, 16, 2.5e-4, 256),
    "1.3b": ("gpt3-1.3b", 24, 2048, 16, 2e-4, 512),
    "2.7b": ("gpt3-2.7b", 32, 2560, 32, 1.6e-4, 512),
    "6.7b": ("gpt3-6.7b", 32, 4096, 32, 1.2e-4, 1024),
    "13b": ("gpt3-13b", 40, 5120, 40, 1e-4, 1024),
    "175b": ("gpt3-175b", 96, 12288, 96, 0.6e-4, 1568),  # 3.2M tokens
}


def get_config(variant="125m"):
    config = default()
    model, data, schedule = config.model, config.data, config.schedule
    fill(config, COLUMNS, choose(VARIANTS, variant))
    model.vocab_size, model.max_length = 50_257, 2048

    data.source = "jsonl:corpus/*.jsonl.gz"
    data.tokenizer = "gpt2:gpt2_bpe"
    data.validation_fraction = 0.0005
    data.sequence_length = 2048
    data.isolate_documents = False

    tokens = data.batch_size * data.sequence_length
    config.optimizer.adamw.b2 = 0.95
    schedule.warmup_steps, schedule.decay_steps = 375_000_000 // tokens, 260 * 10**9 // tokens
    config.train.steps, config.train.remat = 300 * 10**9 // tokens, "full"
    config.eval.every_steps, config.eval.max_batches = 1000, 20
    return config
