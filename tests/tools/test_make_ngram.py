"""The n-gram is a distribution, reads what it is given, and means to kenlm what it means here."""

import gzip
import io
import math
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.make_ngram import BOS, EOS, FALLBACK_DISCOUNTS, UNK, estimate, main, write_arpa

SENTENCES = st.lists(
    st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6), min_size=1, max_size=30
)


def text(num_sentences=400, seed=0):
    """Sentences with enough repetition that every discount can be estimated."""
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(60)]
    weights = [1 / (i + 1) for i in range(60)]
    return [draw.choices(words, weights, k=draw.randint(1, 8)) for _ in range(num_sentences)]


def contexts(model):
    """Every context that was seen, one that was not, and the empty one."""
    return [(), *model.log_backoffs, ("never", "seen"), (BOS, "never")]


@settings(max_examples=15, deadline=None)
@given(sentences=SENTENCES, order=st.integers(1, 4))
def test_probabilities_of_every_context_sum_to_one(sentences, order):
    model = estimate(sentences, order)
    for context in contexts(model):
        total = sum(10 ** model.log_prob(word, context) for word in model.words)
        assert total == pytest.approx(1.0, abs=1e-9)


def test_discounts_are_estimated_where_the_text_allows_it():
    model = estimate(text(), order=3)
    assert 2 not in model.used_fallback
    for context in contexts(model)[:200]:
        total = sum(10 ** model.log_prob(word, context) for word in model.words)
        assert total == pytest.approx(1.0, abs=1e-9)


def test_bigram_by_hand():
    """One sentence "a b" three times: worked out on paper with the fallback discounts."""
    model = estimate([["a", "b"]] * 3, order=2)
    assert model.used_fallback == (1, 2)
    discount = FALLBACK_DISCOUNTS[0]
    uniform = 1 / 4
    # Each of a, b and </s> follows one word: continuation count 1 of 3.
    unigram = (1 - discount) / 3 + discount * uniform
    assert 10 ** model.log_prob("b") == pytest.approx(unigram)
    # a b was seen 3 times of 3: 3 - 1.5 of it stays.
    assert 10 ** model.log_prob("b", ["a"]) == pytest.approx((1.5 + 1.5 * unigram) / 3)
    assert 10 ** model.log_prob("a", ["a"]) == pytest.approx(0.5 * unigram)
    assert 10 ** model.log_prob(UNK) == pytest.approx(discount * uniform)


def test_lower_orders_count_contexts_not_occurrences():
    """Kneser-Ney's example: "francisco" is frequent, but after one word only."""
    sentences = [["san", "francisco"]] * 20 + [["the", "glass"], ["a", "glass"], ["my", "glass"]]
    model = estimate(sentences, order=2)
    assert model.log_prob("glass", ["your"]) > model.log_prob("francisco", ["your"])


@pytest.mark.parametrize("order", [2, 3, 4])
def test_kenlm_reads_the_file_and_gives_the_same_scores(order, tmp_path):
    kenlm = pytest.importorskip("kenlm", reason="kenlm is not installed: pip install -e '.[ngram]'")
    model = estimate(text(), order)
    path = tmp_path / "lm.arpa"
    with open(path, "w", encoding="utf-8") as stream:
        write_arpa(model, stream)
    theirs = kenlm.Model(str(path))
    assert theirs.order == order
    for sentence in [*text(30, seed=1), ["w0", "unseen", "w3"], ["w59"] * 6]:
        expected, history = 0.0, [BOS]
        for word in [*sentence, EOS]:
            expected += model.log_prob(word, history)
            history.append(word if word in model.words else UNK)
        assert theirs.score(" ".join(sentence)) == pytest.approx(expected, abs=1e-4)


def test_it_predicts_text_of_its_kind_better_than_shuffled_text():
    sentences = [f"{a} then {b} {a}".split() for a in ("one", "two", "six") for b in "xyz"] * 5
    model = estimate(sentences, order=3)

    def total(sentence):
        history = [BOS]
        log_prob = 0.0
        for word in [*sentence, EOS]:
            log_prob += model.log_prob(word, history)
            history.append(word)
        return log_prob

    assert total(["six", "then", "y", "six"]) > total(["then", "six", "six", "y"]) + 2


def test_arpa_ends_and_lists_its_counts():
    stream = io.StringIO()
    write_arpa(estimate([["a", "b"], ["b"]], order=2), stream)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["\\data\\", "ngram 1=5", "ngram 2=4"]
    assert lines[-1] == "\\end\\"
    assert lines[lines.index("\\2-grams:") - 1] == ""


