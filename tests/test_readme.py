"""Every command that the README shows is run here, shortened to a tiny corpus."""

import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from corpora import download
from librispeech_prepare import main as prepare
from tests.corpora.test_download import Server, archive

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

SHORT = [
    *("--train_splits", "[train-clean-100]"),
    *("--number_of_epochs", "1"),
    *("--max_batch_length_train", "8"),
    *("--optimizer_step_limit", "1"),
    *("--grad_accumulation_factor", "1"),
    *("--num_workers", "0"),
    *("--num_encoder_layers", "1"),
    *("--d_model", "32"),
    *("--token_type", "char"),
    *("--output_neurons", "31"),
    *("--test_beam_size", "2"),
    *("--device", "cpu"),
    "--noprogressbar",
]


def commands(text: str) -> list[str]:
    """Command lines of the fenced blocks, continuation lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").split("  #")[0].strip(" &") for line in lines]
    lines = [re.sub(r"^.*(?:\| |srun )(?=python|torchrun)", "", line) for line in lines]
    return [line for line in lines if re.match(r"(python|torchrun|make)\s", line)]


def run(arguments: list[str]) -> str:
    result = subprocess.run(
        arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


README_COMMANDS = commands(README)
TRAINING = [line for line in README_COMMANDS if "train_" in line]


def test_every_readme_command_is_known_here():
    known = re.compile(
        r"make (demo|test)$|python (librispeech_prepare|transcribe).py |.*train_(CTC|S2S).py "
    )
    assert README_COMMANDS
    assert [line for line in README_COMMANDS if not known.match(line)] == []


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(
            line,
            marks=[] if "/conmamba_small.yaml" in line else [pytest.mark.slow],
            id=line.split("hparams/")[1].split()[0],
        )
        for line in TRAINING
    ],
)
def test_training_commands_of_the_readme_train_and_evaluate(line, tone_corpus, tmp_path):
    words = shlex.split(line)
    words[words.index("--data_folder") + 1] = str(tone_corpus)
    if words[0] == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [*torchrun, "--nproc-per-node=2", *words[2:]]
    else:
        words[0] = sys.executable
    run([*words, "--output_folder", str(tmp_path / "run"), *SHORT])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["splits"]) == {"test-clean", "test-other"}


def test_the_demo_runs_at_its_smallest_size(tmp_path):
    pytest.importorskip("espeakng_loader", reason="needs pip install -e '.[demo]'")
    output = run(
        [sys.executable, "-m", "tools.demo", "--size", "tiny", "--output_folder", str(tmp_path)]
    )
    assert "test-other" in output
    assert (tmp_path / "curves.png").is_file()
    assert f"\n$ python transcribe.py {tmp_path} {tmp_path / 'corpus'}" in output
    tail = output[output.index("To try next:") :]
    suggested = [line.strip() for line in tail.splitlines()[1:9]]
    assert [line.startswith("#") for line in suggested] == [True, False] * 4
    for line in suggested[1::2]:
        # Typed where make demo was typed, in a shell that knows of no environment.
        assert (REPOSITORY / line.split()[0]).is_file()


def test_make_knows_the_targets_of_the_readme():
    for line in README_COMMANDS:
        if line.startswith("make "):
            assert "is up to date" not in run(["make", "--dry-run", line.split()[1]])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    missing = [t for t in linked if "://" not in t and not (document.parent / t).exists()]
    scripts = {word for line in commands(text) for word in shlex.split(line)}
    scripts = {w for w in scripts if re.fullmatch(r"[\w/]+\.(py|yaml)", w)}
    missing += [name for name in scripts if not (REPOSITORY / name).is_file()]
    assert missing == []


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def test_the_download_command_of_the_readme_fetches_every_split(server, tmp_path, monkeypatch):
    (line,) = [line for line in README_COMMANDS if "librispeech_prepare.py" in line]
    splits = shlex.split(line)[shlex.split(line).index("--download") + 1 :]
    for number, split in enumerate(splits):
        server.files[f"/{split}.tar.gz"] = archived_split(split, speaker=100 + number)
        digest = hashlib.md5(server.files[f"/{split}.tar.gz"]).hexdigest()
        monkeypatch.setitem(download.ARCHIVE_MD5, split, digest)
    words = shlex.split(line)
    words[words.index("--data_folder") + 1] = str(tmp_path)
    assert prepare([*words[2:], "--download_url", server.url, "--noprogressbar"]) in (None, 0)
    audio = sorted(path.parts[-4] for path in (tmp_path / "LibriSpeech").rglob("*.flac"))
    assert audio == sorted(splits)


def archived_split(split: str, speaker: int) -> bytes:
    """An archive of one utterance as openslr.org packs it."""
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(1600, dtype=np.float32), 16000, format="FLAC")
    folder = f"LibriSpeech/{split}/{speaker}/1"
    return archive(
        {
            f"{folder}/{speaker}-1-0000.flac": sound.getvalue(),
            f"{folder}/{speaker}-1.trans.txt": f"{speaker}-1-0000 ONE\n".encode(),
        }
    )
