"""How a run goes: steps, evaluation, decoding, checkpoints, devices, logs."""

from __future__ import annotations

from lm.config.key import Key

RUNNING: dict[str, Key] = {
    # --- training
    "train.steps": Key(1000, "Optimizer updates.", low=1),
    "train.microbatches": Key(1, "Parts of a batch whose gradients are summed.", low=1),
    "train.remat": Key(
        "none",
        "What the backward pass recomputes: nothing, all but matmul results, or everything; "
        "offload_dots: matmul results wait in the host's memory, offload: the input of each "
        "layer does, and everything else is recomputed.",
        choices=("none", "dots", "full", "offload_dots", "offload"),
        free=True,
    ),
    "train.scan_unroll": Key(
        1, "Layers inlined in one turn of the scan over layers; 0: all.", low=0, free=True
    ),
    "train.loss_chunk": Key(
        0, "Columns of a batch whose logits exist at once; 0: all.", low=0, free=True
    ),
    "train.steps_per_dispatch": Key(
        1, "Steps run by one call of the compiled program.", low=1, high=1000
    ),
    "train.nonfinite": Key(
        "halt",
        "Loss or gradient not finite: stop with the last good state, or skip the update.",
        choices=("halt", "skip"),
        free=True,
    ),
    "train.stop_at": Key(
        0,
        "Stop with a saved state and exit code 75 after this step, long before train.steps "
        "perhaps; 0: never.",
        low=0,
        free=True,
    ),
    "train.stall_seconds": Key(
        1800.0,
        "A run in which nothing happens for so long ends with an error; 0: never.",
        low=0.0,
        free=True,
    ),
    # --- evaluation
    "eval.every_steps": Key(0, "Validate every so many steps; 0: only at the end.", low=0),
    "eval.batch_size": Key(0, "Sequences of a validation batch; 0: data.batch_size.", low=0),
    "eval.max_batches": Key(0, "Validation batches during training; 0: the whole split.", low=0),
    "eval.final_batches": Key(0, "The same after the last step.", low=0),
    "eval.metrics": Key(
        "", "Metrics of `lm eval --task`, comma-separated; empty: the usual of the objective."
    ),
    "eval.best": Key(
        "", "Keep the best checkpoint by this validation figure too, such as accuracy or -loss."
    ),
    # --- decoding
    "decode.beam_size": Key(1, "Hypotheses of a search; 1: greedy.", low=1, high=1000, free=True),
    "decode.length_penalty": Key(
        0.6, "Scores are divided by ((5 + length) / 6)^this.", low=0.0, free=True
    ),
    "decode.min_length": Key(0, "Tokens before the end may come.", low=0, free=True),
    "decode.max_length": Key(0, "Most tokens; 0: data.target_length.", low=0, free=True),
    "decode.repetition_penalty": Key(1.0, "Above 1 repeats get less likely.", low=0.01, free=True),
    "decode.banned": Key("", "Words that are never written, comma-separated.", free=True),
    "decode.batch_size": Key(32, "Inputs decoded together.", low=1, free=True),
    # --- checkpoints
    "checkpoint.every_steps": Key(1000, "Save every so many steps; 0: never.", low=0, free=True),
    "checkpoint.every_seconds": Key(
        600.0, "Save when so many seconds have passed since the last; 0: never.", low=0.0, free=True
    ),
    "checkpoint.keep_last": Key(3, "Newest checkpoints kept.", low=1, free=True),
    "checkpoint.keep_every_steps": Key(
        0, "Keep every checkpoint at a multiple of this for good; 0: none.", low=0, free=True
    ),
    # --- parallelism
    "parallel.preset": Key(
        "custom",
        "Mesh by name: data or fsdp put all devices on that axis; custom: parallel.mesh.",
        choices=("custom", "data", "fsdp"),
        free=True,
    ),
    "parallel.mesh.slice": Key(
        1, "Slices joined by the slow network (data parallel).", low=-1, free=True
    ),
    "parallel.mesh.stage": Key(
        1, "Pipeline stages: parts of the stack of layers.", low=-1, free=True
    ),
    "parallel.mesh.data": Key(-1, "Data parallel; -1: the rest of the devices.", low=-1, free=True),
    "parallel.mesh.fsdp": Key(1, "Data parallel with sharded parameters.", low=-1, free=True),
    "parallel.mesh.expert": Key(
        1, "Data parallel with each expert on one of so many devices.", low=-1, free=True
    ),
    "parallel.mesh.context": Key(1, "Parts of every sequence.", low=-1, free=True),
    "parallel.mesh.tensor": Key(1, "Heads, feed-forward width, vocabulary.", low=-1, free=True),
    "parallel.context_attention": Key(
        "auto",
        "Attention over the parts of a sequence: keys go round in a ring, or are gathered on "
        "every device; auto: ring where the attention kernel can.",
        choices=("auto", "ring", "gather"),
        free=True,
    ),
    "parallel.sequence": Key(
        False,
        "Between the sublayers, activations are cut along the sequence over tensor too.",
        free=True,
    ),
    "parallel.pipeline.microbatches": Key(
        0,
        "Parts of a batch that follow one another through the stages; 0: as many as stages.",
        low=0,
        free=True,
    ),
    "parallel.pipeline.repeats": Key(
        1, "Times that each passes through all stages (circular schedule).", low=1, free=True
    ),
    # --- logging
    "log.every_steps": Key(1, "Write every so many steps to metrics.jsonl.", low=1, free=True),
    "log.tensorboard": Key(True, "Write TensorBoard event files too.", free=True),
}
