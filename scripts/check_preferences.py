"""Compare the preference objectives with TRL's trainers on the same tiny weights and batch.

    pip install trl==1.16.0   # in addition to the requirements of the tests
    python scripts/check_preferences.py [--write tests/objectives/trl_preferences.json]

A random Llama and a random GPT-2 of `transformers`, each with another one as the reference, are
given a batch of seven pairs (for KTO, records), some of them truncated. For every objective the
script prints TRL's loss and the largest relative difference of the loss, of the metrics that both
log, and of the gradient of every parameter. On TRL's side these are `DPOTrainer`, `KTOTrainer`,
`RewardTrainer` and the loss functions of `ORPOTrainer` and `CPOTrainer` (SimPO), in float32 on a
CPU. --write saves log-probabilities and losses for the tests. The exit code is 1 if a difference is
above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from lm.config import set_value
from lm.experiment import build
from lm.interop.import_export import run_config
from lm.interop.model_folder import open_model_folder
from lm.models.variables import flat
from lm.parallel.mesh import axis_sizes, make_mesh

LENGTH, VOCABULARY = 16, 64
TOLERANCE = 1e-4
MODELS = {
    "llama": transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=False,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=64,
        vocab_size=VOCABULARY,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
    ),
}
# Objective: our options, and TRL's.
PAIRED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"beta": 0.3}, {"beta": 0.3, "loss_type": ["sigmoid"]}),
    "dpo mean": (
        {"beta": 0.3, "loss_normalization": "mean"},
        {"beta": 0.3, "loss_type": ["sigmoid_norm"]},
    ),
    "ipo": ({"beta": 0.5}, {"beta": 0.5, "loss_type": ["ipo"]}),
}
KTO = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}


def main() -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", metavar="FILE")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    kept: dict[str, Any] = {}
    worst = 0.0
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(name, Path(folder))
            for objective, found in case.compare():
                kept[f"{name}: {objective}"] = found["kept"]
                differences = {k: found[k] for k in ("loss", "figures", "gradient")}
                worst = max(worst, *differences.values())
                shown = ", ".join(f"{k} {x:.1e}" for k, x in differences.items())
                print(f"{name}: {objective}: TRL's loss {found['kept']['loss']:.6f}; {shown}")
    print(f"largest relative difference: {worst:.1e}")
    if args.write:
        lines = (f"{json.dumps(case)}: {json.dumps(found)}" for case, found in kept.items())
        Path(args.write).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return int(worst > TOLERANCE)


class Case:
    """One architecture: weights, reference, and the batch for both sides."""

    def __init__(self, name: str, folder: Path):
        self.folder, self.config = folder, MODELS[name]
        rng = np.random.default_rng(5)
        sizes = [(4, 5, 3), (2, 9, 8), (6, 1, 2), (3, 4, 4), (10, 12, 9), (1, 2, 6), (5, 3, 7)]
        self.pairs = [
            {
                part: rng.integers(3, VOCABULARY, n).tolist()
                for part, n in zip(("prompt", "chosen", "rejected"), lengths, strict=True)
            }
            for lengths in sizes
        ]
        for pair in self.pairs:  # as TRL ends a completion
            pair["chosen"].append(2)
            pair["rejected"].append(2)
        words = {f"<{i}>": i for i in range(VOCABULARY)}
        tokenizer = Tokenizer(WordLevel(words, "<1>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<0>", unk_token="<1>", eos_token="<2>"
        )
        self.model, self.reference = self.make(0), self.make(1)

    def make(self, seed: int, kind: Any = transformers.AutoModelForCausalLM, **more: Any) -> Any:
        """Return a random model whose weights are large enough to distinguish tokens."""
        torch.manual_seed(seed)
        config = type(self.config)(**{**self.config.to_dict(), **more})
        model = kind.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
        return model

    def arguments(self, kind: Any, **options: Any) -> Any:
        """Return the arguments for a TRL trainer."""
        return kind(
            output_dir=str(self.folder / "trl"),
            per_device_train_batch_size=len(self.pairs),
            max_length=LENGTH + 1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **options,
        )

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids; a space before it keeps prompt and completion apart."""
        return "".join(f" <{i}>" for i in ids)

    def rows(self) -> list[dict[str, str]]:
        """Return the pairs as texts."""
        return [{part: self.text(ids) for part, ids in pair.items()} for pair in self.pairs]

    def compare(self) -> Any:
        """Yield objectives and their differences."""
        for name, (options, theirs) in PAIRED.items():
            trainer = DPOTrainer(
                model=self.make(0),
                ref_model=self.reference,
                args=self.arguments(DPOConfig, **theirs),
                train_dataset=Dataset.from_list(self.rows()),
                processing_class=self.tokenizer,
            )
            yield name, self.against(trainer, name.split()[0], options, self.examples())
        records = [
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if i % 3 else "rejected"],
                "label": bool(i % 3),
            }
            for i, row in enumerate(self.rows())
        ]
        trainer = KTOTrainer(
            model=self.make(0),
            ref_model=self.reference,
            args=self.arguments(KTOConfig, train_sampling_strategy="sequential", **KTO),
            train_dataset=Dataset.from_list(records),
            processing_class=self.tokenizer,
        )
        yield "kto", self.against(trainer, "kto", KTO, self.examples(unpaired=True))
        for name, options in (
            ("orpo", {"beta": 0.2}),
            ("simpo", {"beta": 2.0, "simpo_gamma": 1.0}),
        ):
            yield (
                name,
                self.against(FunctionOf(name, self, options), name, options, self.examples()),
            )
        yield "reward", self.rewards()

    def rewards(self) -> dict[str, Any]:
        """Compare the reward model, on pairs that are not too long for it."""
        rows = [
            {k: row["prompt"] + row[k] for k in ("chosen", "rejected")} | {"margin": i / 4}
            for i, row in enumerate(self.rows())
        ]
        trainer = RewardTrainer(
            model=self.make(0, transformers.AutoModelForSequenceClassification, num_labels=1),
            args=self.arguments(RewardConfig, center_rewards_coefficient=0.1),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )
        records = [example.record for example in self.examples()]
        for i, record in enumerate(records):
            record.raw["margin"] = i / 4
        fit = [r for r in records if sum(map(len, r.tokens.values())) < 2 * LENGTH]
        return self.against(trainer, "reward", {"reward_centering": 0.1}, fit, LENGTH + 1)

    def examples(self, unpaired: bool = False) -> list[Any]:
        """Return the pairs in the format of an objective."""
        records = []
        for i, pair in enumerate(self.pairs):
            tokens = {part: np.asarray(ids, np.int32) for part, ids in pair.items()}
            if unpaired:
                tokens["completion"] = tokens["chosen" if i % 3 else "rejected"]
            records.append(SimpleNamespace(tokens=tokens, raw={"label": bool(i % 3)}))
        return [
            SimpleNamespace(record=record, previous=records[i - 1], reference=None)
            for i, record in enumerate(records)
        ]

    def against(
        self,
        trainer: Any,
        objective: str,
        options: dict[str, Any],
        examples: list[Any],
        length: int = LENGTH,
    ) -> dict[str, Any]:
        """Return the relative differences between TRL's trainer and the objective here."""
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        logged = {k: v[-1] for k, v in trainer._metrics["train"].items() if k in FIGURES}
        weights, run = self.imported(trainer.model)
        gradient, _ = self.imported(with_gradients(trainer.model))
        reference, _ = self.imported(self.reference)
        for key, value in options.items():
            set_value(run, f"objective.{key}", value)
        run.objective.name, run.data.sequence_length = objective, length
        run.model.dtype, run.model.vocab_size = "float32", VOCABULARY
        experiment = build(run, jax.devices()[:1])
        made, rng = experiment.objective, np.random.default_rng(0)
        features = [made.features(example, rng) for example in examples]
        arrays = {k: np.stack([f[k] for f in features]) for k in features[0]}
        frozen = {"frozen": {"reference": reference}} if made.frozen else {}

        def ours(params: Any) -> Any:
            variables = {"params": params, **frozen}
            sums = nn.apply(made.loss, experiment.model)(variables, arrays)
            return sums.loss / sums.weight, sums

        grads, sums = jax.jit(jax.grad(ours, has_aux=True))(weights)
        found = float(sums.loss / sums.weight)
        kept = {"policy": log_probs(made, experiment.model, weights, arrays)}
        if made.frozen:
            kept["reference"] = log_probs(made, experiment.model, reference, arrays)
        if made.shapes["weights"][0]:
            kept["lengths"] = arrays["weights"].reshape(len(features), 2, -1).sum(-1).tolist()
        kept |= {k: arrays[k].tolist() for k in ("label", "margin") if k in arrays}
        figures = {k: float(v / sums.weight) for k, v in sums.metrics.items()}
        expected, got = flat(gradient), flat(grads)
        largest = max(float(np.abs(x).max()) for x in expected.values())
        return {
            "loss": abs(found - loss.item()) / abs(loss.item()),
            "figures": max(
                abs(figures[FIGURES[k]] - v) / max(abs(v), 1.0)
                for k, v in logged.items()
                if FIGURES[k] in figures
            ),
            "gradient": max(
                float(np.abs(got[path] - expected[path]).max()) / largest
                for path in got
                if path != "classifier/bias"  # TRL's head has none
            ),
            "kept": {
                "options": options,
                "loss": loss.item(),
                "figures": {FIGURES[k]: v for k, v in logged.items() if FIGURES[k] in figures},
                **kept,
                **getattr(trainer, "kept", {}),
            },
        }

    def imported(self, model: Any) -> tuple[Any, Any]:
        """Return the parameters of a transformers model, and the configuration of a run."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))  # its files stay mapped
        model.save_pretrained(folder)
        found = open_model_folder(folder)
        run = run_config(found)
        mesh = make_mesh(
            axis_sizes("custom", {**run.parallel.mesh, "data": 1}, 1), jax.devices()[:1]
        )
        return found.params(mesh), run


# TRL's figures and ours; KTO's margin, a difference of two means, is not among ours.
FIGURES = {
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
    "kl": "kl",
    "accuracy": "accuracy",
    "margin": "reward_margin",
}


def log_probs(objective: Any, model: Any, params: Any, arrays: Any) -> list[list[float]]:
    """Return the summed log-probabilities of both halves of each row, used by a test."""
    found = jax.jit(nn.apply(objective.predict, model))({"params": params}, arrays)
    return np.asarray(found).tolist()


def with_gradients(model: Any) -> Any:
    """Return the model with gradients instead of parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else 0 * parameter)
    return model


