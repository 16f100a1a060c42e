"""Text for language models: streamed, tokenised in chunks, batched by length."""

from __future__ import annotations

import gzip
import random
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import sentencepiece as spm
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common.errors import UserError
from common.files import why_unreadable
from corpora.librispeech import TABLE_SUFFIXES
from corpora.manifest import read_manifest
from text.tokenizer import BOS_ID, EOS_ID, UNK_ID, tokens_of
from training.launch.interrupts import UndisturbedWorker
from training.seeding import derive_seed

PAD_ID = 0


def read_sentences(paths: Sequence[str | Path]) -> Iterator[str]:
    """The sentences of text files, one per line; blank lines are left out.

    Accented letters come as one character each, as transcripts do.

    Args:
        paths: plain text, gzip (.gz), or manifests (.csv), of which the transcripts are taken.

    Raises:
        UserError: a file that is missing, damaged, not text, or a table.
    """
    for path in map(Path, paths):
        if reason := why_unreadable(path):
            raise UserError(f"The text {path}: {reason}.")
        suffix = path.suffix.lower()
        if suffix in TABLE_SUFFIXES and suffix != ".csv":
            raise UserError(
                f"The text {path} is a table, of which no sentences are read: "
                "python -m corpora.prepare table makes manifests (.csv) of tables."
            )
        if suffix == ".csv":
            try:
                lines = iter([row.wrd for row in read_manifest(path)])
            except ValueError as error:
                raise UserError(str(error)) from None
        else:
            lines = _lines(path)
        for line in lines:
            if sentence := line.strip():
                yield unicodedata.normalize("NFC", sentence)


def _lines(path: Path) -> Iterator[str]:
    open_text = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as stream:
            yield from stream
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or not UTF-8 text: {error}.") from None


@dataclass
class TextBatch:
    """Sentences of about one length.

    Attributes:
        tokens_bos: (B, U) model input, filled up with 0; bos first, unless a sentence goes on.
        tokens_eos: (B, U) what each position predicts, filled up with 0; eos last, unless the
            sentence goes on.
        num_tokens_B: tokens that each row predicts, an eos included.
        num_cut: rows whose sentence goes on, those of the other processes' batches included.
    """

    tokens_bos: Tensor
    tokens_eos: Tensor
    num_tokens_B: Tensor
    num_cut: int = 0


