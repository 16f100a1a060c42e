"""A configuration's search, whatever its class."""

import re

import numpy as np
import pytest
import sentencepiece
from speechbrain.decoders.ctc import CTCBeamSearcher

from common.errors import UserError
from decoding.ctc_beam_search import CTCBeamSearch
from decoding.searches import check_known_words, make_ctc_search
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
        ("ONE EINS", "WARNING", "knows 1 of the 3 words .* of this language"),
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
        check_known_words(search, {"ONE", "TWO", "THREE"}, "words.arpa")
    (record,) = caplog.records
    assert record.levelname == level
    assert re.search(message, record.getMessage())


@pytest.mark.parametrize("searcher", [CTCBeamSearch, CTCBeamSearcher])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("▁ONE ▁T W O", "of tokens, such as '▁O?N?E?'"),
        ("▁ O N E ▁ T W O", "of tokens, such as '▁'"),
        ("O N E | T W O", "of characters"),
        ("O N E T W", "of characters"),
        ("one two noon", "written in lower case"),
    ],
)
def test_an_ngram_of_another_kind_is_refused(searcher, text, message, tokenizer, tmp_path):
    key = "ngram"
    if searcher is CTCBeamSearcher:
        pytest.importorskip("kenlm")
        key = "kenlm_model_path"
    path = ngram_of(tmp_path, text)
    with pytest.raises(UserError, match=message):
        check_known_words(
            make_ctc_search(searcher, {"beam_size": 4, key: path}, tokenizer),
            {"ONE", "TWO", "THREE"},
            "words.arpa",
        )


@pytest.mark.parametrize(("text", "spelled"), [("one two", "upper"), ("ONE TWO", "lower")])
def test_without_references_the_tokens_tell_the_letter_case(text, spelled, tmp_path):
    pieces = ["<unk>", *"▁onetw"] if spelled == "lower" else ["<unk>", *"▁ONETW"]
    with pytest.raises(ValueError, match=r"lm\.arpa is written in (upp|low)er case, as in '"):
        CTCBeamSearch(pieces, ngram=ngram_of(tmp_path, text))
    # Tokens of both cases spell both.
    CTCBeamSearch(["<unk>", *"▁onetwONETW"], ngram=ngram_of(tmp_path, text))


def test_spelled_letters_are_words(tokenizer, tmp_path, caplog):
    search = CTCBeamSearch(["<unk>", *"▁ONETW"], ngram=ngram_of(tmp_path, "O N E T W"))
    assert "single characters" in caplog.text
    check_known_words(search, {"O", "N", "E"}, "letters.arpa")
