"""From manifests to batches: what is read, what is left out, and in which order."""

import csv
import itertools

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.augment.time_domain import SpeedPerturb
from speechbrain.dataio.dataloader import make_dataloader

from common.errors import EXIT_USER_ERROR, UserError
from corpora.manifest import DATA_ROOT, ManifestRow, write_manifest
from text.tokenizer import load_tokenizer, train_tokenizer
from training.data import recordings
from training.data.augmentation import SpeedPerturbation
from training.data.recordings import (
    SkippedUtterances,
    collate,
    evaluation_batches,
    leave_out,
    make_dataset,
    pad_right,
    read_rows,
    sorted_by_duration,
    training_batches,
    unalignable,
    with_characters,
)
from training.launch.command_line import run_script
from training.shapes import rounded_up

RATE = 16000
TEXTS = ["ONE TWO", "THREE", "FOUR FIVE SIX", "SEVEN", "EIGHT NINE", "ZERO", "TEN", "TWO TWO"]
DURATIONS_S = [0.7, 0.5, 1.4, 0.6, 1.1, 0.5, 0.4, 0.9]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    train_tokenizer(TEXTS, path, token_type="char", output_neurons=31)
    return load_tokenizer(path, 31)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(manifest, data root) of eight utterances of noise."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for number, (text, duration_s) in enumerate(zip(TEXTS, DURATIONS_S, strict=True)):
        name = f"u{number}"
        soundfile.write(
            root / f"{name}.flac", 0.1 * rng.standard_normal(int(RATE * duration_s)), RATE
        )
        rows.append(ManifestRow(name, duration_s, f"{DATA_ROOT}/{name}.flac", "1", text))
    write_manifest(root / "train.csv", rows)
    return root / "train.csv", root


@pytest.fixture
def rows(corpus):
    return read_rows(*corpus)


def hparams(**changes):
    return {
        "num_workers": 0,
        "sorting": "random",
        "dynamic_batching": True,
        "batch_size": 3,
        "max_batch_length_train": 2.0,
        "max_batch_length_val": 2.0,
        "num_bucket": 3,
        "max_batch_ex": 128,
        "seed": 5,
        **changes,
    }


def test_rows_point_into_the_data_root(rows, corpus):
    assert list(rows) == [f"u{i}" for i in range(8)]
    assert rows["u2"] == {
        "wav": str(corpus[1] / "u2.flac"),
        "duration": 1.4,
        "spk_id": "1",
        "wrd": "FOUR FIVE SIX",
    }


def test_a_data_root_that_looks_like_the_placeholder_is_kept(corpus):
    assert read_rows(corpus[0], "/a/$data_root/b")["u0"]["wav"] == "/a/$data_root/b/u0.flac"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Run without --skip_prep"),
        ("", "it is empty"),
        ("id,text\n", "columns"),
        ("ID,duration,wav,spk_id,wrd\n", "has no utterances"),
        ("ID,duration,wav,spk_id,wrd\na,long,b,c,d\n", "line 2"),
        ("ID,duration,wav,spk_id,wrd\na,1.0\n", "line 2"),
    ],
)
def test_a_file_that_is_no_manifest_is_one_error(tmp_path, content, message):
    path = tmp_path / "train.csv"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_rows(path, "/data")


