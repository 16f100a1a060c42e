"""The joint recipe: every YAML trains, language models join the search and nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import yaml
from speechbrain.dataio.dataio import length_to_mask

import train_LM
import train_S2S
from common.errors import UserError
from corpora.manifest import read_manifest
from decoding.pretrained_lm import LM_FILE, TOKENIZER_FILE
from tests.ctc_runs import command_line, large_ones_slow, quick_runs, train
from text.tokenizer import train_tokenizer
from training.brains.optimization import count_parameters
from training.launch.command_line import load_hparams
from training.splicing.segments import read_segments

FOLDER = Path(__file__).resolve().parent.parent / "hparams" / "S2S"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TEXT = ["ONE TWO THREE", "FOUR FIVE SIX", "SEVEN EIGHT NINE ZERO"]
TINY_NETWORK = [
    *("--d_model", "16"),
    *("--nhead", "2"),
    *("--num_encoder_layers", "1"),
    *("--num_decoder_layers", "1"),
    *("--d_ffn", "16"),
]


def arguments(name: str, corpus: Path, folder: Path, *more: str) -> list[str]:
    return [
        str(FOLDER / f"{name}.yaml"),
        *("--data_folder", str(corpus)),
        *("--output_folder", str(folder)),
        *("--train_splits", "[train-clean-100]"),
        *("--dev_splits", "[dev-clean]"),
        *("--held_out_speakers", "[]"),
        *("--max_batch_length_train", "3"),
        *("--grad_accumulation_factor", "1"),
        *("--num_workers", "0"),
        *("--token_type", "char"),
        *("--output_neurons", "31"),
        *("--no_lm", "True"),
        *("--pretrained_lm_tokenizer_path", "null"),
        *("--device", "cpu"),
        "--noprogressbar",
        *more,
    ]


@pytest.fixture(scope="module", autouse=True)
def _quick_runs():
    with quick_runs():
        yield


@pytest.mark.parametrize("name", large_ones_slow(FILES))
def test_every_file_trains_two_steps(name, tone_corpus, tmp_path):
    train_S2S.main(
        arguments(name, tone_corpus, tmp_path, "--optimizer_step_limit", "2", "--test_splits", "[]")
    )
    (checkpoint,) = (tmp_path / "save").glob("CKPT+*")
    state = yaml.safe_load((checkpoint / "brain.ckpt").read_text())
    assert state["optimizer_step"] == 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("conformer_small", 13_327_296),
        ("conformer_large", 109_136_048),
        ("conmamba_small", 14_075_520),
        ("conmamba_large", 115_187_888),
        ("conmambamamba_small", 14_570_880),
        ("conmambamamba_large", 122_917_040),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters, tmp_path):
    hparams = load_hparams(
        str(FOLDER / f"{name}.yaml"), {"data_folder": "x", "output_folder": str(tmp_path)}
    )
    assert count_parameters([hparams["model"]]) == parameters


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("other", ["conformer", "conmambamamba", "transformer"])
def test_files_of_one_size_differ_in_encoder_or_decoder_alone(size, other):
    if not (FOLDER / f"{other}_{size}.yaml").is_file():
        pytest.skip(f"there is no {other}_{size}.yaml")

    def lines(name: str) -> set[str]:
        text = (FOLDER / f"{name}_{size}.yaml").read_text()
        return {line for line in text.splitlines() if not line.startswith("#")}

    differing = lines("conmamba") ^ lines(other)
    allowed = ("encoder_module", "decoder_module", "attention_type", "mamba_config", "d_state")
    allowed += ("expand", "d_conv", "bidirectional", "output_folder")
    assert [line for line in differing if line.strip().split(":")[0] not in allowed] == []


@pytest.fixture(scope="module")
def trained(tone_corpus, tmp_path_factory) -> Path:
    """Folder of a tiny trained run that has scored both test splits."""
    folder = tmp_path_factory.mktemp("s2s") / "run"
    more = ["--number_of_epochs", "2", "--test_beam_size", "3", "--valid_beam_size", "2"]
    more += ["--spliced_share", "1", "--splice_from_epoch", "2", "--splice_min_log_prob", "-100"]
    train_S2S.main(arguments("conmambamamba_small", tone_corpus, folder, *TINY_NETWORK, *more))
    return folder


def test_a_run_leaves_its_files(trained):
    results = json.loads((trained / "results.json").read_text())
    assert set(results["splits"]) == {"test-clean", "test-other"}
    assert results["model"]["decoder_module"] == "mamba"
    for split in results["splits"]:
        for name in (f"wer_{split}.txt", f"cer_{split}.txt", f"hyp_{split}.tsv"):
            assert (trained / name).is_file()
    log = (trained / "train_log.txt").read_text()
    assert "valid ACC" in log
    assert "valid WER" in log


@pytest.mark.parametrize("decoder_module", ["transformer", "mamba"])
def test_a_joint_model_begins_with_what_a_ctc_run_learnt(decoder_module, tone_corpus, tmp_path):
    keys = {"number_of_epochs": 1, "test_splits": "[]", "held_out_speakers": "[]"}
    keys |= {"num_encoder_layers": 2, "inter_ctc_layers": "[1]", "dev_splits": "[dev-clean]"}
    ctc_yaml = FOLDER.parent / "CTC" / "an4.yaml"
    assert train(command_line(tone_corpus, tmp_path / "ctc", ctc_yaml, **keys)) == 0
    first = tmp_path / "ctc" / "save" / "averaged" / "model.ckpt"
    keys |= {"num_decoder_layers": 1, "decoder_module": decoder_module, "lr_adam": 0.0}
    joint = command_line(tone_corpus, tmp_path / "joint", FOLDER / "an4.yaml", **keys)
    assert train([*joint, "--init_from", str(tmp_path / "ctc")], train_S2S.main) == 0
    (checkpoint,) = (tmp_path / "joint" / "save").glob("CKPT+*")
    begun = torch.load(checkpoint / "model.ckpt", weights_only=True)
    for name, value in torch.load(first, weights_only=True).items():
        assert torch.equal(begun.pop(name.replace("2.w.", "3.w.")), value), name
    assert begun
    assert all(name.startswith(("1.decoder.", "1.custom_tgt_module.", "2.w.")) for name in begun)


def test_the_ctc_branch_cuts_the_speech_for_splicing(trained):
    segments, origin = read_segments(trained / "save" / "segments.json")
    assert origin["epoch"] == 2
    rows = {row.ID: row for row in read_manifest(trained / "train.csv")}
    assert {segment.utterance_id for segment in segments} <= set(rows)
    assert len(segments) > len(rows)
    for segment in segments:
        assert f" {segment.words} " in f" {rows[segment.utterance_id].wrd} "


def search_of(folder: Path, **overrides):
    hparams = load_hparams(
        str(FOLDER / "conmambamamba_small.yaml"),
        {
            "data_folder": "x",
            "output_folder": str(folder / "out"),
            "output_neurons": 31,
            "d_model": 16,
            "nhead": 2,
            "d_ffn": 16,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            **overrides,
        },
    )
    model_file = folder / TOKENIZER_FILE
    return hparams, sentencepiece.SentencePieceProcessor(model_file=str(model_file))


@pytest.fixture
def lm_folder(tmp_path):
    """A folder as train_LM.py leaves it: tokenizer.ckpt and lm.ckpt."""
    train_tokenizer(TEXT, tmp_path / TOKENIZER_FILE, token_type="char", output_neurons=31)
    hparams, _ = search_of(tmp_path, no_lm=True)
    torch.manual_seed(0)
    torch.save(tiny_lm(hparams)().state_dict(), tmp_path / LM_FILE)
    return tmp_path


def tiny_lm(hparams):
    partial = hparams["lm_model"]
    small = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "d_ffn": 16}
    return type(partial)(partial.func, *partial.args, **{**partial.keywords, **small})


def test_no_lm_removes_the_language_model_and_nothing_else(lm_folder):
    searches = {}
    for no_lm in (True, False):
        hparams, tokenizer = search_of(
            lm_folder, no_lm=no_lm, pretrained_lm_tokenizer_path=str(lm_folder)
        )
        hparams["lm_scorer"].language_model = tiny_lm(hparams)
        train_S2S.prepare_searches(hparams, tokenizer)
        searches[no_lm] = hparams["test_search"]
    without, with_lm = searches[True], searches[False]
    assert "lm" in with_lm.scorer.full_scorers
    assert without.scorer.full_scorers == {}
    for name in ("beam_size", "temperature", "ctc_weight", "attn_weight", "max_decode_ratio"):
        assert getattr(without, name) == getattr(with_lm, name), name
    assert without.scorer.weights["ctc"] == with_lm.scorer.weights["ctc"]


def test_a_language_model_over_other_tokens_is_refused(lm_folder):
    hparams, tokenizer = search_of(
        lm_folder, no_lm=False, pretrained_lm_tokenizer_path=str(lm_folder)
    )
    other = lm_folder / "other.model"
    train_tokenizer(["ABC DEF"], other, token_type="char", output_neurons=31)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(other))
    with pytest.raises(UserError, match="first differences"):
        train_S2S.prepare_searches(hparams, tokenizer)


def test_a_language_model_folder_without_its_files_is_named(lm_folder):
    (lm_folder / LM_FILE).unlink()
    hparams, tokenizer = search_of(
        lm_folder, no_lm=False, pretrained_lm_tokenizer_path=str(lm_folder)
    )
    with pytest.raises(UserError, match=r"has no lm\.ckpt"):
        train_S2S.prepare_searches(hparams, tokenizer)


def test_a_language_model_of_another_size_names_parameters(lm_folder):
    hparams, tokenizer = search_of(
        lm_folder, no_lm=False, pretrained_lm_tokenizer_path=str(lm_folder)
    )
    partial = tiny_lm(hparams)
    hparams["lm_scorer"].language_model = type(partial)(partial, d_ffn=24)
    with pytest.raises(UserError, match="another architecture"):
        train_S2S.prepare_searches(hparams, tokenizer)


def test_pure_ctc_decoding_is_left_to_the_other_script(lm_folder):
    with pytest.raises(UserError, match=r"train_CTC\.py"):
        search_of(lm_folder, no_lm=True, ctc_weight_decode=1.0)


def test_no_padded_target_is_scored_whatever_the_lengths():
    """Relative lengths times the width can come out above the length: 36 / 70 * 70 does."""
    lengths = torch.arange(1, 200)
    for width in (70, 141, 199):
        lengths_B = lengths[lengths <= width]
        batch = SimpleNamespace(
            num_tokens=lengths_B - 1,
            tokens_eos=SimpleNamespace(data=torch.zeros(len(lengths_B), width)),
        )
        brain = SimpleNamespace(device="cpu")
        scored = length_to_mask(train_S2S.ASR.target_lens(brain, batch) * width, max_len=width)
        assert scored.sum(1).tolist() == lengths_B.tolist()


def test_a_language_model_trained_on_the_transcripts_joins_the_search(tone_corpus, tmp_path):
    def train(*more: str) -> None:
        name, folder = "demo", tmp_path / "run"
        small = [*TINY_NETWORK, "--number_of_epochs", "1", "--test_beam_size", "2"]
        train_S2S.main(arguments(name, tone_corpus, folder, *small, *more))

    train("--test_splits", "[]")
    tokenizer_file = tmp_path / "run" / "save" / "tokenizer.model"
    manifest = str(tmp_path / "run" / "train.csv")
    train_LM.main(
        [
            "hparams/LM/transformer_small.yaml",
            *("--train_text", manifest, "--valid_text", manifest),
            # As many outputs as the recogniser has, which are more than its tokenizer's tokens.
            *("--tokenizer_path", str(tokenizer_file)),
            *("--output_folder", str(tmp_path / "lm"), "--number_of_epochs", "1"),
            *("--num_workers", "0", "--device", "cpu", "--noprogressbar"),
        ]
    )
    scoring = ("--test_only", "--test_splits", "[test-clean]")
    train(*scoring)
    names = ("test-clean_beam2", "test-clean_lm5_beam2")
    alone, joined = (tmp_path / "run" / "eval" / name / "hyp_test-clean.tsv" for name in names)
    with_lm = ("--no_lm", "False", "--pretrained_lm_tokenizer_path", str(tmp_path / "lm" / "lm"))
    train(*scoring, *with_lm, "--lm_weight", "5.0")
    assert len(joined.read_text().splitlines()) == len(alone.read_text().splitlines()) > 1
    assert joined.read_text() != alone.read_text()
