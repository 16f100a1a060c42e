"""A run whose checkpoints are chosen on speakers of its own training split."""

import pytest

from common.errors import UserError
from corpora.manifest import read_manifest
from tests.generated_corpus import make_corpus
from training.data.preparation import prepare_manifests
from training.launch.settings import check_setting


@pytest.mark.parametrize("value", [[], [90015, 7], ["0019"]])
def test_speakers_are_a_list_of_numbers_or_names(value):
    check_setting("held_out_speakers", value, "--")


@pytest.mark.parametrize("value", [90015, "90015", [1.5], None])
def test_anything_else_is_refused(value):
    with pytest.raises(UserError, match=r"held_out_speakers is .*a list of speakers"):
        check_setting("held_out_speakers", value, "--")


@pytest.mark.parametrize("as_tables", [False, True])
def test_an_evaluation_of_other_splits_parts_none(tmp_path, as_tables):
    corpus = make_corpus(tmp_path / "corpus", {"train-clean-100": 2, "dev-clean": 2})
    if as_tables:
        for split in ("train-clean-100", "dev-clean"):
            lines = (corpus / split).rglob("*.trans.txt")
            said = [line.split(" ", 1) for path in lines for line in path.read_text().splitlines()]
            rows = [
                f"{next(corpus.rglob(f'{name}.flac'))},{words},{name[:3]}" for name, words in said
            ]
            (tmp_path / f"{split}.csv").write_text("\n".join(["path,text,speaker", *rows]) + "\n")
    hparams = {
        "data_folder": tmp_path if as_tables else corpus,
        "output_folder": tmp_path / "run",
        "train_splits": ["train-clean-100"],
        "dev_splits": ["train-clean-100-held-out"],
        "test_splits": ["dev-clean"],
        "held_out_speakers": [101],
        "sample_rate": 16000,
        "resample": False,
        "skip_bad": False,
        "skip_prep": False,
        "noprogressbar": True,
    }
    prepare_manifests(hparams, tmp_path / "evaluation", test_only=True)
    assert len(read_manifest(tmp_path / "evaluation" / "dev-clean.csv")) == 2
    # The only speaker cannot be held out of a training.
    with pytest.raises(UserError, match="names every speaker"):
        prepare_manifests(hparams, tmp_path / "training", test_only=False)
