"""What the pages show in Python works."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

from inference.formats import FORMATS, MAX_LINE_CHARACTERS
from transcribe import build_parser

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "inference.md").read_text(encoding="utf-8")


def test_the_first_lines_of_python_run(tiny_bundle, tone_corpus, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    first, options, _ = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    audio = next((tone_corpus / "test-clean").rglob("*.flac"))
    names = {}
    for code in (first, options):
        code = code.replace("results/demo", str(tiny_bundle)).replace("speech.mp3", str(audio))
        exec(code.replace("ANNA BELL", "SIX"), names)
    text, alternatives = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\S.* \[\('\w+', \d+\.\d+, \d\.\d+\).*\]", text)
    assert alternatives.count("'") == 6


def test_the_server_answers(tiny_bundle, tone_corpus):
    code = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[-1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = code.replace("my_model", str(tiny_bundle)).replace("8765", str(port))
    audio = next((tone_corpus / "test-clean").rglob("*.flac"))
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    def answer(body):
        deadline_s = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", body) as response:
                    return response.status, response.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except urllib.error.URLError:
                # It is still loading the model.
                assert server.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.1)

    try:
        status, body = answer(audio.read_bytes())
        assert (status, json.loads(body)["file"]) == (200, "upload")
        assert json.loads(body)["duration_s"] > 0
        status, body = answer(b"no audio")
        assert status == 400
        assert body.startswith("audio: cannot be read")
    finally:
        server.kill()
        server.wait()


def test_every_format_and_option_is_described():
    for name in FORMATS:
        assert f"`{name}`" in TEXT
    options = {option for action in build_parser()._actions for option in action.option_strings}
    for option in options - {"-h", "--help"}:
        assert f"`{option}" in TEXT, option
    assert f"at most {MAX_LINE_CHARACTERS} characters" in TEXT


def test_the_evaluation_in_python_gives_the_score_of_the_run(tiny_run, tone_corpus, capsys):
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = code.replace("results/demo/corpus", str(tone_corpus))
    exec(code.replace("results/demo", str(tiny_run)), {})
    score = json.loads((tiny_run / "results.json").read_text())["splits"]["test-clean"]
    assert capsys.readouterr().out == f"WER {score['wer']:.2f} %\n"
