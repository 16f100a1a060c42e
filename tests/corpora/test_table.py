"""A corpus as a table: CSV, TSV or JSON lines, made manifests without copying audio."""

import csv
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from corpora.checking import PreparationError
from corpora.manifest import read_manifest
from corpora.prepare import main
from corpora.table import find_table, prepare_tables, read_table

REPOSITORY = Path(__file__).parents[2]
ROWS = [
    {"path": "clips/a.wav", "text": "ONE  TWO", "speaker": "anna"},
    {"path": "clips/b c.flac", "text": 'SHE SAID "THREE"', "speaker": "ben, jr"},
    {"path": "more/ö.ogg", "text": "FOUR", "speaker": "anna"},
]


@pytest.fixture
def folder(tmp_path):
    for seconds, row in enumerate(ROWS, start=1):
        path = tmp_path / row["path"]
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.zeros(seconds * 1600), 16000)
    return tmp_path


def write(path, rows, names=None):
    """The rows in the format that the file's name says; ``names`` renames columns."""
    rows = [{(names or {}).get(key, key): value for key, value in row.items()} for row in rows]
    if path.suffix == ".jsonl":
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
    elif path.suffix == ".tsv":
        text = "\n".join("\t".join(cells) for cells in [rows[0], *(r.values() for r in rows)])
    else:
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return path
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    "names",
    [
        {},
        {"path": "audio_filepath", "text": "sentence", "speaker": "client_id"},
        {"path": "wav", "text": "wrd", "speaker": "spk_id"},
    ],
)
def test_a_table_becomes_a_manifest_and_its_audio_stays_where_it_is(folder, suffix, names):
    table = write(folder / f"train{suffix}", ROWS, names)
    save = folder / "out"
    assert prepare_tables({"": table}, save, noprogressbar=True) == {"train": 3}
    rows = read_manifest(save / "train.csv")
    assert [row.ID for row in rows] == ["clips-a", "clips-b c", "more-ö"]
    assert [row.wav for row in rows] == [f"$data_root/{row['path']}" for row in ROWS]
    assert [row.spk_id for row in rows] == [row["speaker"] for row in ROWS]
    assert [row.wrd for row in rows] == ["ONE TWO", 'SHE SAID "THREE"', "FOUR"]
    assert [row.duration for row in rows] == [0.1, 0.2, 0.3]
    assert {path.name for path in save.iterdir()} == {"train.csv", "librispeech_prepare.json"}


def test_a_table_may_have_ids_splits_and_paths_of_its_own(folder):
    rows = [dict(row, id=f"u{i}", split="dev" if i else "train") for i, row in enumerate(ROWS)]
    rows[0]["path"] = str(folder / rows[0]["path"])
    table = write(folder / "all.csv", [{k: r[k] for k in r if k != "speaker"} for r in rows])
    assert prepare_tables({"": table}, folder / "out", noprogressbar=True) == {"train": 1, "dev": 2}
    (row,) = read_manifest(folder / "out" / "train.csv")
    assert (row.ID, row.wav, row.spk_id) == ("u0", str(folder / "clips/a.wav"), "u0")
    named = prepare_tables({"dev": table}, folder / "named", noprogressbar=True)
    assert named == {"dev": 2}


def test_a_table_of_one_split_gives_no_rows_of_others(folder):
    splits = ("train", "test", "")
    rows = [dict(row, split=name) for row, name in zip(ROWS, splits, strict=True)]
    table = write(folder / "train.csv", rows)
    (part,) = read_table(table, "train")
    assert [u.id for u in part.utterances] == ["clips-a", "more-ö"]
    (part,) = read_table(table, "train-held-out")
    assert (part.name, len(part.utterances)) == ("train-held-out", 2)
    message = r"train.csv: its column of splits has train, test, and no dev\. Rename"
    with pytest.raises(ValueError, match=message):
        prepare_tables({"dev": table}, folder / "out", noprogressbar=True)
    assert not (folder / "out").exists()
    # Its own rows need not be called so.
    write(table, [dict(row, split=name) for row, name in zip(ROWS, ("", "test", ""), strict=True)])
    (part,) = read_table(table, "train")
    assert [u.id for u in part.utterances] == ["clips-a", "more-ö"]


def test_of_several_columns_of_one_kind_a_row_has_the_first_that_it_fills(folder):
    rows = [{"path": "clips/a.wav", "audio": "", "text": text, "wrd": "B"} for text in ("A", " ")]
    rows[1] |= {"path": "", "audio": "more/ö.ogg"}
    (part,) = read_table(write(folder / "t.csv", rows))
    assert [(u.path, u.words) for u in part.utterances] == [
        ("clips/a.wav", "A"),
        ("more/ö.ogg", "B"),
    ]


