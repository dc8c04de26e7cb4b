"""Stages of a configuration: pipelines of blocks, each with a number of tasks, run in order."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.word_tokenizers import WordTokenizer, load_tokenizer_assignments
from fsspec.compression import available_compressions, register_compression

from lm.errors import UserError, missing_package
from lm.tools.corpus.corpus_config import WORDS, Config, named_sources
from lm.tools.corpus.corpus_rules import RULES, RuleContext
from lm.tools.corpus.corpus_sources import SOURCE_NAME, SourceReader, StageReader
from lm.tools.corpus.rule_tally import Observed
from lm.tools.corpus.text_blocks import UnicodeWords

READ, WRITTEN = "read", "written"  # labels of the first and the last tally
MOST_TASKS = 1000  # default maximum, if the number of tasks follows from the number of files


class CorpusStage(NamedTuple):
    """Pipeline that starts when all tasks of the previous one have finished.

    Attributes:
        name: name for progress and errors.
        blocks: pipeline.
        tasks: number of tasks, independent of the number of workers.
    """

    name: str
    blocks: tuple[PipelineStep, ...]
    tasks: int


class ReproducibleGzip(gzip.GzipFile):
    """Gzip without name and time, so that equal documents give equal files."""

    def __init__(self, file: IO[bytes], mode: str = "wb", **options: Any):
        super().__init__("", mode, 6, file, mtime=0)


GZIP = "gzip-reproducible"
register_compression(GZIP, ReproducibleGzip, [], force=True)


def work_folder(output: str) -> str:
    """Return the folder of intermediate files."""
    return f"{output}/work"


def tally_folder(output: str, label: str) -> str:
    """Return the folder with a rule's tallies."""
    return f"{work_folder(output)}/tallies/{label}"


def plan_stages(config: Config, output: str) -> list[CorpusStage]:
    """Plan the stages of a configuration.

    Args:
        config: configuration.
        output: folder of the corpus.

    Raises:
        UserError: a source is missing, an option is invalid, or a package is not installed.
    """
    sources = tuple(named_sources(config, "sources").values())
    n_tasks = config["tasks"] or min(MOST_TASKS, max(source.n_parts() for source in sources))
    words, tests = _words(config["words"]), named_sources(config, "tests")
    card = config["card"]

    def observed(block: PipelineStep, label: str) -> Observed:
        columns = (SOURCE_NAME, *card["columns"]) if label == READ else card["columns"]
        return Observed(block, label, tally_folder(output, label), columns, card["examples"])

    before: list[CorpusStage] = []
    stages: list[CorpusStage] = []
    blocks: list[PipelineStep] = [observed(SourceReader(sources), READ)]
    labels = [READ]
    for label in config["rules"]:
        context = RuleContext(f"{work_folder(output)}/rules/{label}", words, tests)
        try:
            rule = RULES[label].build(context, **config[label])
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"rule {label}: {error}") from error
        before += [CorpusStage(f"{label}: {s.name}", (s.block,), s.tasks) for s in rule.before]
        if rule.collect is not None:
            documents = f"{work_folder(output)}/documents/{label}"
            blocks += [StageWriter(documents, "${rank}.jsonl.gz", GZIP), rule.collect]
            stages.append(CorpusStage(", ".join(labels), tuple(blocks), n_tasks))
            stages += [CorpusStage(f"{label}: {s.name}", (s.block,), s.tasks) for s in rule.between]
            blocks, labels = [StageReader(documents)], []
        blocks.append(observed(rule.block, label))
        labels.append(label)
    blocks.append(observed(_shard_writer(config["write"], output), WRITTEN))
    stages.append(CorpusStage(", ".join([*labels, "write"]), tuple(blocks), n_tasks))
    return before + stages


def _words(name: str) -> WordTokenizer:
    if name == WORDS:
        return UnicodeWords()
    factories = load_tokenizer_assignments()
    if name not in factories:
        raise UserError(f"config.words={name}: expected {WORDS}, or a language such as en")
    try:
        return factories[name]()
    except ImportError as error:
        raise UserError(f"config.words={name}: {error}") from error


def _shard_writer(options: Mapping[str, Any], output: str) -> PipelineStep:
    """Return the shard writer: one shard per task, or several if their size is limited."""
    columns, kind = options["columns"], options["format"]
    largest = options["megabytes"] * 10**6 or -1
    if kind == "parquet":
        try:
            import pyarrow as pa
        except ImportError as error:
            raise missing_package("config.write.format=parquet", "pyarrow", "corpus") from error
        names = dict.fromkeys(("id", "text", *columns))
        schema = pa.schema([(name, pa.string()) for name in names])
        return ParquetShards(
            columns,
            output,
            output_filename="${rank}.parquet",
            compression="zstd",
            max_file_size=largest,
            schema=schema,
        )
    compression = {"jsonl.gz": GZIP, "jsonl.zst": "zstd", "jsonl": None}[kind]
    if compression == "zstd" and compression not in available_compressions():
        raise missing_package("config.write.format=jsonl.zst", "backports.zstd", "corpus")
    return JsonShards(
        columns,
        output,
        output_filename="${rank}." + kind,
        compression=compression,
        max_file_size=largest,
    )


class StageWriter(JsonlWriter):
    """Writer of documents between two stages: one file per task, even if it is empty.

    A task that unpickles it registers this module's GZIP.
    """

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from super().run(data, rank, world_size)
        name = self.output_filename.substitute(rank=f"{rank:05d}")
        if not self.output_folder.isfile(name):
            self.output_folder.open(name, "wb", compression=GZIP).close()


class _Shards(DiskWriter):
    """Writer of id, text and selected metadata."""

    def __init__(self, columns: tuple[str, ...], output: str, **options: Any):
        self.columns = columns
        super().__init__(output, **options)

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        found = document.metadata
        kept = {name: found[name] for name in self.columns if name in found}
        return kept | {"id": document.id, "text": document.text}


class JsonShards(_Shards, JsonlWriter):
    """Shards of JSON lines."""


class ParquetShards(_Shards, ParquetWriter):
    """Shards of Parquet; all columns are text."""

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        row = super()._default_adapter(document)
        return {name: str(row[name]) if name in row else None for name in self.schema.names}
