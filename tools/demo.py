"""A recogniser from nothing: synthetic corpus, training, scores, what to try next.

python -m tools.demo               # 15 minutes on 2 CPU cores
python -m tools.demo --size tiny   # half a minute; shows the steps, learns nothing
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from inference.scoring.reports import SplitScore, read_hypotheses, read_results, results_table

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_OVERRIDES = ["--number_of_epochs", "1", "--num_workers", "0", "--test_beam_size", "4"]
TINY_OVERRIDES += ["--num_encoder_layers", "2"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_folder", default="results/demo", help="default: %(default)s")
    parser.add_argument("--size", choices=["demo", "tiny"], default="demo", help="default: demo")
    return parser


def run(command: list[str]) -> None:
    """Run a command of this repository, showing it first; end with its status if it fails."""
    print(f"\n$ {shlex.join(['python', *command])}", flush=True)
    status = subprocess.run([sys.executable, *command], cwd=REPOSITORY).returncode
    if status:
        sys.exit(status)


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    output = Path(arguments.output_folder)
    corpus = output / "corpus"
    run(["-m", "tools.make_demo_corpus", "--folder", str(corpus), "--size", arguments.size])
    train = ["train_CTC.py", "hparams/CTC/demo.yaml", "--data_folder", str(corpus)]
    train += ["--output_folder", str(output)]
    run(train + (TINY_OVERRIDES if arguments.size == "tiny" else []))

    folder = REPOSITORY / output
    splits = {
        name: SplitScore.from_json(entry) for name, entry in read_results(folder)["splits"].items()
    }
    parameters = json.loads((folder / "results.json").read_text())["model"]["parameters"]
    utterances = read_hypotheses(folder / "hyp_test-clean.tsv")
    utterance_id, (reference, _) = max(utterances.items(), key=lambda u: len(u[1][0]))
    (audio,) = (REPOSITORY / corpus).rglob(f"{utterance_id}.*")
    print(f"\nConMamba CTC, {parameters / 1e6:.1f} M parameters, speakers it never heard:\n")
    print(results_table(splits))
    print(f"\nLearning curves:   {output / 'curves.png'}")
    print(f"Where it errs:     {output / 'errors_test-other.txt'}")
    print(f"\nWhat is said in {audio.name}: {' '.join(reference)}")
    run(["transcribe.py", str(output), str(corpus / audio.relative_to(REPOSITORY / corpus))])
    print("\nTo try next:")
    for comment, command in (
        ("a recording of your own", f"transcribe.py {output} RECORDING"),
        ("how sure these figures are", f"-m training.compare {output}"),
        (
            "a larger ConMamba on LibriSpeech",
            "train_CTC.py hparams/CTC/conmamba_small.yaml --data_folder /path/to/LibriSpeech",
        ),
        (
            "a Conformer on the same data",
            f"train_CTC.py hparams/CTC/demo.yaml --encoder_module conformer --data_folder {corpus} "
            f"--output_folder {output}_conformer",
        ),
    ):
        print(f"  # {comment}\n  {interpreter()} {command}")


def interpreter() -> str:
    """How to call this Python from the repository: ``.venv/bin/python`` after make."""
    path = Path(sys.executable)
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


if __name__ == "__main__":
    main()