def test_accents_are_one_letter_however_the_table_writes_them(folder):
    text = unicodedata.normalize("NFD", "ÉTÉ")
    (part,) = read_table(write(folder / "t.csv", [dict(ROWS[0], text=text)]))
    assert [utterance.words for utterance in part.utterances] == ["ÉTÉ"]


def test_rows_of_json_may_have_other_keys_than_the_first(folder):
    rows = [
        {"path": "clips/a.wav", "text": "ONE", "speaker": None},
        {"audio": "clips/b c.flac", "sentence": "TWO", "speaker_id": "ben", "id": "b"},
        {"path": "more/ö.ogg", "text": "THREE", "speaker": "anna", "utt_id": 3},
    ]
    (part,) = read_table(write(folder / "t.jsonl", rows))
    found = [(u.id, u.speaker, u.path, u.words) for u in part.utterances]
    assert found == [
        ("clips-a", "clips-a", "clips/a.wav", "ONE"),
        ("b", "ben", "clips/b c.flac", "TWO"),
        ("3", "anna", "more/ö.ogg", "THREE"),
    ]
    assert part.has_speakers


def test_separators_of_spreadsheets_and_a_mark_at_the_beginning_are_read(folder):
    table = folder / "a.csv"
    table.write_bytes("\ufeffpath;text\r\nclips/a.wav;EINS, ZWEI\r\n".encode())
    (split,) = read_table(table)
    assert [(u.id, u.words) for u in split.utterances] == [("clips-a", "EINS, ZWEI")]


def test_a_manifest_is_made_again_when_table_audio_or_options_change(folder):
    table, save = write(folder / "train.csv", ROWS), folder / "out"

    def time_after(**options) -> int:
        prepare_tables({"train": table}, save, noprogressbar=True, **options)
        return (save / "train.csv").stat().st_ino

    first = time_after()
    assert time_after() == first
    os.utime(folder / "clips/a.wav", ns=(1, 1))
    second = time_after()
    assert second != first
    third = time_after(skip_bad=True)
    assert third != second
    fourth = time_after(skip_bad=True, verify=True)
    assert fourth != third
    assert time_after(skip_bad=True) == fourth
    # Of a version that did not look for samples that are not finite.
    record = save / "librispeech_prepare.json"
    entry = json.loads(record.read_text())
    entry["files"]["train.csv"]["made_from"]["options"][-1] = True
    record.write_text(json.dumps(entry))
    assert time_after(skip_bad=True) == fourth
    assert time_after(skip_bad=True, verify=True) != fourth


