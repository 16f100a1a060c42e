"""How fast a recipe trains from audio files to new weights, beside its encoder alone.

    python -m benchmarks.bench_train hparams/CTC/an4.yaml --data_folder an4/LibriSpeech
    python -m benchmarks.bench_train hparams/CTC/conmamba_small.yaml --utterances 5000 \
        --device cuda --num_workers 8 --max_batch_length_train 900

All other arguments go to the recipe. With ``--utterances`` the corpus is made up: noise, every
recording of ``--utterance_s``. After ``--warmup`` batches the clock runs over ``--steps`` of them,
data loading included. Then the encoder trains on random frames in batches of the same shapes, in
which nothing is loaded, augmented or aligned: what the recipe could reach at best.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import soundfile
import speechbrain as sb
import torch

import train_CTC
import train_S2S
from training.brains.asr_brain import ASRBrain, FrontEndOutput
from training.recipe import run_recipe

SAMPLE_RATE = 16000
DIFFERENT_RECORDINGS = 32
LETTERS_PER_S = 12


class Measured(Exception):
    """The clock of this Brain has stopped."""


class TimedBrain(ASRBrain):
    """A recipe's Brain that stops after so many batches; mixed in before it."""

    warmup = 0
    steps = 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = 0
        self.audio_s = 0.0
        self.started = self.seconds = 0.0
        self.shapes: list[tuple[torch.Size, torch.Tensor]] = []

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()

    def fit_batch(self, batch):
        """As the recipe's, inside the window of the clock."""
        if self.batches == self.warmup + self.steps:
            self.stop()
            raise Measured(self)
        if self.batches == self.warmup:
            self.go_on()
        self.batches += 1
        if self.batches > self.warmup:
            self.audio_s += self.amount(batch)
        return super().fit_batch(batch)

    def go_on(self) -> None:
        """Let the clock run."""
        self.wait()
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        self.wait()
        self.seconds += time.perf_counter() - self.started

    def on_stage_start(self, stage, epoch=None):
        """The clock stands still in a validation."""
        super().on_stage_start(stage, epoch)
        if stage == sb.Stage.TRAIN and self.batches > self.warmup:
            self.go_on()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """The clock stands still in a validation."""
        if stage == sb.Stage.TRAIN and self.batches > self.warmup:
            self.stop()
        super().on_stage_end(stage, stage_loss, epoch)

    def front_end(self, batch, stage: sb.Stage) -> FrontEndOutput:
        """As the recipe's; what the encoder gets is noted."""
        output = super().front_end(batch, stage)
        if self.batches > self.warmup:
            self.shapes.append((output.frames_BTFC.shape, output.num_frames_B))
        return output

    def encoder_seconds(self) -> float:
        """Seconds that the encoder alone takes to train on what it got."""
        network, inner_layers = self.modules.Transformer, self.inner_layers(sb.Stage.TRAIN)
        optimizer = self.opt_class(network.parameters())

        def train(number: int, shape: torch.Size, num_frames_B: torch.Tensor) -> None:
            cast = nullcontext() if self.cast_weights is None else self.cast_weights.in_place()
            with self.training_ctx, cast:
                frames_BTFC = torch.randn(shape, device=self.device)
                # As the recipe calls it: a captured encoder knows its inner layers.
                encoded, _ = network(
                    frames_BTFC, None, num_frames_B, intermediate_layers=inner_layers
                )
                encoder_BTD = encoded[0] if inner_layers else encoded
                loss = encoder_BTD.float().square().mean()
            self.scaler.scale(loss).backward()
            if number % self.grad_accumulation_factor == 0:
                self.scaler.step(optimizer)
                self.scaler.update()
                optimizer.zero_grad()

        for number, shape in enumerate(self.shapes[:3], start=1):
            train(number, *shape)
        self.wait()
        started = time.perf_counter()
        for number, shape in enumerate(self.shapes, start=1):
            train(number, *shape)
        self.wait()
        return time.perf_counter() - started


def make_corpus(folder: Path, utterances: int, utterance_s: float) -> Path:
    """Noise in LibriSpeech layout under ``folder``, with words of random letters."""
    chance, rng = random.Random(0), np.random.default_rng(0)
    samples = int(utterance_s * SAMPLE_RATE)
    for speaker, (split, count) in enumerate(
        {"train-clean-100": utterances, "dev-clean": 2}.items()
    ):
        chapter = folder / split / str(speaker) / "1"
        chapter.mkdir(parents=True)
        lines = []
        for number in range(count):
            name = f"{speaker}-1-{number:06d}"
            path = chapter / f"{name}.flac"
            if number < DIFFERENT_RECORDINGS:
                soundfile.write(path, 0.05 * rng.standard_normal(samples), SAMPLE_RATE)
            else:
                first = chapter / f"{speaker}-1-{number % DIFFERENT_RECORDINGS:06d}.flac"
                os.link(first, path)
            letters = int(LETTERS_PER_S * utterance_s)
            text = "".join(chance.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ ", k=letters))
            lines.append(f"{name} {' '.join(text.split()) or 'A'}\n")
        (chapter / f"{speaker}-1.trans.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def recipe_of(yaml_file: str) -> tuple[type[ASRBrain], Callable]:
    """The Brain of a YAML file, and what prepares its searches."""
    script = train_S2S if "S2S" in Path(yaml_file).parts else train_CTC
    return script.ASR, script.prepare_searches


def measure(arguments: argparse.Namespace, rest: list[str], folder: Path) -> TimedBrain:
    """Trains until the clock has stopped."""
    brain_class, prepare_searches = recipe_of(arguments.yaml)
    window = {"warmup": arguments.warmup, "steps": arguments.steps}
    timed = type("TimedASR", (TimedBrain, brain_class), window)
    if arguments.utterances:
        corpus = make_corpus(folder / "corpus", arguments.utterances, arguments.utterance_s)
        rest += ["--data_folder", str(corpus), "--train_splits", "[train-clean-100]"]
        rest += ["--dev_splits", "[dev-clean]", "--held_out_speakers", "[]"]
    argv = [arguments.yaml, *rest, "--output_folder", str(folder / "run"), "--noprogressbar"]
    try:
        run_recipe([*argv, "--test_splits", "[]"], timed, __doc__, prepare_searches)
    except Measured as stopped:
        return stopped.args[0]
    sys.exit(f"The run ended before batch {arguments.warmup + arguments.steps}: lower --steps.")


def main() -> None:
    """Parse the command line, train and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("yaml", help="the recipe")
    parser.add_argument("--warmup", type=int, default=20, help="batches before the clock runs")
    parser.add_argument("--steps", type=int, default=50, help="batches that are timed")
    parser.add_argument("--utterances", type=int, help="make up a corpus of so many")
    parser.add_argument("--utterance_s", type=float, default=16, help="seconds of each of them")
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        brain = measure(arguments, rest, Path(folder))
        entries = brain.metrics_log.read()
        encoder_s = brain.encoder_seconds()
    rate, encoder_rate = brain.audio_s / brain.seconds, brain.audio_s / encoder_s
    print(
        f"{arguments.yaml}: {rate:.0f} seconds of audio trained on per second over "
        f"{arguments.steps} batches of {brain.audio_s / arguments.steps:.0f} s; its encoder alone "
        f"{encoder_rate:.0f}; {rate / encoder_rate:.0%} of it",
        flush=True,
    )
    if entries:
        print(f"{arguments.yaml}: last line of the log: {entries[-1]}")


if __name__ == "__main__":
    main()
