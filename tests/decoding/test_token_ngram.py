"""The n-gram that a recipe names is one of its own tokens."""

from pathlib import Path

import pytest
import sentencepiece

from common.errors import UserError
from decoding.pretrained_lm import TokenNgram
from text.tokenizer import train_tokenizer
from tools.make_ngram import main as make_ngram

kenlm = pytest.importorskip("kenlm", reason="kenlm is not installed: pip install -e '.[ngram]'")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(tokenizer, an n-gram of its tokens)."""
    folder = tmp_path_factory.mktemp("ngram")
    sentences = ["ABBA BA", "BAAB", "AB AB"] * 10
    (folder / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    train_tokenizer(sentences, folder / "tok.model", token_type="char", output_neurons=10)
    paths = [str(folder / "text.txt"), "--tokenizer", str(folder / "tok.model")]
    assert make_ngram([*paths, "--order", "3", "--output", str(folder / "tokens.arpa")]) == 0
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok.model"))
    return tokenizer, folder / "tokens.arpa"


def scorer_of(path, tokenizer):
    return TokenNgram(path).make(tokenizer, 10, Path())


def test_every_token_of_the_recogniser_is_known_to_the_ngram(files):
    tokenizer, path = files
    scorer = scorer_of(path, tokenizer)
    size = tokenizer.get_piece_size()
    assert len(scorer.id2char) == 10 > size
    # unk (0) and bos (1) are never predicted; all other pieces stand in the file.
    assert all(piece in scorer.lm for piece in scorer.id2char[2:size])
    assert not any(piece in scorer.lm for piece in scorer.id2char[size:])


def test_no_path_is_no_ngram(files):
    assert scorer_of(None, files[0]) is None


def test_a_missing_file_is_named(files, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        scorer_of(str(tmp_path / "nowhere.arpa"), files[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ABBA BA\nBAAB", "knows 0 of the 3 tokens .'ABBA' is none of them.*of words or of other"),
        # All letters are words, too.
        ("A B\nABBA", "knows 2 of the 3 tokens"),
        ("▁ a b b a", "knows 1 of the 3 tokens"),
    ],
)
def test_an_ngram_of_words_or_other_tokens_is_refused(text, message, files, tmp_path):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    words = tmp_path / "words.arpa"
    assert make_ngram([str(tmp_path / "text.txt"), "--output", str(words)]) == 0
    with pytest.raises(UserError, match=message):
        scorer_of(words, files[0])


def test_an_ngram_of_little_text_is_warned_of(files, tmp_path, caplog):
    (tmp_path / "text.txt").write_text("▁ ▁", encoding="utf-8")
    few = tmp_path / "few.arpa"
    assert make_ngram([str(tmp_path / "text.txt"), "--output", str(few)]) == 0
    assert scorer_of(few, files[0]) is not None
    assert "knows 1 of the 3 tokens: it may make" in caplog.text
