"""Pass rates of programs: run completions against their tests, in parallel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm.errors import UserError
from lm.evaluation.code.pass_at_k import pass_at_k
from lm.evaluation.code.problems import Completion
from lm.evaluation.code.sandbox import (
    Limits,
    NotConfinedError,
    Verdict,
    available_layers,
    run_tests,
)

PUBLISHED_K = (1, 10, 100)


def run_samples(
    samples: Sequence[Completion],
    limits: Limits,
    workers: int,
    progress: Callable[[int], Any] = lambda n: None,
) -> list[dict[str, Any]]:
    """Run samples against their tests.

    Args:
        samples: the samples.
        limits: limits of each process.
        workers: number of samples run concurrently.
        progress: called with the number of finished samples.

    Returns:
        A record for each sample, in order: "task_id", "completion", "passed", "reason" and
        "seconds".

    Raises:
        UserError: programs cannot be confined here; none is run.
    """
    available_layers()

    def run(sample: Completion) -> dict[str, Any]:
        problem, completion = sample.problem, sample.text
        record: dict[str, Any] = {"task_id": problem.task_id, "completion": completion}
        if sample.reply is not None:
            record["reply"] = sample.reply
        if completion is None:
            found = {
                "passed": False,
                "reason": "no room for a completion: the prompt fills the context",
                "seconds": 0.0,
            }
        else:
            try:
                verdict = run_tests(problem.program(completion), problem.tests, limits)
            except NotConfinedError as error:
                verdict = Verdict(False, f"not run: {error}", 0.0)
            found = {**vars(verdict), "seconds": round(verdict.seconds, 3)}
        progress(1)
        return record | found

    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(run, samples))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def chosen_k(samples: Sequence[Completion], wanted: Sequence[int]) -> list[int]:
    """Return the values of k for which there are enough samples.

    Args:
        samples: the samples.
        wanted: required values; (): the published ones.

    Raises:
        UserError: a problem has fewer samples than a required k.
    """
    fewest = min(Counter(sample.problem.task_id for sample in samples).values())
    if wanted and max(wanted) > fewest:
        raise UserError(
            f"--k {max(wanted)} needs at least that many samples per problem, not {fewest}"
        )
    return list(wanted) or [k for k in PUBLISHED_K if k <= fewest]


def code_figures(records: Sequence[dict[str, Any]], values: Sequence[int]) -> dict[str, float]:
    """Return the mean of pass@k over the problems, in percent, for each k.

    Args:
        records: records of `run_samples`.
        values: values of k.
    """
    made = Counter(record["task_id"] for record in records)
    passed = Counter(record["task_id"] for record in records if record["passed"])
    return {
        f"pass@{k}": 100
        * sum(pass_at_k(n, passed[name], k) for name, n in made.items())
        / len(made)
        for k in values
    }
