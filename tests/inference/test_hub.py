"""Push and pull, with a folder in the place of the hub."""

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from speechbrain.utils.fetching import FetchConfig

from common.errors import UserError
from inference import Recognizer, hub
from inference.bundle import main, read_bundle
from inference.speechbrain_interface import BundleDecoder, BundleEncoder, BundlePretrainer
from tests.inference.runs import make_run


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Path:
    """The hub: a folder for each repository; and its cache, in which a revision is links."""
    folder = tmp_path / "hub"

    def create_repo(api, repo_id, private=None, exist_ok=False):
        validate_repo_id(repo_id)
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(api, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
        repository = folder / repo_id
        for path in list(repository.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        for path in Path(folder_path).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, repository / path.name)

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        validate_repo_id(repo_id)
        repository = folder / repo_id
        if not repository.is_dir() or revision not in (None, "main"):
            raise LocalEntryNotFoundError("offline")
        cache = tmp_path / "cache" / f"models--{repo_id.replace('/', '--')}"
        snapshot = cache / "snapshots" / "0a1b2c"
        shutil.rmtree(cache, ignore_errors=True)
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        for i, path in enumerate(sorted(repository.iterdir())):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, cache / "blobs" / str(i))
                (snapshot / path.name).symlink_to(f"../../blobs/{i}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return folder


def test_what_is_pushed_is_pulled(ctc_run, tmp_path, remote, capsys, recognizers, waveforms):
    assert main([str(ctc_run), str(tmp_path / "b"), "--push", "me/model"]) == 0
    assert "https://hub/me/model" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "b")
    (remote / "me" / "model" / "virus.py").write_text("raise SystemExit")
    for revision in (None, "main"):
        pulled = Recognizer.from_pretrained("me/model", revision=revision, device="cpu")
        assert pulled.transcribe_batch(waveforms) == recognizers["ctc"].transcribe_batch(waveforms)
    assert not list((tmp_path / "cache").rglob("virus.py"))


def test_an_earlier_bundle_leaves_nothing_behind(bundle, remote):
    (remote / "me" / "model").mkdir(parents=True)
    for name in ("lm.safetensors", "notes.txt"):
        (remote / "me" / "model" / name).write_text("old")
    (bundle / "private.txt").write_text("x")
    hub.push(bundle, "me/model")
    names = {path.name for path in (remote / "me" / "model").iterdir()}
    assert names == {path.name for path in bundle.iterdir()} - {"private.txt"} | {"notes.txt"}


def test_a_damaged_bundle_is_not_pushed(bundle, remote):
    (bundle / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model is missing"):
        hub.push(bundle, "me/model")
    assert not remote.exists()


@pytest.mark.parametrize("name", ["nobody/nothing", "no such name!", "../up", "a/b/c"])
def test_what_is_not_there_is_one_error(name, remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="could not be downloaded from the hub"):
        Recognizer.from_pretrained(name)


def test_a_name_that_the_hub_refuses_is_one_error(tmp_path, remote, capsys):
    run = make_run(tmp_path / "run", "CTC/demo")
    assert main([str(run), str(tmp_path / "b"), "--push", "a/b/c"]) == 2
    assert "'a/b/c' could not be uploaded" in capsys.readouterr().err
    read_bundle(tmp_path / "b")


def test_a_repository_that_links_elsewhere_is_refused(bundle, remote, tmp_path, monkeypatch):
    hub.push(bundle, "me/model")
    whole = hub.snapshot_download

    def snapshot_download(*arguments, **options):
        snapshot = Path(whole(*arguments, **options))
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(bundle / "config.json")
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"config\.json is a link"):
        hub.pull("me/model")


def test_speechbrains_pretrainer_pulls_the_same_files(bundle, remote):
    hub.push(bundle, "me/model")
    encoder, decoder = BundleEncoder(), BundleDecoder()
    tokenizer = sentencepiece.SentencePieceProcessor()
    pretrainer = BundlePretrainer(encoder, decoder, tokenizer)
    pretrainer.collect_files("me/model", fetch_config=FetchConfig(revision="main"))
    pretrainer.load_collected()
    theirs = read_bundle(bundle)
    torch.testing.assert_close(
        encoder.encoder.CNN.state_dict(), theirs.encoder.CNN.state_dict(), rtol=0, atol=0
    )
    assert tokenizer.encode("ONE") == theirs.tokenizer.encode("ONE")


def test_a_folder_goes_before_the_hub(bundle, ctc_run, remote):
    for folder in (bundle, ctc_run):
        assert Recognizer.from_pretrained(folder, device="cpu").sample_rate == 16000
