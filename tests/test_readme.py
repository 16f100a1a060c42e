"""Every command that the README shows is run here, shortened to a tiny corpus."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
    lines = [line.removeprefix("$ ").split("  #")[0].strip() for line in lines]
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
    known = re.compile(r"make (demo|test)$|python librispeech_prepare.py |.*train_(CTC|S2S).py ")
    assert README_COMMANDS
    assert [line for line in README_COMMANDS if not known.match(line)] == []


@pytest.mark.parametrize("line", TRAINING, ids=lambda line: line.split("hparams/")[1].split()[0])
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
    tail = output[output.index("To try next:") :]
    assert len([line for line in tail.splitlines() if line.strip().startswith("python")]) == 3


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
