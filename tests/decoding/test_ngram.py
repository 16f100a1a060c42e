"""Word n-grams score as KenLM does, and files that are none are named."""

import bz2
import gzip

import numpy as np
import pytest

from decoding.ctc_beam_search import CTCBeamSearch, native, read_ngram
from tests.decoding.ctc_searches import BACKENDS, LEXICON, write_ngram

# As pruning leaves it: the context "b c" of "b c d" is not there, and neither is <unk>.
PRUNED = """
\\data\\
ngram 1=6
ngram 2=2
ngram 3=1

\\1-grams:
-99\t<s>\t-0.5
-1.0\t</s>
-0.7\tb\t-0.25
-1.1\tc\t-0.125
-0.9\td\t-0.75
-1.3\té

\\2-grams:
-0.3\t<s> b\t-0.0625
-0.4\tc d\t-0.375

\\3-grams:
-0.2\tb c d

\\end\\
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "words.arpa"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [2, 3, 4])
def test_scores_are_those_of_kenlm(order, backend, tmp_path):
    kenlm = pytest.importorskip("kenlm")
    path = write_ngram(tmp_path / "words.arpa", order)
    theirs, ours = kenlm.Model(str(path)), read_ngram(path, backend)
    assert ours.order == theirs.order == order
    rng = np.random.default_rng(0)
    for in_sentence in (True, False):
        for _ in range(50):
            words = rng.choice([*LEXICON, "</s>"], rng.integers(1, 12)).tolist()
            expected = theirs.full_scores(" ".join(words), bos=in_sentence, eos=False)
            np.testing.assert_allclose(
                ours.log10_probs(words, in_sentence),
                [log_prob for log_prob, _, _ in expected],
                rtol=0,
                atol=2e-6,
            )
    assert all((word in ours) == (word in theirs) for word in [*LEXICON, "<s>", "</s>", "<unk>"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pruned_model_backs_off_past_what_it_leaves_out(backend, write):
    ngram = read_ngram(write(PRUNED), backend)
    np.testing.assert_allclose(ngram.log10_probs(["b", "c", "d"]), [-0.3, -1.4125, -0.2], atol=1e-6)
    np.testing.assert_allclose(
        ngram.log10_probs(["d", "c", "d", "x", "é"]),
        [-1.4, -1.85, -0.4, -101.125, -1.3],
        atol=1e-5,
    )
    np.testing.assert_allclose(ngram.log10_probs(["b"], in_sentence=False), [-0.7], atol=1e-6)
    assert ngram.num_words == 6


@pytest.mark.skipif(native.unavailable() is not None, reason="the native reader is not built")
def test_both_readers_read_the_same_numbers(tmp_path, write):
    rng = np.random.default_rng(1)
    orders = [write_ngram(tmp_path / f"{order}.arpa", order) for order in (1, 5)]
    for path in (write(PRUNED), *orders):
        ngrams = [read_ngram(path, backend) for backend in ("native", "reference")]
        words = rng.choice([*LEXICON, *"bcdx"], 2000).tolist()
        scores = [ngram.log10_probs(words) for ngram in ngrams]
        assert scores[0] == scores[1]
        assert ngrams[0].num_words == ngrams[1].num_words


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_becomes_of_its_file_is_nothing_to_it(backend, write):
    path = write(PRUNED)
    ngram = read_ngram(path, backend)
    path.unlink()
    assert ngram.first_words == ["b", "c", "d", "é"]
    pieces = ["<blank>", " ", "b", "c", "d", "é"]
    assert CTCBeamSearch(pieces, ngram=ngram, backend=backend).ngram is ngram


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_may_be_packed_and_have_windows_line_ends_and_a_preamble(backend, write, tmp_path):
    path = tmp_path / "words.arpa.gz"
    path.write_bytes(gzip.compress(("made by hand\n" + PRUNED).replace("\n", "\r\n").encode()))
    words = ["b", "c", "d", "é"]
    expected = read_ngram(write(PRUNED), backend).log10_probs(words)
    assert read_ngram(path, backend).log10_probs(words) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_other_programs_write_is_read_alike(backend, write):
    words = ["b", "c", "d", "é"]
    expected = read_ngram(write(PRUNED), backend).log10_probs(words)
    other = PRUNED.replace("-99\t", "-inf\t").replace("ngram 1=6", "ngram\t1 = 6")
    assert read_ngram(write("\ufeff" + other.strip()), backend).log10_probs(words) == expected
    impossible = read_ngram(write(PRUNED.replace("-0.9\td", "-inf\td")), backend)
    assert impossible.log10_probs(["d"], in_sentence=False) == [-99.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", r"it has no \\data\\"),
        (lambda text: "The recipes of my grandmother\n", r"it has no \\data\\"),
        (lambda text: text[: text.index("\\3-grams")], r"it ends before \\end\\"),
        (lambda text: text.removesuffix("\\end\\\n"), r"it ends before \\end\\"),
        (lambda text: text.replace("ngram 1=6", "ngram 1=7"), "it has 6 1-grams and announces 7"),
        (lambda text: text.replace("ngram 2=2", "ngram 4=2"), "line 4 is .*ngram 4=2"),
        (lambda text: text.replace("\\2-grams", "\\4-grams"), "line 15 is .*4-grams"),
        (lambda text: text.replace("\\3-grams:\n-0.2\tb c d\n", ""), "line 20 is .*end"),
        (lambda text: text.replace("-0.4\tc", "c"), "line 17 is no 2-gram: .*c d"),
        (lambda text: text.replace("c d\t-0.375", "c d\t-0.375\t1"), "line 17 is no 2-gram"),
        (lambda text: text.replace("c d\t-0.375", "c"), "line 17 is no 2-gram"),
        (lambda text: text.replace("-0.4\tc d", "-0.4\tc x"), "line 17 is no 2-gram: .*c x"),
        (lambda text: text.replace("-0.4\tc", "nan\tc"), "line 17 is no 2-gram: .*nan"),
    ],
)
def test_what_is_no_arpa_file_is_named(backend, damage, message, write):
    path = write(damage(PRUNED))
    with pytest.raises(ValueError, match=f"words.arpa is no ARPA file.*{message}"):
        read_ngram(path, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_files_are_named(backend, tmp_path):
    path = tmp_path / "words.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0\0\0")
    with pytest.raises(ValueError, match=r"words.bin is a binary of KenLM's.*ARPA"):
        read_ngram(path, backend)
    path.write_bytes(gzip.compress(PRUNED.encode())[:-20])
    with pytest.raises(ValueError, match=r"words.bin cannot be unpacked"):
        read_ngram(path, backend)
    path.write_bytes(bz2.compress(PRUNED.encode()))
    with pytest.raises(ValueError, match=r"words.bin is compressed with bzip2: unpack it"):
        read_ngram(path, backend)
    path.write_bytes(PRUNED.encode("latin-1"))
    with pytest.raises(ValueError, match=r"words.bin is not UTF-8 \(at '-1.3\\t.*iconv"):
        read_ngram(path, backend)
    path.write_bytes(bytes(range(256)) * 9)
    with pytest.raises(ValueError, match=r"it has no \\data\\"):
        read_ngram(path, backend)
    with pytest.raises(FileNotFoundError, match=r"nowhere.arpa"):
        read_ngram(tmp_path / "nowhere.arpa", backend)