class FunctionOf:
    """Trainer around a loss function of TRL's ORPO or CPO trainer."""

    def __init__(self, name: str, case: Case, options: dict[str, Any]):
        self.name, self.case, self.model = name, case, case.make(0)
        device = SimpleNamespace(device=torch.device("cpu"))
        self.settings = SimpleNamespace(
            **options, accelerator=device, alpha=0.0, loss_type=name, label_smoothing=0.0
        )
        self._metrics: dict[str, Any] = {"train": {}}
        self.kept: dict[str, Any] = {}

    def get_train_dataloader(self) -> list[Any]:
        """Return the one batch: ids of prompt and completion, chosen ones first."""
        return [
            [(pair["prompt"], pair[k]) for k in ("chosen", "rejected") for pair in self.case.pairs]
        ]

    def compute_loss(self, model: Any, batch: Any) -> torch.Tensor:
        """Return the loss of the batch."""
        means, nll = [], []
        for prompt, completion in batch:
            ids = torch.tensor([prompt + completion])[:, : LENGTH + 1]
            logits = model(ids).logits
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            means.append(ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)[0])
            logps = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            nll.append(-logps)
        chosen, rejected = torch.stack(means).chunk(2)
        if self.name == "orpo":
            ratio, good, bad, *_ = ORPOTrainer.odds_ratio_loss(self.settings, chosen, rejected)
            # The trainer's mean over the tokens of prompts and chosen completions.
            mean = torch.cat(nll[: len(chosen)]).mean()
            loss, self.kept = mean - ratio.mean(), {"nll": mean.item()}
        else:
            losses, good, bad = CPOTrainer.cpo_loss(self.settings, chosen, rejected)
            loss = losses.mean()
        self._metrics["train"] = {
            "rewards/chosen": [good.mean().item()],
            "rewards/rejected": [bad.mean().item()],
            "rewards/margins": [(good - bad).mean().item()],
            "rewards/accuracies": [(good > bad).float().mean().item()],
        }
        return loss


if __name__ == "__main__":
    sys.exit(main())
