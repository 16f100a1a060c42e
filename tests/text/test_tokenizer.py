"""Tokens: ids, round trips, and vocabularies that do not fit."""

from collections import Counter

import pytest
import sentencepiece as spm

from common.errors import UserError
from text.tokenizer import (
    BOS_ID,
    EOS_ID,
    UNK_ID,
    check_letter_case,
    check_unknown_characters,
    count_unknown_characters,
    load_tokenizer,
    tokens_of,
    train_tokenizer,
    vocabulary,
)

SENTENCES = [
    "ONE TWO THREE",
    "FOUR FIVE SIX SEVEN",
    "EIGHT NINE ZERO",
    "SEVEN SEVEN TWO ONE",
    "NINE TENTHS OF THE LAW",
] * 4
CHARACTERS = sorted(set("".join(SENTENCES)) - {" "})


@pytest.fixture(
    scope="module", params=[("char", 31), ("unigram", 30), ("bpe", 30)], ids=lambda p: p[0]
)
def tokenizer(request, tmp_path_factory):
    token_type, output_neurons = request.param
    path = tmp_path_factory.mktemp(token_type) / "save" / "tokenizer.model"
    train_tokenizer(SENTENCES, path, token_type=token_type, output_neurons=output_neurons)
    return load_tokenizer(path, output_neurons)


def test_special_ids(tokenizer):
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert (UNK_ID, BOS_ID, EOS_ID) == (0, 1, 2)
    assert tokenizer.pad_id() == -1


def test_text_survives_the_way_there_and_back(tokenizer):
    for sentence in SENTENCES:
        assert tokenizer.decode(tokens_of(tokenizer, sentence)) == sentence


def test_targets_never_hold_the_blank_or_a_special_token(tokenizer):
    for sentence in [*SENTENCES, "ONE Ü TWO 7", "Ü", ""]:
        assert not {UNK_ID, BOS_ID, EOS_ID} & set(tokens_of(tokenizer, sentence))
    assert tokens_of(tokenizer, "") == []


def test_an_unknown_character_is_left_out_of_the_targets(tokenizer):
    assert tokenizer.decode(tokens_of(tokenizer, "ONEÜ TWO")) == "ONE TWO"


@pytest.mark.parametrize("text", ["ONE Ü7 TWO", "Ü ONE TWO", "ONE TWO ü", "ü ONE 7 TWO ü"])
def test_a_word_of_unknown_characters_leaves_no_space(tokenizer, text):
    dropped = Counter()
    assert tokens_of(tokenizer, text, dropped) == tokens_of(tokenizer, "ONE TWO")
    assert dropped == Counter(text) - Counter("ONE TWO    ")
    assert tokens_of(tokenizer, "Ü 77") == []


def test_unknown_characters_are_counted(tokenizer):
    counted = count_unknown_characters(tokenizer, [*SENTENCES, "ÜBER ONE", "Ü 7 TWO"])
    assert counted == {"Ü": 2, "B": 1, "7": 1}
    assert count_unknown_characters(tokenizer, SENTENCES) == {}


def test_text_in_another_letter_case_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"Text is in another letter case .*'e' is unknown.*'E'"):
        check_letter_case(tokenizer, ["one two three", "three"], "Text")
    with pytest.raises(UserError, match="tr '\\[:lower:\\]' '\\[:upper:\\]'"):
        check_letter_case(tokenizer, ["One Two Three"], "Text")
    # Most of it is right, or has no case, or is unknown in both cases.
    for sentences in (["ONE TWO e"], ["എന്ന് 12"], ["q q q"], []):
        check_letter_case(tokenizer, sentences, "Text")


def test_vocabulary_is_in_the_order_of_the_ids(tokenizer):
    pieces = vocabulary(tokenizer)
    assert len(pieces) == tokenizer.get_piece_size() == len(set(pieces))
    assert all(tokenizer.piece_to_id(piece) == i for i, piece in enumerate(pieces))


