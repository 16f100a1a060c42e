"""From CSV manifests to batches of waveforms and tokens."""

import csv
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import sentencepiece as spm
import torch
import torch.nn.functional as F
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler, ReproducibleRandomSampler
from speechbrain.utils.data_pipeline import DynamicItem
from speechbrain.utils.data_utils import batch_pad_right
from torch.utils.data import BatchSampler, SequentialSampler

from common.errors import UserError
from corpora.audio import read_audio
from corpora.manifest import DATA_ROOT
from decoding.ctc_alignment import min_ctc_frames
from text.tokenizer import BOS_ID, EOS_ID, UNK_ID, tokens_of
from training.data.augmentation import SpeedPerturbation
from training.data.epoch_batches import EpochBatches
from training.data.preparation import manifest_rows
from training.launch.interrupts import UndisturbedWorker
from training.seeding import derive_seed
from training.shapes import rounded_up
from training.splicing.splice import Splicing

_ENCODED_AT_ONCE = 10_000


class ReadSpeech:
    """Read a mono waveform of the expected rate, and what is said in it.

    With ``splicing`` it may become another utterance, with ``perturbation`` another speed. Callable
    objects rather than closures, so that loader workers can be spawned (macOS).
    """

    def __init__(
        self,
        sample_rate: int,
        perturbation: SpeedPerturbation | None = None,
        splicing: Splicing | None = None,
        resample: bool = False,
    ):
        self.sample_rate = sample_rate
        self.resample = resample
        self.perturbation = perturbation
        self.splicing = splicing

    def __call__(self, wav: str, utterance_id: str, words: str) -> tuple[torch.Tensor, str]:
        wav_S = torch.from_numpy(
            read_audio(wav, utterance_id, self.sample_rate, resample=self.resample)
        )
        if self.splicing is not None:
            wav_S, words = self.splicing(wav_S, words, utterance_id, self.sample_rate)
        if self.perturbation is not None:
            wav_S = self.perturbation(wav_S, utterance_id)
        return wav_S, words


