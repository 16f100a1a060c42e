"""A configuration's search, whatever its class."""

import numpy as np
import pytest
import sentencepiece
from speechbrain.decoders.ctc import CTCBeamSearcher

from common.errors import UserError
from decoding.ctc_beam_search import CTCBeamSearch
from decoding.searches import make_ctc_search
from text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tok.model"
    train_tokenizer(["ONE TWO", "NOON"], path, token_type="char", output_neurons=12)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def outputs(tokenizer, texts, width):
    """Log probabilities that spell the texts, a blank after each token, padded with zeros."""
    ids = [tokenizer.encode(text) for text in texts]
    num_frames_B = np.array([2 * len(tokens) for tokens in ids])
    log_probs_BTV = np.zeros((len(texts), num_frames_B.max(), width), np.float32)
    for row, tokens in zip(log_probs_BTV, ids, strict=True):
        row[: 2 * len(tokens)] = -12.0
        row[range(0, 2 * len(tokens), 2), tokens] = -0.01
        row[1 : 2 * len(tokens) : 2, 0] = -0.01
    return log_probs_BTV, num_frames_B


@pytest.mark.parametrize("searcher", [CTCBeamSearch, CTCBeamSearcher])
def test_a_class_may_be_swapped_for_another(searcher, tokenizer):
    search = make_ctc_search(searcher, {"beam_size": 8, "beam_prune_logp": -12.0}, tokenizer)
    texts = ["NOON", "ONE TWO", "TWO"]
    # The output layer is wider than the tokenizer.
    found = search(*outputs(tokenizer, texts, tokenizer.get_piece_size() + 2))
    assert [beams[0].text for beams in found] == texts


@pytest.mark.parametrize("settings", [{"beam_sise": 8}, {"beam_size": 0}])
def test_a_setting_that_cannot_be_is_named(settings, tokenizer):
    with pytest.raises(UserError, match=r"^test_beam_search: .*beam_si"):
        make_ctc_search(CTCBeamSearch, settings, tokenizer)


def test_a_missing_ngram_is_named(tokenizer):
    with pytest.raises(UserError, match=r"kenlm_model_path: .*nowhere\.arpa"):
        make_ctc_search(CTCBeamSearch, {"ngram": "nowhere.arpa"}, tokenizer)