def test_an_item_has_audio_counts_and_three_kinds_of_targets(rows, tokenizer):
    item = make_dataset(rows, tokenizer, RATE)[1]
    assert item["id"] == "u1"
    assert item["sig"].shape == (RATE // 2,)
    assert item["num_samples"] == RATE // 2
    assert tokenizer.decode(item["tokens"].tolist()) == "THREE"
    assert item["tokens_bos"].tolist() == [1, *item["tokens"].tolist()]
    assert item["tokens_eos"].tolist() == [*item["tokens"].tolist(), 2]
    assert 0 not in item["tokens"]


@pytest.mark.parametrize(
    ("change", "message"),
    [("missing", "u0.*cannot be read"), ("rate", "8000 Hz and 1 channel"), ("stereo", "2 channel")],
)
def test_audio_that_changed_after_preparation_is_named(tmp_path, tokenizer, change, message):
    path = tmp_path / "u0.flac"
    if change == "rate":
        soundfile.write(path, np.zeros(800), 8000)
    elif change == "stereo":
        soundfile.write(path, np.zeros((800, 2)), RATE)
    row = {"wav": str(path), "duration": 0.1, "spk_id": "1", "wrd": "ONE"}
    with pytest.raises(UserError, match=message):
        make_dataset({"u0": row}, tokenizer, RATE)[0]


def test_what_a_worker_finds_wrong_is_one_message(rows, tokenizer, capsys):
    rows["u3"]["wav"] += ".gone"
    _, loader = loader_of(make_dataset(rows, tokenizer, RATE), hparams(num_workers=1))
    with pytest.raises(SystemExit) as ended:
        run_script(lambda argv: list(loader), [])
    assert ended.value.code == EXIT_USER_ERROR
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: u3: ")
    assert stderr.count("\n") == 1


def test_what_ctc_cannot_align_is_listed_with_the_reason(tokenizer):
    def row(samples, text):
        return {"duration": samples / RATE, "wrd": text}

    needs_5 = "TOO"  # three characters, the space before them, one repetition
    frames_of = {frames: 640 * (frames - 1) for frames in (4, 5)}
    rows = {
        "exact": row(frames_of[5], needs_5),
        "with a word of others": row(frames_of[5], f"{needs_5} ?!"),
        "short": row(frames_of[4], needs_5),
        "empty": row(8000, ""),
        "unknown": row(8000, "???"),
    }
    reasons = unalignable(rows, tokenizer, RATE, lambda samples: 1 + samples // 640)
    assert reasons.keys() == {"short", "empty", "unknown"}
    assert "4 frames for 5" in reasons["short"]
    assert reasons["empty"] == "empty transcript"
    assert reasons["unknown"] == "no known character"


def test_a_large_corpus_is_tokenised_in_parts(tokenizer, monkeypatch):
    sizes = []

    class Watched:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, texts):
            sizes.append(len(texts))
            return tokenizer.encode(texts)

    monkeypatch.setattr(recordings, "_ENCODED_AT_ONCE", 3)
    rows = {f"u{i}": {"duration": 0.1 * i, "wrd": "ONE TWO"} for i in range(8)}
    reasons = unalignable(rows, Watched(), RATE, lambda samples: samples // 640)
    assert sizes == [3, 3, 2]
    assert reasons.keys() == {"u0", "u1", "u2", "u3"}


def test_leaving_out_everything_is_an_error(rows):
    assert leave_out(rows, {"u0", "u7"}).keys() == rows.keys() - {"u0", "u7"}
    with pytest.raises(UserError, match=r"skipped\.csv"):
        leave_out(rows, set(rows))


def read_skipped(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def test_a_skipped_utterance_is_listed_once(tmp_path):
    path = tmp_path / "run" / "skipped.csv"
    skipped = SkippedUtterances(path)
    skipped.add({})
    assert read_skipped(path) == [["id", "reason"]]
    skipped.add({"a": "too short, by far", "b": "empty"})
    skipped.add({"b": "again", "c": "short"})
    expected = [["id", "reason"], ["a", "too short, by far"], ["b", "empty"], ["c", "short"]]
    assert read_skipped(path) == expected
    SkippedUtterances(path).add({"a": "after a restart", "c": "after a restart"})
    assert read_skipped(path) == expected


def test_two_processes_list_an_utterance_once(tmp_path):
    first, second = (SkippedUtterances(tmp_path / "skipped.csv") for _ in range(2))
    first.add({"a": "short"})
    second.add({"b": "short"})
    first.add({"b": "short", "c": "short"})
    second.add({"a": "short"})
    assert [row[0] for row in read_skipped(tmp_path / "skipped.csv")] == ["id", "a", "b", "c"]


def loader_of(dataset, options):
    sampler, arguments = training_batches(dataset, options)
    return sampler, make_dataloader(dataset, **arguments)


def batches_of(loader):
    return [list(batch.id) for batch in loader]


@pytest.mark.parametrize("dynamic", [True, False])
def test_every_epoch_has_all_utterances_in_an_order_of_its_own(rows, tokenizer, dynamic):
    dataset = make_dataset(rows, tokenizer, RATE)
    sampler, loader = loader_of(dataset, hparams(dynamic_batching=dynamic))
    epochs = []
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        epochs.append(batches_of(loader))
        assert sorted(itertools.chain(*epochs[-1])) == sorted(rows)
    assert len({repr(batches) for batches in epochs}) == 5
    # A resumed run meets the same batches in epoch 3.
    sampler, loader = loader_of(dataset, hparams(dynamic_batching=dynamic))
    sampler.set_epoch(3)
    assert batches_of(loader) == epochs[2]


def test_another_seed_gives_another_order(rows, tokenizer):
    dataset = make_dataset(rows, tokenizer, RATE)
    orders = []
    for seed in (1, 2, 3):
        sampler, loader = loader_of(dataset, hparams(seed=seed))
        sampler.set_epoch(1)
        orders.append(repr(batches_of(loader)))
    assert len(set(orders)) > 1


@pytest.mark.parametrize("dynamic", [True, False])
def test_neighbouring_seeds_have_batches_of_their_own(rows, tokenizer, dynamic):
    dataset = make_dataset(rows, tokenizer, RATE)
    found = []
    for seed, epoch in ((1, 2), (2, 1)):
        sampler, loader = loader_of(dataset, hparams(seed=seed, dynamic_batching=dynamic))
        sampler.set_epoch(epoch)
        found.append(batches_of(loader))
    assert found[0] != found[1]


def test_dynamic_batches_keep_within_their_seconds(rows, tokenizer):
    dataset = make_dataset(rows, tokenizer, RATE)
    sampler, loader = loader_of(dataset, hparams())
    sampler.set_epoch(1)
    batches = batches_of(loader)
    assert max(map(len, batches)) > 1
    for ids in batches:
        assert sum(rows[i]["duration"] for i in ids) <= 2.0


def test_no_more_utterances_in_a_batch_than_allowed(rows, tokenizer):
    dataset = make_dataset(rows, tokenizer, RATE)
    options = hparams(max_batch_length_train=1000, num_bucket=10, max_batch_ex=3)
    assert max(map(len, batches_of(loader_of(dataset, options)[1]))) == 3


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("sorting", ["ascending", "descending"])
def test_sorted_batches_follow_the_duration(rows, tokenizer, sorting, dynamic):
    ordered = sorted_by_duration(rows, sorting)
    dataset = make_dataset(ordered, tokenizer, RATE)
    options = hparams(sorting=sorting, dynamic_batching=dynamic, num_bucket=4)
    longest = [
        max(rows[i]["duration"] for i in ids) for ids in batches_of(loader_of(dataset, options)[1])
    ]
    assert longest == sorted(longest, reverse=sorting == "descending")


def test_evaluation_goes_through_everything_longest_first(rows, tokenizer):
    dataset = make_dataset(rows, tokenizer, RATE)
    loader = make_dataloader(dataset, **evaluation_batches(dataset, hparams(num_bucket=20)))
    first, second = batches_of(loader), batches_of(loader)
    assert first == second
    assert sorted(itertools.chain(*first)) == sorted(rows)
    longest = [max(rows[i]["duration"] for i in ids) for ids in first]
    assert longest == sorted(longest, reverse=True)


def test_batches_are_padded_with_zeros_and_know_their_lengths(rows, tokenizer):
    dataset = make_dataset(rows, tokenizer, RATE)
    sampler, loader = loader_of(dataset, hparams(dynamic_batching=False, batch_size=8))
    del sampler
    (batch,) = loader
    assert batch.sig.data.shape == (8, rounded_up(int(1.4 * RATE), per_octave=16))
    for row, (utterance, samples) in enumerate(zip(batch.id, batch.num_samples, strict=True)):
        assert samples == round(rows[utterance]["duration"] * RATE)
        assert batch.sig.data[row, samples:].abs().sum() == 0
        count = round(float(batch.tokens.lengths[row]) * batch.tokens.data.shape[1])
        assert tokenizer.decode(batch.tokens.data[row, :count].tolist()) == rows[utterance]["wrd"]
        assert (batch.tokens.data[row, count:] == 0).all()


def audio_by_id(loader):
    return {
        utterance: batch.sig.data[row, : batch.num_samples[row]]
        for batch in loader
        for row, utterance in enumerate(batch.id)
    }


def test_perturbed_audio_does_not_depend_on_workers_or_batches(rows, tokenizer):
    audio = []
    for options in (
        hparams(),
        hparams(num_workers=2, max_batch_length_train=4.0),
        hparams(num_workers=1, dynamic_batching=False),
    ):
        perturbation = SpeedPerturbation(SpeedPerturb(RATE, [90, 100, 110]), seed=3)
        dataset = make_dataset(rows, tokenizer, RATE, perturbation)
        sampler, loader = loader_of(dataset, options)
        perturbation.epoch = 2
        sampler.set_epoch(2)
        audio.append(audio_by_id(loader))
    assert any(audio[0][i].shape[0] != rows[i]["duration"] * RATE for i in rows)
    for other in audio[1:]:
        for utterance in rows:
            # A worker has one thread: the resampler's convolution adds up in another order there.
            torch.testing.assert_close(audio[0][utterance], other[utterance], rtol=0, atol=1e-6)


def test_audio_is_left_alone_before_the_epoch_that_augmentation_begins_in():
    perturbation = SpeedPerturbation(SpeedPerturb(RATE, [90]), seed=3, from_epoch=2)
    wav_S = torch.linspace(-1, 1, RATE)
    perturbation.epoch = 1
    assert torch.equal(perturbation(wav_S, "a"), wav_S)
    perturbation.epoch = 2
    assert perturbation(wav_S, "a").shape[0] == pytest.approx(RATE / 0.9, abs=1)


def test_workers_learn_of_a_new_epoch(rows, tokenizer):
    perturbation = SpeedPerturbation(SpeedPerturb(RATE, [90, 100, 110]), seed=3)
    dataset = make_dataset(rows, tokenizer, RATE, perturbation)
    _, loader = loader_of(dataset, hparams(num_workers=1))
    lengths = []
    for perturbation.epoch in (1, 2, 3):
        lengths.append({k: v.shape[0] for k, v in audio_by_id(loader).items()})
    assert lengths[0] != lengths[1] or lengths[1] != lengths[2]


def test_utterances_with_given_characters_are_named():
    rows = {"a": {"wrd": "CAFÉ"}, "b": {"wrd": "ONE"}, "c": {"wrd": "ßÉ"}}
    reasons = with_characters(rows, {"É", "ß"})
    assert reasons == {"a": "unknown characters: É", "c": "unknown characters: É ß"}


def test_batches_of_many_lengths_have_few_shapes():
    lengths = range(30_000, 240_000, 500)
    padded = [pad_right([torch.ones(length), torch.ones(9)]) for length in lengths]
    assert len({wav_BS.shape for wav_BS, _ in padded}) <= 16 * 4
    assert sum(wav_BS.shape[1] for wav_BS, _ in padded) < 1.03 * sum(lengths)
    for length, (wav_BS, relative_B) in zip(lengths, padded, strict=True):
        assert (relative_B * wav_BS.shape[1]).round().tolist() == [length, 9]
        assert wav_BS.sum(1).tolist() == [length, 9]


def test_a_batch_of_empty_transcripts_is_a_batch():
    empty = torch.tensor([], dtype=torch.long)
    batch = collate([{"id": name, "tokens": empty} for name in "ab"])
    assert batch.tokens.data.shape == (2, 1)
    assert batch.tokens.lengths.tolist() == [0.0, 0.0]
    mixed = collate([{"tokens": empty}, {"tokens": torch.tensor([3, 4])}])
    assert mixed.tokens.data.tolist() == [[0, 0], [3, 4]]
    assert mixed.tokens.lengths.tolist() == [0.0, 1.0]