class TextBatches(IterableDataset):
    """Batches of a text that is never held in memory.

    The text is read in chunks of ``chunk_sentences`` sentences. A chunk is sorted by length and cut
    into batches, whose order is drawn from (seed, epoch, chunk): an epoch is the same in every
    process and can be entered at any batch. Every rank reads all of it and keeps its share.

    Args:
        paths: see :func:`read_sentences`.
        tokenizer: its ids; characters that it does not know are left out.
        max_batch_tokens: bound on sentences times longest sentence of a batch.
        seed: of the run; ``None`` keeps everything in the order of the text, for validation.
        num_parts: an epoch reads every ``num_parts``-th chunk, the next epoch the next ones.
        max_sentence_tokens: of longer sentences the rest is left out in training; in validation it
            follows as sentences that go on, so that every token counts.
        chunk_sentences: sentences in memory at a time.
        skip_unknown: leave out whole sentences that hold a character unknown to the tokenizer.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: spm.SentencePieceProcessor,
        max_batch_tokens: int,
        seed: int | None = None,
        num_parts: int = 1,
        max_sentence_tokens: int = 500,
        chunk_sentences: int = 50_000,
        skip_unknown: bool = False,
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self.seed = seed
        self.num_parts = num_parts
        self.max_sentence_tokens = max_sentence_tokens
        self.chunk_sentences = chunk_sentences
        self.skip_unknown = skip_unknown
        self.set_position(epoch=1, first_batch=0)

    def set_position(self, epoch: int, first_batch: int, rank: int = 0, num_ranks: int = 1) -> None:
        """Where the next iteration starts, and which share of the batches it gives.

        Args:
            epoch: counted from 1.
            first_batch: how many batches of it this rank has already had.
            rank: which of ``num_ranks`` processes this is.
            num_ranks: processes that train together; each gets every ``num_ranks``-th batch.
        """
        self.epoch = epoch
        self.first_batch = first_batch
        self.rank = rank
        self.num_ranks = num_ranks

    def fit_parts(self, num_ranks: int) -> int:
        """Makes chunks smaller where there are fewer of them than parts.

        Returns:
            sentences of a chunk.

        Raises:
            UserError: there are fewer sentences than parts, or a part of a small text has fewer
                batches than there are processes.
        """
        wanted = self.num_parts * self.chunk_sentences
        found = sum(1 for _ in islice(read_sentences(self.paths), wanted))
        if found == wanted:
            return self.chunk_sentences
        if not found:
            raise UserError(f"{', '.join(map(str, self.paths))}: there is no sentence in it.")
        if found < self.num_parts:
            raise UserError(
                f"text_parts is {self.num_parts}, but {', '.join(map(str, self.paths))} has "
                f"{found} sentences, and an epoch reads one of the parts. Give fewer --text_parts."
            )
        if self.num_parts > 1:
            self.chunk_sentences = found // self.num_parts
        for part in range(1, self.num_parts + 1):
            self.set_position(part, 0, num_ranks=num_ranks)
            if len(list(islice(self._batches(), num_ranks))) < num_ranks:
                raise self._too_few()
        return self.chunk_sentences

    def is_empty(self) -> bool:
        """Whether the epoch has no batch."""
        return next(self._batches(), None) is None

    def order(self) -> list:
        """What the batches of an epoch follow from, as a JSON value."""
        return [
            [[path.name, path.stat().st_size] for path in self.paths],
            *(self.max_batch_tokens, self.seed, self.num_parts, self.max_sentence_tokens),
            *(self.chunk_sentences, self.skip_unknown, self.num_ranks),
        ]

    def __iter__(self) -> Iterator[TextBatch]:
        """The batches of this rank and, in a loader, of this worker.

        Raises:
            UserError: see :func:`read_sentences`; or there is nothing to train on.
        """
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = -1
        batches = self._batches()
        # A last group that is too small for all ranks is left out: they must step equally often.
        while len(group := list(islice(batches, self.num_ranks))) == self.num_ranks:
            own += 1
            # A loader asks its workers in turn, beginning with the first.
            if own >= self.first_batch and (own - self.first_batch) % workers == index:
                yield _collated(group, self.rank)
        if own < 0:
            raise self._too_few()

    def _too_few(self) -> UserError:
        return UserError(
            f"{', '.join(map(str, self.paths))}: epoch {self.epoch} has fewer batches than "
            f"processes ({self.num_ranks}). Give more text, lower max_batch_tokens or "
            "text_parts, or check that the tokenizer knows the characters of the text."
        )

    def _batches(self) -> Iterator[list[list[int]]]:
        sentences = read_sentences(self.paths)
        for number in count():
            chunk = list(islice(sentences, self.chunk_sentences))
            if not chunk:
                return
            if number % self.num_parts == (self.epoch - 1) % self.num_parts:
                yield from self._chunk_batches(number, chunk)

    def _chunk_batches(self, number: int, chunk: list[str]) -> list[list[list[int]]]:
        if self.skip_unknown:
            chunk = [s for s in chunk if UNK_ID not in self.tokenizer.encode(s)]
        encoded = (tokens_of(self.tokenizer, sentence) for sentence in chunk)
        sentences = [row for tokens in encoded if tokens for row in self._rows(tokens)]
        draw = None
        if self.seed is not None:
            draw = random.Random(derive_seed(self.seed, self.epoch, number, "text"))
            draw.shuffle(sentences)
        sentences.sort(key=len)
        batches: list[list[list[int]]] = []
        for row in sentences:
            # A row is one longer than what it predicts; sorted, so that the last is the longest.
            if batches and (len(batches[-1]) + 1) * (len(row) - 1) <= self.max_batch_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        if draw is not None:
            draw.shuffle(batches)
        return batches

    def _rows(self, tokens: list[int]) -> list[list[int]]:
        """A sentence in rows of which each token but the first is predicted."""
        marked = [BOS_ID, *tokens, EOS_ID]
        step = self.max_sentence_tokens + 1
        rows = [marked[start : start + step + 1] for start in range(0, len(marked) - 1, step)]
        return rows if self.seed is None else rows[:1]


class TextLoader(DataLoader):
    """A loader of whole batches that can tell the last one of an epoch.

    Args:
        text: the batches.
        num_workers: processes that make them; 0 makes them in this one.
    """

    dataset: TextBatches

    def __init__(self, text: TextBatches, num_workers: int = 0) -> None:
        super().__init__(
            text, batch_size=None, num_workers=num_workers, worker_init_fn=UndisturbedWorker()
        )
        self.gave_last = False

    def __iter__(self) -> Iterator[TextBatch]:
        """One batch ahead of what is asked for."""
        self.gave_last = False
        batches = super().__iter__()
        for batch in islice(batches, 1):
            for following in batches:
                yield batch
                batch = following
            self.gave_last = True
            yield batch


def _collated(group: list[list[list[int]]], rank: int) -> TextBatch:
    rows = group[rank]
    return TextBatch(
        _padded([row[:-1] for row in rows]),
        _padded([row[1:] for row in rows]),
        torch.tensor([len(row) - 1 for row in rows]),
        num_cut=sum(row[-1] != EOS_ID for batch in group for row in batch),
    )


def _padded(rows: list[list[int]]) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD_ID)
