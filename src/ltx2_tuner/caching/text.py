"""Text caching: every caption of every dataset through Gemma, one file per source, then the prompt side files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ltx2_tuner.caching import run
from ltx2_tuner.caching.captions import note_captions, note_truncated
from ltx2_tuner.caching.run import Journal, Tally
from ltx2_tuner.caching.text_side_files import SideFile
from ltx2_tuner.checkpoint import Checkpoint, component_id, load_text_connectors
from ltx2_tuner.data.cache_files import NonFiniteError, write_text
from ltx2_tuner.data.cache_names import TEXT_SUFFIX, text_name
from ltx2_tuner.data.config import Dataset, DatasetConfig
from ltx2_tuner.data.metadata import stale_reason
from ltx2_tuner.data.sources import SourceList, list_sources, warn_shared_sources
from ltx2_tuner.models.text import TextConfig
from ltx2_tuner.text_encoding import GemmaOptions, PromptEmbedding, TextEncoder, load_text_encoder
from ltx2_tuner.text_encoding.encoder import read_gemma_id
from ltx2_tuner.text_encoding.tokenizer import MAX_TOKENS

logger = logging.getLogger(__name__)

SCRIPT = "text"


@dataclass(frozen=True)
class TextCachingOptions:
    """What is written and what is kept.

    dtype: of Gemma, of the connectors and of the stored tensors. batch_size: prompts a pass, at most; None leaves it to
    the datasets. legacy_keys: also the joined copies that other tools read. strict: any failure counts.
    """

    dtype: torch.dtype = torch.float32
    batch_size: int | None = None
    skip_existing: bool = False
    keep_cache: bool = False
    legacy_keys: bool = False
    ignore_disk_space: bool = False
    strict: bool = False


@dataclass(frozen=True)
class _Member:
    """A file to have: the caption it is made of and the metadata it will carry."""

    path: Path
    caption: str
    metadata: dict[str, str]
    name: str  # of the source, for reports


@dataclass(frozen=True)
class _Group:
    """A dataset with its sources and counts; `batches` holds distinct captions, laid out over all members."""

    dataset: Dataset
    sources: SourceList
    members: tuple[_Member, ...]
    batches: tuple[tuple[str, ...], ...]
    tally: Tally


class TextCaching:
    """One run over a dataset file.

    Args:
        config: datasets; its mode decides which embeddings are written.
        checkpoint: has the text projection and connectors; checked before Gemma is touched.
        side_files: prompt files to write besides.

    Raises:
        UserError: no sources, connector weights missing, Gemma unreadable.
    """

    def __init__(
        self,
        config: DatasetConfig,
        options: TextCachingOptions,
        checkpoint: Checkpoint,
        gemma: GemmaOptions,
        device: torch.device,
        side_files: Sequence[SideFile] = (),
    ) -> None:
        self.config = config
        self.options = options
        self.checkpoint = checkpoint
        self.gemma = gemma
        self.device = device
        self.side_files = tuple(side_files)
        text = load_text_connectors(checkpoint, torch.device("meta"), options.dtype, config.mode).config
        self.widths = context_widths(text, config.mode)
        self.identity = {
            "ltx_mode": config.mode,
            "ltx_version": checkpoint.version,
            "component_id": component_id(checkpoint, "text"),
            "gemma_id": read_gemma_id(gemma),
        }
        self.groups = [self._group(dataset, found) for dataset, found in scan(config)]

    def run(self) -> int:
        """Encode what is missing, write the side files, remove orphans, print the summary.

        Returns:
            The exit status of the script.
        """
        for group in self.groups:
            run.remove_leftovers(group.dataset.cache_directory)
        journal = Journal(self.config.datasets[0].cache_directory, SCRIPT, self._settings())
        try:
            self._encode(journal)
        finally:
            journal.close()
        tallies = [group.tally for group in self.groups]
        for group in self.groups:
            self._remove_orphans(group)
        run.write_reports(tallies, SCRIPT)
        journal.finish()
        for line in run.summary_lines(tallies):
            print(line)
        return run.exit_status(tallies, strict=self.options.strict)

    def _group(self, dataset: Dataset, found: SourceList) -> _Group:
        note_captions(label(dataset), [(source.path.name, source.caption) for source in found.sources])
        members = tuple(
            _Member(
                dataset.cache_directory / text_name(source.stem),
                source.caption,
                {"caption1": source.caption, **self.identity},
                source.path.name,
            )
            for source in found.sources
        )
        size = min(dataset.batch_size, self.options.batch_size or dataset.batch_size)
        captions = list(dict.fromkeys(member.caption for member in members))
        batches = tuple(tuple(batch) for batch in run.batches(captions, size))
        return _Group(dataset, found, members, batches, source_tally(dataset, found))

    def _settings(self) -> dict[str, object]:
        """What decides the bytes of the files, for the journal."""
        options = dataclasses.asdict(self.options)
        kept = {name: str(options[name]) for name in ("dtype", "batch_size", "legacy_keys", "skip_existing")}
        members = [[str(member.path), member.caption] for group in self.groups for member in group.members]
        return {**kept, **self.identity, "members": members, "device": self.device.type}

    def _encode(self, journal: Journal) -> None:
        missing = {member.path for group in self.groups for member in group.members if not self._keep(member, journal)}
        self._check_disk(missing)
        for group in self.groups:
            self._count_kept(group, missing, journal)
        if not missing and not self.side_files:
            logger.info("every text cache is up to date; Gemma is not loaded")
            return
        encoder = load_text_encoder(self.gemma, self.checkpoint, self.config.mode, self.device, self.options.dtype)
        for group in self.groups:
            named = [(member.name, member.caption) for member in group.members if member.path in missing]
            note_truncated(group.tally.label, named, encoder.tokenizer.count, encoder.length)
        try:
            for member, group, embedding in self._embeddings(encoder, missing):
                self._write(member, group, embedding, journal)
            for side_file in self.side_files:
                made_with = {name: self.identity[name] for name in ("component_id", "gemma_id")}
                side_file.write(encoder, self.config.mode, made_with)
        finally:
            encoder.close()
        if self.device.type == "cuda":
            logger.info("peak GPU memory %s", run.size_text(torch.cuda.max_memory_allocated(self.device)))

    def _keep(self, member: _Member, journal: Journal) -> bool:
        """Whether a file may stay: finished by the interrupted run, or existing with --skip_existing; never stale."""
        finished = str(member.path) in journal.done
        if not (finished or self.options.skip_existing) or not member.path.is_file():
            return False
        metadata = run.read_metadata(member.path)
        reason = "its header is unreadable" if metadata is None else stale_reason(metadata, member.metadata)
        if reason is None and metadata.get("architecture") != run.ARCHITECTURE:
            reason = "it was made for another architecture"
        if reason:
            logger.info("%s is made again: %s", member.path.name, reason)
        return reason is None

    def _count_kept(self, group: _Group, missing: set[Path], journal: Journal) -> None:
        """Files of the interrupted run count as encoded: together both runs are one."""
        for member in group.members:
            if member.path not in missing:
                group.tally.add("encoded" if str(member.path) in journal.done else "skipped (existing)")

    def _check_disk(self, missing: set[Path]) -> None:
        size = embedding_bytes(self.widths, self.options.dtype, self.options.legacy_keys)
        expected = dict.fromkeys(missing, size)
        for side_file in self.side_files:
            expected[side_file.path] = side_file.contexts * embedding_bytes(self.widths, self.options.dtype)
        run.check_disk_space(expected, self.options.ignore_disk_space)

    def _embeddings(
        self, encoder: TextEncoder, missing: set[Path]
    ) -> Iterator[tuple[_Member, _Group, PromptEmbedding]]:
        """Missing members with their embeddings. A batch that any of them needs is encoded whole, as in a first run."""
        with tqdm(total=len(missing), desc="text", unit="file") as bar:
            for group in self.groups:
                waiting: dict[str, list[_Member]] = {}
                for member in group.members:
                    if member.path in missing:
                        waiting.setdefault(member.caption, []).append(member)
                for batch in group.batches:
                    if not any(caption in waiting for caption in batch):
                        continue
                    for caption, embedding in zip(batch, encoder.encode(batch, len(batch))):
                        for member in waiting.get(caption, ()):
                            yield member, group, embedding
                            bar.update()

    def _write(self, member: _Member, group: _Group, embedding: PromptEmbedding, journal: Journal) -> None:
        try:
            write_text(
                member.path,
                embedding.video,
                embedding.audio,
                embedding.mask,
                member.metadata,
                legacy_keys=self.options.legacy_keys,
            )
        except NonFiniteError as error:
            group.tally.fail(member.name, str(error))
            return
        journal.add(str(member.path))
        group.tally.add("encoded")

    def _remove_orphans(self, group: _Group) -> None:
        members = [member.path for member in group.members]
        run.remove_orphans(
            run.find_orphans(
                group.dataset.cache_directory, TEXT_SUFFIX, members, owned_names(group.sources).__contains__
            ),
            self.options.keep_cache,
        )


def scan(config: DatasetConfig) -> list[tuple[Dataset, SourceList]]:
    """The sources of every dataset, training first."""
    found = [(dataset, list_sources(dataset)) for dataset in config.all]
    warn_shared_sources(found)
    return found


def source_tally(dataset: Dataset, found: SourceList) -> Tally:
    """Counts of a dataset before anything is encoded."""
    tally = Tally(label(dataset), dataset.cache_directory, found.count, len(found.sources))
    for path in found.no_caption:
        tally.add("no caption", path.name)
    for name in found.empty_caption:
        tally.add("empty caption", name)
    for failure in found.failures:
        tally.fail(failure.name, failure.reason)
    return tally


def label(dataset: Dataset) -> str:
    """`Dataset 0` or `Validation 0`."""
    return f"{'Validation' if dataset.validation else 'Dataset'} {dataset.index}"


def owned_names(found: SourceList) -> set[str]:
    """Text files of sources that are in the dataset but cannot be used this time; they are no orphans."""
    paths = [*found.no_caption, *(Path(failure.name) for failure in found.failures)]
    return {text_name(name) for path in paths for name in (path.stem, path.name) if name}


def context_widths(config: TextConfig, mode: str) -> tuple[int, int]:
    """Widths of the video and audio context; the audio one is 0 in mode video."""
    return config.video.width, 0 if mode == "video" else config.audio.width


def embedding_bytes(widths: tuple[int, int], dtype: torch.dtype, legacy_keys: bool = False) -> int:
    """Bytes of one text file."""
    return MAX_TOKENS * sum(widths) * dtype.itemsize * (2 if legacy_keys else 1)


def dry_run(config: DatasetConfig, options: TextCachingOptions, text: TextConfig) -> None:
    """Print what would be cached and how large it is; no model is loaded.

    Args:
        text: sizes of the text side.
    """
    size = embedding_bytes(context_widths(text, config.mode), options.dtype, options.legacy_keys)
    tallies, expected = [], {}
    for dataset, found in scan(config):
        tallies.append(source_tally(dataset, found))
        expected |= {dataset.cache_directory / text_name(source.stem): size for source in found.sources}
    for line in run.summary_lines(tallies):
        print(line)
    print(
        f"expected size of the text caches: {run.size_text(sum(expected.values()))} ({run.size_text(size)} a caption)"
    )
    run.check_disk_space(expected, ignore=True)
