"""A record of what files were made from, whatever state it is in."""

import json

import pytest

from common.record import PreparationRecord


@pytest.fixture
def recorded(tmp_path):
    (tmp_path / "a.csv").write_text("content")
    PreparationRecord(tmp_path, "record.json").add("a.csv", {"data": 1}, note=7)
    return tmp_path


def test_a_file_is_current_as_long_as_nothing_has_changed(recorded):
    record = PreparationRecord(recorded, "record.json")
    assert record.is_current("a.csv", {"data": 1})
    assert record.note("a.csv", "note") == 7
    assert not record.is_current("a.csv", {"data": 2})
    (recorded / "a.csv").write_text("other content")
    assert not record.is_current("a.csv", {"data": 1})


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"format": 1},
        {"format": 1, "files": []},
        {"format": 1, "files": {"a.csv": None}},
        {"format": 1, "files": {"a.csv": [1, 2]}},
        {"format": 1, "files": {"a.csv": {"made_from": {"data": 1}}}},
        {"format": 1, "files": {"a.csv": {"made_from": {"data": 1}, "sha256": 5, "notes": {}}}},
        {"format": 1, "files": {"a.csv": {"made_from": {"data": 1}, "sha256": "", "notes": None}}},
    ],
    ids=json.dumps,
)
def test_a_damaged_record_only_means_that_the_files_are_made_again(recorded, content):
    (recorded / "record.json").write_text(json.dumps(content))
    record = PreparationRecord(recorded, "record.json")
    assert not record.is_current("a.csv", {"data": 1})
    assert record.note("a.csv", "note", "none") == "none"
    record.add("a.csv", {"data": 1})
    assert PreparationRecord(recorded, "record.json").is_current("a.csv", {"data": 1})
