"""Which run a logger writes to."""

from training.reporting.loggers import run_id


def test_a_folder_keeps_its_id_and_another_gets_another(tmp_path):
    first = run_id(tmp_path / "a" / "3402")
    assert run_id(tmp_path / "a" / "3402") == first
    assert run_id(tmp_path / "b" / "3402") != first
