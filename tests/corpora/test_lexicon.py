import csv

import pytest

from corpora.lexicon import FILES, write_lexicon


def read(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.txt"
    lines = [f"WORD{number:03d} W ER1 D\nWORD{number:03d}  W AO0 D\n" for number in range(200)]
    path.write_text("IT'S IH1 T S\n\n" + "".join(lines))
    return path


def test_rows_spell_the_word_and_drop_the_stress(source, tmp_path):
    assert write_lexicon(source, tmp_path, seed=1) == 401
    first = read(tmp_path / "lexicon.csv")[0]
    assert first == {"ID": "0", "duration": "4", "char": "I T ' S", "phn": "IH T S"}


def test_the_parts_make_up_the_whole_and_share_no_word(source, tmp_path):
    write_lexicon(source, tmp_path, seed=1)
    whole, *parts = (read(tmp_path / name) for name in FILES)
    assert sorted(row["ID"] for part in parts for row in part) == sorted(r["ID"] for r in whole)
    train, dev, test = ({row["char"] for row in part} for part in parts)
    assert len(train) == 197
    assert len(dev) == len(test) == 2
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_the_seed_decides_the_parts(source, tmp_path):
    contents = []
    for seed in (1, 1, 2):
        write_lexicon(source, tmp_path, seed)
        contents.append((tmp_path / "lexicon_test.csv").read_text())
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("content", "message"), [("A AH0\nB\n", "line 2: 'B' has no pron"), ("\n", "no pronunciations")]
)
def test_a_lexicon_without_pronunciations_is_refused(tmp_path, content, message):
    (tmp_path / "bad.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_lexicon(tmp_path / "bad.txt", tmp_path, seed=1)
    assert not (tmp_path / "lexicon.csv").exists()


def test_a_lexicon_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"CAF\xc9 K AH0 F EY1\n")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8"):
        write_lexicon(tmp_path / "latin.txt", tmp_path, seed=1)