@pytest.mark.parametrize(
    ("sentences", "order", "message"),
    [([], 3, "no words"), ([["a"]], 0, "at least 1"), ([["a", "</s>"]], 2, "sentence marks")],
)
def test_text_that_is_none_is_refused(sentences, order, message):
    with pytest.raises(ValueError, match=message):
        estimate(sentences, order)


class TestCommand:
    def run(self, *arguments):
        return main([str(argument) for argument in arguments])

    def test_plain_and_gzip_text_and_manifests_give_the_same_words(self, tmp_path):
        sentences = ["ONE TWO", "TWO THREE"]
        plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
        # As Windows' editor writes it, with a mark at the beginning.
        plain.write_text("\ufeff" + "\n".join(sentences) + "\n\n", encoding="utf-8")
        with gzip.open(packed, "wt") as stream:
            stream.write("\n".join(sentences))
        manifest = tmp_path / "c.csv"
        rows = [f"id{i},1.0,$data_root/x/{i}.flac,spk,{s}" for i, s in enumerate(sentences)]
        manifest.write_text("ID,duration,wav,spk_id,wrd\n" + "\n".join(rows) + "\n")
        outputs = []
        for source in (plain, packed, manifest):
            output = tmp_path / "out" / f"{source.name}.arpa"
            assert self.run(source, "--order", 2, "--output", output) == 0
            outputs.append(output.read_text())
        assert outputs[0] == outputs[1] == outputs[2]

    def test_a_damaged_file_is_one_message(self, tmp_path, capsys):
        damaged = bytearray(gzip.compress(b"ONE TWO\n" * 50))
        damaged[10] |= 6
        (tmp_path / "text.gz").write_bytes(damaged)
        assert self.run(tmp_path / "text.gz", "--output", tmp_path / "o.arpa") == 2
        assert "text.gz is damaged" in capsys.readouterr().err

    def with_tokenizer(self, tmp_path):
        text_file = tmp_path / "a.txt"
        text_file.write_text("ABBA\nBAAB\n" * 20)
        sentencepiece.SentencePieceTrainer.train(
            input=str(text_file),
            model_prefix=str(tmp_path / "m"),
            model_type="char",
            vocab_size=6,
            hard_vocab_limit=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
        output = tmp_path / "tokens.arpa"
        return text_file, "--output", output, "--tokenizer", tmp_path / "m.model"

    def test_with_a_tokenizer_the_units_are_its_pieces(self, tmp_path, capsys):
        arguments = self.with_tokenizer(tmp_path)
        output = arguments[2]
        assert self.run(*arguments, "--order", 2) == 0
        assert "left out" not in capsys.readouterr().out
        unigrams = output.read_text().split("\\1-grams:")[1].split("\\2-grams:")[0].split()
        assert {"A", "B", "▁"} <= set(unigrams)
        with pytest.raises(SystemExit):
            self.run(*arguments, "--order", 1)
        assert "needs --order 2 at least" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            self.run(*arguments, "--order", 7)
        assert "needs --order 6 at most" in capsys.readouterr().err

    def test_unknown_characters_are_counted_and_leave_nothing(self, tmp_path, capsys):
        text_file, _, output, *tokenizer = self.with_tokenizer(tmp_path)
        assert self.run(text_file, "--output", output, *tokenizer) == 0
        clean = output.read_text()
        with open(text_file, "a") as stream:
            stream.write("77\n É \n7\n")
        assert self.run(text_file, "--output", output, *tokenizer) == 0
        assert output.read_text() == clean
        message = "4 characters that the tokenizer does not know were left out, 2 different ones"
        assert f"{message}: '7' 3, 'É' 1" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "there is no such file"), (b"\xff\xfe\x00", "UTF-8"), (b"\n", "no words")],
    )
    def test_a_bad_text_is_one_line_and_status_2(self, content, message, tmp_path, capsys):
        source = tmp_path / "a.txt"
        if content is not None:
            source.write_bytes(content)
        assert self.run(source, "--output", tmp_path / "lm.arpa") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "lm.arpa").exists()

    def test_a_probability_is_never_more_than_one(self, tmp_path):
        source = tmp_path / "a.txt"
        source.write_text("A\n" * 50)
        assert self.run(source, "--output", tmp_path / "lm.arpa") == 0
        lines = (tmp_path / "lm.arpa").read_text().splitlines()
        probabilities = [float(line.split("\t")[0]) for line in lines if "\t" in line]
        assert all(p <= 0 and math.isfinite(p) for p in probabilities)

    def test_a_folder_as_output_is_one_line_and_status_2(self, tmp_path, capsys):
        source = tmp_path / "a.txt"
        source.write_text("A B\n")
        assert self.run(source, "--output", tmp_path) == 2
        error = capsys.readouterr().err
        assert "cannot be written" in error
        assert error.count("\n") == 1
