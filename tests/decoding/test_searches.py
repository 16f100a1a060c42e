"""A configuration's search, whatever its class."""

import re

import numpy as np
import pytest
import sentencepiece
from speechbrain.decoders.ctc import CTCBeamSearcher

from common.errors import UserError
from decoding.ctc_beam_search import CTCBeamSearch
from decoding.searches import make_ctc_search, report_known_words
from text.tokenizer import train_tokenizer
from tools.make_ngram import main as make_ngram


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


def ngram_of(folder, text, *options):
    (folder / "text.txt").write_text(text, encoding="utf-8")
    path = folder / "lm.arpa"
    assert make_ngram([str(folder / "text.txt"), "--output", str(path), *options]) == 0
    return str(path)


@pytest.mark.parametrize(
    ("searcher", "key"), [(CTCBeamSearch, "ngram"), (CTCBeamSearcher, "kenlm_model_path")]
)
@pytest.mark.parametrize(
    ("text", "level", "message"),
    [
        ("ONE TWO NOON", "INFO", "words.arpa knows 2 of the 3 words"),
        ("one two noon", "WARNING", "knows 0 of the 3 words .* written in lower case"),
        ("EINS ZWEI", "WARNING", "knows 0 of the 3 words .* of this language"),
    ],
)
def test_it_is_said_how_many_words_an_ngram_knows(
    searcher, key, text, level, message, tokenizer, tmp_path, caplog
):
    if searcher is CTCBeamSearcher:
        pytest.importorskip("kenlm")
    search = make_ctc_search(searcher, {"beam_size": 4, key: ngram_of(tmp_path, text)}, tokenizer)
    caplog.clear()
    with caplog.at_level("INFO", logger="decoding.searches"):
        report_known_words(search, {"ONE", "TWO", "THREE"}, "words.arpa")
    (record,) = caplog.records
    assert record.levelname == level
    assert re.search(message, record.getMessage())


def test_an_ngram_of_tokens_is_no_ngram_of_words(tokenizer, tmp_path):
    model_file = tmp_path / "tok.model"
    model_file.write_bytes(tokenizer.serialized_model_proto())
    path = ngram_of(tmp_path, "ONE TWO", "--tokenizer", str(model_file))
    with pytest.raises(UserError, match=r"n-gram is one of tokens, such as '▁'.*one of words"):
        make_ctc_search(CTCBeamSearch, {"ngram": path}, tokenizer)