def test_a_character_tokenizer_has_every_character_and_no_more(tmp_path):
    # A rare character is as much a token as a frequent one.
    path = tmp_path / "tokenizer.model"
    train_tokenizer([*SENTENCES * 500, "Q"], path, token_type="char", output_neurons=31)
    pieces = vocabulary(load_tokenizer(path, 31))
    assert sorted(pieces[3:]) == sorted([*CHARACTERS, "Q", "▁"])


def test_transcripts_are_not_normalised(tmp_path):
    path = tmp_path / "tokenizer.model"
    text = "ﬁn ½ ｆｕｌｌ മലയാളം"
    train_tokenizer([text], path, token_type="char", output_neurons=40)
    tokenizer = load_tokenizer(path, 40)
    assert tokenizer.decode(tokens_of(tokenizer, text)) == text


def test_too_few_outputs_for_the_characters_says_how_many_are_needed(tmp_path):
    needed = len(CHARACTERS) + 1 + 3
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=f"--output_neurons {needed}"):
        train_tokenizer(SENTENCES, path, token_type="char", output_neurons=needed - 1)
    assert not path.exists()
    train_tokenizer(SENTENCES, path, token_type="char", output_neurons=needed)
    assert load_tokenizer(path, needed).get_piece_size() == needed


@pytest.mark.parametrize("token_type", ["unigram", "bpe"])
def test_more_tokens_than_the_text_supports_is_one_error(tmp_path, token_type):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=r"5000.*<= \d+\. Set --output_neurons"):
        train_tokenizer(SENTENCES, path, token_type=token_type, output_neurons=5000)
    assert not path.exists()


def test_an_unknown_token_type_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="char, unigram, bpe"):
        train_tokenizer(SENTENCES, tmp_path / "t", token_type="chars", output_neurons=31)


@pytest.mark.parametrize("sentences", [[], ["", "  "]])
def test_no_text_is_an_error(tmp_path, sentences):
    with pytest.raises(UserError, match="No transcript"):
        train_tokenizer(sentences, tmp_path / "t", token_type="char", output_neurons=31)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    train_tokenizer(SENTENCES, path, token_type="unigram", output_neurons=30)
    with pytest.raises(UserError, match="30 tokens but output_neurons is 29"):
        load_tokenizer(path, 29)


@pytest.mark.parametrize(("pad_id", "unk_id", "bos_id", "eos_id"), [(0, 3, 1, 2), (-1, 0, -1, -1)])
def test_a_tokenizer_with_other_special_ids_is_refused(tmp_path, pad_id, unk_id, bos_id, eos_id):
    path = tmp_path / "tokenizer.model"
    with open(path, "wb") as stream:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=stream,
            model_type="char",
            vocab_size=31,
            hard_vocab_limit=False,
            pad_id=pad_id,
            unk_id=unk_id,
            bos_id=bos_id,
            eos_id=eos_id,
            minloglevel=2,
        )
    with pytest.raises(UserError, match=f"{unk_id}, {bos_id}, {eos_id}"):
        load_tokenizer(path, 31)


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_file_that_is_no_tokenizer_is_one_error(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(path, 31)


def test_a_very_long_transcript_is_not_left_out_of_the_vocabulary(tmp_path):
    path = tmp_path / "tokenizer.model"
    train_tokenizer([*SENTENCES, "Q" * 5000], path, token_type="char", output_neurons=31)
    assert "Q" in vocabulary(load_tokenizer(path, 31))


UNKNOWN = Counter({"É": 2, "ß": 1})


class TestUnknownCharacters:
    @pytest.mark.parametrize(
        ("policy", "left_out"), [("drop", "the characters"), ("skip", "the sentences")]
    )
    def test_they_are_counted_and_listed(self, policy, left_out, caplog):
        check_unknown_characters(UNKNOWN, policy, "Text")
        assert f"'É' 2, 'ß' 1; {left_out}" in caplog.text

    def test_they_can_be_an_error(self):
        check_unknown_characters(Counter(), "error", "Text")
        with pytest.raises(UserError, match=r"Text: 2 characters.*'É' 2"):
            check_unknown_characters(UNKNOWN, "error", "Text")

    def test_another_policy_is_an_error(self):
        with pytest.raises(UserError, match="drop, skip, error"):
            check_unknown_characters(Counter(), "keep", "Text")