class Tokenize:
    """A transcript as CTC targets, decoder input (bos first), decoder targets (eos last).

    Beside them their number, and the fewest frames that a CTC path through them needs.
    """

    def __init__(self, tokenizer: spm.SentencePieceProcessor):
        self.tokenizer = tokenizer

    def __call__(self, words: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        tokens = tokens_of(self.tokenizer, words)
        tokens_U = torch.tensor(tokens, dtype=torch.long)
        return (
            tokens_U,
            torch.tensor([BOS_ID, *tokens], dtype=torch.long),
            torch.tensor([*tokens, EOS_ID], dtype=torch.long),
            len(tokens),
            int(min_ctc_frames(tokens_U[None], torch.tensor([len(tokens)]))),
        )


def read_rows(manifest: str | Path, data_root: str | Path) -> dict[str, dict]:
    """Rows of a manifest by utterance id, ``$data_root`` replaced, ``duration`` in seconds.

    Raises:
        UserError: no such file, not a manifest, no rows, or an id that is there twice.
    """
    rows = manifest_rows(Path(manifest))
    return {
        row.ID: {
            "wav": row.wav.replace(DATA_ROOT, str(data_root), 1),
            "duration": row.duration,
            "spk_id": row.spk_id,
            "wrd": row.wrd,
        }
        for row in rows
    }


def unalignable(
    rows: Mapping[str, dict],
    tokenizer: spm.SentencePieceProcessor,
    sample_rate: int,
    num_frames: Callable[[int], int],
) -> dict[str, str]:
    """Utterances that CTC cannot learn from, with the reason, by id.

    Args:
        num_frames: encoder frames (25 a second in the published recipes) of so many samples.
    """
    reasons = {}
    size = tokenizer.get_piece_size()
    silent = {token for token in range(size) if not tokenizer.decode([token]).strip()}
    # Many at once, and in Python's own numbers: there may be hundreds of thousands.
    of_each = _encoded(tokenizer, (row["wrd"] for row in rows.values()))
    for (utterance_id, row), encoded in zip(rows.items(), of_each, strict=True):
        tokens = tokens_of(tokenizer, row["wrd"]) if UNK_ID in encoded else encoded
        if silent.issuperset(tokens):
            empty = not row["wrd"].strip()
            reasons[utterance_id] = "empty transcript" if empty else "no known character"
            continue
        frames = num_frames(round(row["duration"] * sample_rate))
        # See min_ctc_frames.
        needed = len(tokens) + sum(map(operator.eq, tokens, tokens[1:]))
        if frames < needed:
            reasons[utterance_id] = f"{frames} frames for {needed} (tokens and repetitions)"
    return reasons


def _encoded(tokenizer: spm.SentencePieceProcessor, texts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of each text; those of all of a large corpus do not fit beside one another."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, _ENCODED_AT_ONCE)):
        yield from tokenizer.encode(some)


def with_characters(rows: Mapping[str, dict], characters: Collection[str]) -> dict[str, str]:
    """Utterances whose transcript has any of these characters, with the reason, by id."""
    reasons = {}
    for utterance_id, row in rows.items():
        if found := sorted(set(row["wrd"]) & set(characters)):
            reasons[utterance_id] = f"unknown characters: {' '.join(found)}"
    return reasons


class SkippedUtterances:
    """``skipped.csv`` (id, reason): utterances without a CTC loss, each written once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.ids: set[str] = set()

    def add(self, reasons: Mapping[str, str]) -> None:
        """Append those that are not listed yet; the file exists afterwards."""
        if reasons.keys() <= self.ids and self.path.is_file():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+", encoding="utf-8", newline="") as stream:
            # Another process of the run may have added to it.
            stream.seek(0)
            self.ids.update(row["id"] for row in csv.DictReader(stream))
            writer = csv.writer(stream)
            if stream.tell() == 0:
                writer.writerow(["id", "reason"])
            writer.writerows(
                (key, reason) for key, reason in reasons.items() if key not in self.ids
            )
        self.ids.update(reasons)


def make_dataset(
    rows: Mapping[str, dict],
    tokenizer: spm.SentencePieceProcessor,
    sample_rate: int,
    perturbation: SpeedPerturbation | None = None,
    splicing: Splicing | None = None,
    resample: bool = False,
) -> DynamicItemDataset:
    """Dataset of the items that a batch has.

    ``wrd`` is the manifest's; ``said``, the waveform and the tokens may be another utterance's.
    """
    dataset = DynamicItemDataset(dict(rows))
    dataset.add_dynamic_item(
        DynamicItem(
            ["wav", "id", "wrd"],
            ReadSpeech(sample_rate, perturbation, splicing, resample),
            ["sig", "said"],
        )
    )
    dataset.add_dynamic_item(DynamicItem(["sig"], len, ["num_samples"]))
    dataset.add_dynamic_item(
        DynamicItem(
            ["said"],
            Tokenize(tokenizer),
            ["tokens", "tokens_bos", "tokens_eos", "num_tokens", "min_frames"],
        )
    )
    dataset.set_output_keys(
        [
            *("id", "duration", "wrd", "said", "sig", "num_samples"),
            *("tokens", "tokens_bos", "tokens_eos", "num_tokens", "min_frames"),
        ]
    )
    return dataset


def _duration(row: Mapping) -> float:
    return row["duration"]


def pad_right(tensors: list[torch.Tensor], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """SpeechBrain's padding, which divides by zero where every item is empty.

    Waveforms get some two per cent more. Of lengths that are hardly ever the same the C library
    keeps thousands of free blocks, and searches them for every tensor: a fifth of a step on a CPU.
    """
    if not any(len(tensor) for tensor in tensors):
        return tensors[0].new_zeros(len(tensors), 1), torch.zeros(len(tensors))
    padded, lengths = batch_pad_right(tensors, **options)
    if not padded.is_floating_point():
        return padded, lengths
    longest = padded.shape[1]
    rounded = padded_samples(longest)
    return F.pad(padded, (0, rounded - longest)), lengths * (longest / rounded)


def padded_samples(longest: int) -> int:
    """Samples of a batch whose longest waveform has so many."""
    return rounded_up(longest, per_octave=16)


ON_THE_DEVICE = ("sig", "tokens", "tokens_bos", "tokens_eos")
"""What of a batch is computed with; counts stay with the host, which need not wait to see them."""

collate = partial(PaddedBatch, padding_func=pad_right, device_prep_keys=ON_THE_DEVICE)


@dataclass
class Loaders:
    """Datasets and how to iterate them, in the form that Brain.fit and Brain.evaluate take."""

    train: DynamicItemDataset | None
    valid: DynamicItemDataset | None
    tests: dict[str, DynamicItemDataset]
    train_sampler: EpochBatches | None = None
    train_kwargs: dict = field(default_factory=dict)
    valid_kwargs: dict = field(default_factory=dict)
    perturbation: SpeedPerturbation | None = None
    splicing: Splicing | None = None
    unperturbed: DynamicItemDataset | None = None
    tokenizer: spm.SentencePieceProcessor | None = None


def training_batches(dataset: DynamicItemDataset, hparams: Mapping) -> tuple[EpochBatches, dict]:
    """(sampler that needs set_epoch, loader arguments) for the training set.

    ``sorting`` is random, ascending or descending (by duration).
    """
    sorting = hparams["sorting"]
    # The samplers add the number of the epoch: neighbouring seeds would have the same batches.
    seed = derive_seed(hparams["seed"], "batches") % 2**32
    batches: DynamicBatchSampler | BatchSampler
    if hparams["dynamic_batching"]:
        batches = DynamicBatchSampler(
            dataset,
            max_batch_length=hparams["max_batch_length_train"],
            num_buckets=hparams["num_bucket"],
            length_func=_duration,
            shuffle=sorting == "random",
            batch_ordering=sorting,
            max_batch_ex=hparams["max_batch_ex"],
            seed=seed,
        )
    else:
        order = (
            ReproducibleRandomSampler(dataset, seed=seed)
            if sorting == "random"
            else SequentialSampler(dataset)
        )
        batches = BatchSampler(order, hparams["batch_size"], drop_last=False)
    sampler = EpochBatches(batches, dataset.data_ids)
    return sampler, {
        "batch_sampler": sampler,
        "num_workers": hparams["num_workers"],
        "collate_fn": collate,
        "worker_init_fn": UndisturbedWorker(),
    }


def evaluation_batches(dataset: DynamicItemDataset, hparams: Mapping) -> dict:
    """Loader arguments for validation and test: longest first, so that little is padded."""
    sampler = DynamicBatchSampler(
        dataset,
        max_batch_length=hparams["max_batch_length_val"],
        num_buckets=hparams["num_bucket"],
        length_func=_duration,
        shuffle=False,
        batch_ordering="descending",
        max_batch_ex=hparams["max_batch_ex"],
    )
    return {
        "batch_sampler": sampler,
        "num_workers": hparams["num_workers"],
        "collate_fn": collate,
        "worker_init_fn": UndisturbedWorker(),
    }


def sorted_by_duration(rows: Mapping[str, dict], sorting: str) -> dict[str, dict]:
    """Rows in the order in which a loader without shuffling should see them."""
    if sorting == "random":
        return dict(rows)
    ordered = sorted(
        rows.items(), key=lambda item: item[1]["duration"], reverse=sorting == "descending"
    )
    return dict(ordered)


def leave_out(rows: Mapping[str, dict], ids: Sequence[str] | set[str]) -> dict[str, dict]:
    """Rows without the given ids.

    Raises:
        UserError: nothing would be left.
    """
    kept = {key: row for key, row in rows.items() if key not in ids}
    if not kept:
        raise UserError(
            "No training utterance can be used: every one has an empty transcript or fewer frames "
            "than tokens (see skipped.csv). Is token_type or the sample rate wrong?"
        )
    return kept
