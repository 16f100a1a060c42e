"""What absolute positions do not reach is refused before the first step, not amid an epoch."""

from types import SimpleNamespace

import pytest
import torch
from speechbrain.processing.features import InputNormalization

from common.errors import EXIT_USER_ERROR, UserError
from modules.features import Fbank
from modules.frontend import ConvolutionFrontEnd
from modules.speech_encoder import SpeechEncoder
from modules.TransformerASR import TransformerASR
from tests.ctc_runs import command_line, train
from text.tokenizer import load_tokenizer, train_tokenizer
from training.brains.asr_brain import ASRBrain
from training.data.recordings import pad_right

RATE = 16000
LIMIT = 50


def brain_of(tmp_path, **network):
    """What the check reads of a Brain whose encoder has two seconds of positions."""
    options = {"encoder_module": "conmamba", "num_decoder_layers": 0, "max_length": LIMIT} | network
    brain = ASRBrain.__new__(ASRBrain)
    transformer = TransformerASR(31, 640, 16, 2, 1, d_ffn=16, **options).eval()
    front_end = ConvolutionFrontEnd((None, None, 80)).eval()
    brain.speech_encoder = SpeechEncoder(
        Fbank(), InputNormalization(norm_type="sentence"), front_end, transformer
    )
    train_tokenizer(["ONE TWO"], tmp_path / "t.model", token_type="char", output_neurons=31)
    brain.tokenizer = load_tokenizer(tmp_path / "t.model", 31)
    brain.hparams = SimpleNamespace(Transformer=transformer, sample_rate=RATE)
    return brain


def rows_of(samples, words="ONE"):
    return {
        "short": {"duration": 0.1, "wrd": "TWO"},
        "a": {"duration": samples / RATE, "wrd": words},
    }


def test_what_passes_is_what_the_padded_batch_can_encode(tmp_path):
    brain, passed = brain_of(tmp_path), []
    for samples in range(28_000, 34_000, 1200):
        wav_BS, _ = pad_right([torch.zeros(samples)])
        passed.append(not brain._beyond_positions("training", rows_of(samples)))
        if passed[-1]:
            brain.speech_encoder(wav_BS, torch.tensor([samples]))
        else:
            with pytest.raises(ValueError, match="max_length"):
                brain.speech_encoder(wav_BS, torch.tensor([samples]))
    assert passed[0]
    assert not passed[-1]


def test_the_slowest_speed_counts(tmp_path):
    brain = brain_of(tmp_path)
    assert not brain._beyond_positions("training", rows_of(28_000), 100)
    ((frames, text),) = brain._beyond_positions("training", rows_of(28_000), 50)
    assert "training utterance a (4 s)" in text
    assert frames > 2 * LIMIT - 20


def test_relative_positions_reach_everything(tmp_path):
    brain = brain_of(tmp_path, attention_type="RelPosMHAXL")
    assert not brain._beyond_positions("training", rows_of(10**6, 100 * "ONE "))


@pytest.mark.parametrize("network", [{}, {"attention_type": "RelPosMHAXL"}])
def test_tokens_and_the_one_that_begins_a_sentence_count(tmp_path, network):
    brain = brain_of(tmp_path, num_decoder_layers=1, **network)
    for letters in (LIMIT - 2, LIMIT - 1):
        tokens = len(brain.tokenizer.encode("O" * letters)) + 1
        found = brain._beyond_positions("dev", rows_of(8000, "O" * letters))
        wanted = [(tokens, f"dev utterance a needs {tokens} tokens")] if tokens > LIMIT else []
        assert found == wanted
    assert wanted


def test_a_set_with_such_an_utterance_is_not_evaluated(tmp_path):
    brain = brain_of(tmp_path)
    with pytest.raises(UserError, match=r"test utterance a .*max_length: \d+"):
        brain.evaluate(SimpleNamespace(data=rows_of(64_000)))


def test_a_run_says_so_before_it_trains(tone_corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    keys = {"attention_type": "regularMHA", "Transformer": "{max_length: 5}"}
    arguments = command_line(tone_corpus, folder, **keys)
    assert train(arguments) == EXIT_USER_ERROR
    assert "Absolute positions end at max_length 5; " in capsys.readouterr().err
    assert not (folder / "metrics.jsonl").exists()