def test_what_cannot_be_used_is_named_and_may_be_left_out(folder):
    os.mkfifo(folder / "pipe.wav")
    (folder / "empty.wav").touch()
    rows = [
        *ROWS,
        *(
            dict(ROWS[0], path=name)
            for name in ("none.wav", "pipe.wav", "empty.wav", "", "a$x.wav")
        ),
        dict(ROWS[0], path="clips/silent.wav", text=" "),
        dict(ROWS[0], path="clips/costs.wav", text="PAY $FIVE"),
        dict(ROWS[0], path="clips/said.wav", speaker="$BEN"),
        dict(ROWS[0], path=""),
    ]
    soundfile.write(folder / "clips/silent.wav", np.zeros(1600), 16000)
    table, save = write(folder / "train.csv", rows), folder / "out"
    with pytest.raises(PreparationError, match="9 utterances") as raised:
        prepare_tables({"train": table}, save, noprogressbar=True)
    reasons = [problem.reason.split(":")[0] for problem in raised.value.problems]
    assert sorted(reasons) == [
        "empty file",
        "missing audio",
        "missing audio",
        "missing audio",
        "missing transcript",
        "not a regular file",
        "unusable name",
        "unusable name",
        "unusable transcript",
    ]
    assert not list(save.glob("*.csv"))
    assert prepare_tables({"train": table}, save, skip_bad=True, noprogressbar=True) == {"train": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,text\na,b\n", r"has the columns name, text, and none for path\. It may be called"),
        ("path,text\n", "has no rows"),
        ("", "has no rows"),
        ("path,text\na.wav,b,c\n", "line 2: not as many cells as columns"),
        ("path,text\nclips/a.wav,A\nclips/a.wav,B\n", "twice: clips-a. Give them a column id"),
        ("path,text\nnone.wav,A\n", "cannot be used"),
        ('path,text\na.wav,"A B\nb.wav,C\n', r"line 3: no row of a table"),
        ('path,text\na.wav,"A B\nb.wav,"C"\n', r"line 3: (no row|a cell has several lines)"),
        ('path,text\na.wav,"A B\nb.wav",C\n', r"line 3: (no row|not as many|a cell)"),
        ("path,text,text\nclips/a.wav,A,B\n", "t.csv has two columns text: rename or remove"),
        ("path,text,split\nclips/a.wav,A,../x\n", "cannot be the name of a split"),
    ],
)
def test_a_table_that_is_none_is_one_message(folder, text, message):
    (folder / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prepare_tables({"": folder / "t.csv"}, folder / "out", noprogressbar=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"[1]\n", "line 1: no object of JSON"),
        ("t.jsonl", b'{"path": "a", "text": "b", "offset": 3}', "has an offset"),
        ("t.csv", b"path,text\ncaf\xe9.wav,A\n", "is not UTF-8"),
        ("t.xlsx", b"PK", "is none of .csv"),
        ("t.csv", b'path,text\n"a\nb.wav",A\n', "line 3: a cell has several lines"),
    ],
)
def test_a_file_of_another_kind_is_one_message(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(folder / name)


def test_manifests_do_not_replace_their_table(folder):
    table = write(folder / "train.csv", ROWS)
    before = table.read_bytes()
    with pytest.raises(ValueError, match="is the table itself"):
        prepare_tables({"train": table}, folder)
    assert table.read_bytes() == before


def test_other_rates_are_refused_with_the_option_or_taken(folder):
    soundfile.write(folder / "clips/a.wav", np.zeros(2205), 22050)
    table = write(folder / "train.csv", ROWS)
    with pytest.raises(PreparationError, match=r"22050 Hz instead of 16000 Hz \(--resample True"):
        prepare_tables({"train": table}, folder / "out", noprogressbar=True)
    prepare_tables({"train": table}, folder / "out", resample=True, noprogressbar=True)
    assert read_manifest(folder / "out/train.csv")[0].duration == 0.1


def test_the_table_of_a_split_is_found(folder):
    table = write(folder / "dev.tsv", ROWS)
    assert find_table(folder, "dev") == table
    assert find_table(folder, "train") is None


def test_the_command_line_prepares_and_says_how_to_train(folder, capsys, monkeypatch):
    write(folder / "train.tsv", [dict(r, path=Path(r["path"]).name) for r in ROWS[:2]])
    monkeypatch.chdir(folder)
    arguments = ["table", "train.tsv", "--save_folder", "out", "--noprogressbar"]
    assert main(arguments) == 2
    assert "missing audio: no such file" in capsys.readouterr().err
    assert main([*arguments, "--audio_folder", "clips"]) == 0
    printed = capsys.readouterr().out
    assert "--skip_prep True --data_folder . --output_folder out" in printed
    assert "--train_splits '[train]' --dev_splits '[...]' --test_splits '[...]'" in printed
    rows = read_manifest(folder / "out" / "train.csv")
    # A manifest and its corpus can be moved.
    assert [row.wav for row in rows] == ["$data_root/clips/a.wav", "$data_root/clips/b c.flac"]
    assert main(["table", "train.tsv", *arguments[1:], "--split", "a"]) == 2
    assert "--split names one table" in capsys.readouterr().err


def test_tables_of_several_folders_are_one_corpus_without_a_save_folder(
    folder, capsys, monkeypatch
):
    write(folder / "train.csv", ROWS[:2])
    (folder / "held").mkdir()
    write(folder / "held" / "dev.csv", [{**ROWS[2], "path": "../more/ö.ogg"}])
    monkeypatch.chdir(folder)
    tables = ["train.csv", "held/dev.csv"]
    assert main(["table", *tables, "--resample", "--noprogressbar"]) == 0
    hint = capsys.readouterr().out
    assert "--resample True --data_folder . --output_folder results/train " in hint
    for name in ("train", "dev"):
        for row in read_manifest(folder / "results" / "train" / f"{name}.csv"):
            assert row.wav.startswith("$data_root/")
            assert os.path.isfile(row.wav.replace("$data_root", str(folder)))


def test_audio_outside_of_the_data_folder_has_absolute_paths(folder, monkeypatch):
    (folder / "tables").mkdir()
    write(folder / "tables" / "train.csv", ROWS)
    monkeypatch.chdir(folder / "tables")
    options = ["--audio_folder", "..", "--save_folder", "out", "--noprogressbar"]
    assert main(["table", "train.csv", *options]) == 0
    assert os.path.isfile(read_manifest(folder / "tables/out/train.csv")[0].wav)


def test_two_tables_of_one_split_are_refused_before_anything_is_written(folder, capsys):
    for name in ("x.csv", "y.csv"):
        write(folder / name, [dict(row, split="train") for row in ROWS])
    save = folder / "out"
    tables = [str(folder / "x.csv"), str(folder / "y.csv")]
    assert main(["table", *tables, "--save_folder", str(save), "--noprogressbar"]) == 2
    assert "x.csv has the split train, too" in capsys.readouterr().err
    assert not save.exists()


def test_a_line_of_json_may_hold_any_letter(folder):
    row = json.dumps(dict(ROWS[0], text="A\u2028B"), ensure_ascii=False)
    (folder / "t.jsonl").write_text(f"{row}\n", encoding="utf-8")
    (part,) = read_table(folder / "t.jsonl")
    assert [utterance.words for utterance in part.utterances] == ["A B"]


def test_a_rate_that_no_recording_has_is_refused(folder, capsys):
    table = str(write(folder / "train.csv", ROWS))
    options = ["--sample_rate", "0", "--resample", "--save_folder", str(folder / "out")]
    assert main(["table", table, *options]) == 2
    assert "sample_rate is 0" in capsys.readouterr().err


def test_every_kind_answers_help_without_torch():
    for arguments in (["--help"], ["table", "--help"]):
        code = (
            "import sys, corpora.prepare as p\n"
            "try:\n    p.main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "table" in done.stdout


class TestHeldOut:
    def tables(self, folder, rows=ROWS, **names):
        write(folder / "train.csv", rows, names)
        splits = ("train", "train-held-out")
        return {split: find_table(folder, split) for split in splits}

    def prepared(self, folder, speakers, tables):
        save = folder / "out"
        prepare_tables(tables, save, merge_lst=["train"], held_out_speakers=speakers)
        return [[row.spk_id for row in read_manifest(save / f"{name}.csv")] for name in tables]

    def test_speakers_are_a_split_of_their_own(self, folder):
        tables = self.tables(folder)
        assert tables["train-held-out"] == tables["train"]
        assert self.prepared(folder, ["ben, jr"], tables) == [["anna", "anna"], ["ben, jr"]]
        # Others another time: what was made for these is not current.
        assert self.prepared(folder, ["anna"], tables) == [["ben, jr"], ["anna", "anna"]]

    def test_a_table_of_that_name_is_a_split_like_others(self, folder):
        write(folder / "train-held-out.csv", ROWS[2:])
        tables = self.tables(folder)
        assert tables["train-held-out"].name == "train-held-out.csv"
        assert self.prepared(folder, [], tables) == [["anna", "ben, jr", "anna"], ["anna"]]

    def test_what_the_column_of_splits_calls_so_is_a_split_like_others(self, folder):
        names = ("train", "train-held-out", "train")
        rows = [dict(row, split=name) for row, name in zip(ROWS, names, strict=True)]
        table = write(folder / "all.csv", rows)
        made = prepare_tables({"": table}, folder / "out", noprogressbar=True)
        assert made == {"train": 2, "train-held-out": 1}
        named = prepare_tables({"train-held-out": table}, folder / "named", noprogressbar=True)
        assert named == {"train-held-out": 1}

    @pytest.mark.parametrize("together", [False, True])
    def test_a_lost_recording_of_theirs_is_said(self, folder, together):
        rows = [*ROWS, {**ROWS[1], "path": "clips/gone.wav"}]
        tables = self.tables(folder, rows)
        names = tables if together else ["train-held-out"]
        with pytest.raises(PreparationError, match=r"gone\.wav"):
            prepare_tables(
                {name: tables[name] for name in names},
                folder / "out",
                merge_lst=["train"] if together else [],
                held_out_speakers=["ben, jr"],
            )

    def test_scored_alone_a_split_may_lack_some_of_them(self, folder):
        tables = self.tables(folder)
        only = {"train-held-out": tables["train-held-out"]}
        prepare_tables(only, folder / "out", held_out_speakers=["anna", "of another table"])
        rows = read_manifest(folder / "out" / "train-held-out.csv")
        assert {row.spk_id for row in rows} == {"anna"}
        with pytest.raises(ValueError, match=r"names none of .*train-held-out would be empty"):
            prepare_tables(only, folder / "out", held_out_speakers=["of another table"])

    @pytest.mark.parametrize(
        ("speakers", "names", "message"),
        [
            ([7, "anna"], {}, "names 7, no speaker of the training splits; these have anna, ben"),
            (["anna", "ben, jr"], {}, "names every speaker of .*train.csv; train would be empty"),
            ([], {}, "train-held-out needs held_out_speakers"),
            (["anna"], {"speaker": "who"}, "needs a column of speakers, and .*train.csv has none"),
        ],
    )
    def test_what_cannot_be_is_said(self, folder, speakers, names, message):
        with pytest.raises(ValueError, match=message):
            self.prepared(folder, speakers, self.tables(folder, **names))
        assert not (folder / "out").exists()
