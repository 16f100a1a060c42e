import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.dataio.dataio import load_data_csv

from corpora.manifest import ManifestRow, merge_manifests, read_manifest, write_manifest


def row(identifier: str, words: str = "A WORD", split: str = "dev-clean") -> ManifestRow:
    return ManifestRow(identifier, 1.25, f"$data_root/{split}/1/2/{identifier}.flac", "1", words)


# What list_split lets through: words between single spaces.
texts = st.lists(
    st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1), min_size=1, max_size=4
).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(words=st.lists(texts, min_size=1, max_size=5))
def test_any_words_come_back_as_they_were(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("manifest") / "a.csv"
    rows = [row(f"1-2-{number:04d}", text) for number, text in enumerate(words)]
    write_manifest(path, rows)
    assert read_manifest(path) == rows


def test_a_transcript_may_be_long(tmp_path):
    rows = [row("1-2-0000", "WORD " * 100_000 + "END")]
    write_manifest(tmp_path / "a.csv", rows)
    assert read_manifest(tmp_path / "a.csv") == rows


def test_a_blank_line_is_no_row(tmp_path):
    write_manifest(tmp_path / "a.csv", [row("1-2-0000")])
    with open(tmp_path / "a.csv", "a") as stream:
        stream.write("\n")
    assert read_manifest(tmp_path / "a.csv") == [row("1-2-0000")]


def test_speechbrain_reads_what_we_write(tmp_path):
    rows = [row("1-2-0000", 'SAID "NO", TWICE'), row("1-2-0001", "എതൊന്നും എനിയ്ക്ക്")]
    write_manifest(tmp_path / "a.csv", rows)
    data = load_data_csv(tmp_path / "a.csv", {"data_root": "/corpus"})
    assert [data[r.ID]["wrd"] for r in rows] == [r.wrd for r in rows]
    assert data["1-2-0001"]["wav"] == "/corpus/dev-clean/1/2/1-2-0001.flac"
    assert data["1-2-0001"]["duration"] == 1.25


def test_merging_keeps_all_rows_in_order(tmp_path):
    write_manifest(tmp_path / "a.csv", [row("1-2-0001"), row("1-2-0000")])
    write_manifest(tmp_path / "b.csv", [row("1-3-0000")])
    assert merge_manifests([tmp_path / "b.csv", tmp_path / "a.csv"], tmp_path / "all.csv") == 3
    merged = read_manifest(tmp_path / "all.csv")
    assert [r.ID for r in merged] == ["1-3-0000", "1-2-0001", "1-2-0000"]


def test_merging_the_same_utterance_twice_is_an_error_that_names_both_files(tmp_path):
    write_manifest(tmp_path / "a.csv", [row("1-2-0000", split="dev-clean")])
    write_manifest(tmp_path / "b.csv", [row("1-2-0000", split="test-clean")])
    with pytest.raises(ValueError, match=r"1-2-0000 is both .*dev-clean.* and .*test-clean"):
        merge_manifests([tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "all.csv")
    assert not (tmp_path / "all.csv").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.csv is no manifest: it is empty"),
        ("ID,duration,wav,spk_id,wrd\na,1.0,x.flac,1,\xff\n", "not a manifest row .*utf-8"),
        ("id,text\na,b\n", "has the columns.*corpora.prepare table"),
        ("ID,duration,wav,spk_id,wrd\na,1.0,x.flac,1\n", "line 2: not a manifest row"),
        ("ID,duration,wav,spk_id,wrd\na,long,x.flac,1,HI\n", "line 2: not a manifest row"),
        ("ID,duration,wav,spk_id,wrd\na,nan,x.flac,1,HI\n", r"line 2: .*\(nan is no duration"),
        ("ID,duration,wav,spk_id,wrd\na,-1.5,x.flac,1,HI\n", r"line 2: .*\(-1.5 is no duration"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "a.csv")
