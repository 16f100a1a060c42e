"""What a small program on top takes: audio, a search and texts come without torch."""

import subprocess
import sys
from pathlib import Path

import soundfile

from benchmarks.random_model import TEXT
from tests.inference.recordings import SAMPLE_RATE, tone
from text.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = """
import sys
import numpy as np
from decoding.ctc_beam_search import CTCBeamSearch, ctc_greedy
from inference import AudioError, Transcript, Word
from inference.audio import load_audio
from inference.formats import FORMATS
from inference.long_audio import cut_at_pauses
from inference.sources import find_sources
from inference.words import Placed, words_of
from text.tokenizer import load_tokenizer, vocabulary

sources, problems = find_sources([sys.argv[1]])
wav_S = load_audio(sources[0].audio, 16000)
assert len(cut_at_pauses(wav_S, 16000)) == 1
tokenizer = load_tokenizer(sys.argv[2], 31)
tokens = tokenizer.encode("ONE TWO")
log_probs_TV = np.full((2 * len(tokens), 31), -20.0, np.float32)
log_probs_TV[::2, 0] = 0.0
log_probs_TV[np.arange(1, len(log_probs_TV), 2), tokens] = 0.0
pieces = vocabulary(tokenizer)
hypothesis = CTCBeamSearch(pieces)(log_probs_TV[None])[0][0]
assert [token.id for token in ctc_greedy(log_probs_TV)] == tokens
placed = [Placed(pieces[t.id], *t[1:]) for t in hypothesis.tokens]
words, _ = words_of(hypothesis.text.split(), placed, 0.04, 1.0)
print(FORMATS["txt"](Transcript(hypothesis.text, words, duration_s=1.0), "a"), end="")
assert not {"torch", "speechbrain"} & sys.modules.keys()
"""


def test_audio_search_and_texts_need_no_torch(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), SAMPLE_RATE)
    model = tmp_path / "tokenizer.model"
    train_tokenizer(TEXT, model, token_type="char", output_neurons=31)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "a.wav"), str(model)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("ONE TWO\n", 0), done.stderr
