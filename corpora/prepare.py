"""Manifests from corpora that are not in LibriSpeech's layout.

python -m corpora.prepare table recordings.csv --save_folder results/my_run
python -m corpora.prepare table train.tsv dev.tsv --audio_folder clips --resample --save_folder out
"""

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.errors import EXIT_USER_ERROR, in_words
from corpora.librispeech import SAMPLE_RATE, TABLE_SUFFIXES
from corpora.table import COLUMNS, prepare_tables, read_table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m corpora.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    columns = "\n".join(f"  {key:8} {', '.join(names)}" for key, names in COLUMNS.items())
    table = kinds.add_parser(
        "table",
        help="a table of recordings with what is said in them",
        description="Tables of recordings to manifests <split>.csv; no audio is copied.",
        epilog=f"Columns, of which path and text have to be there:\n{columns}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = table.add_argument
    add("tables", nargs="+", metavar="FILE", help=f"a table: {', '.join(TABLE_SUFFIXES)}")
    add(
        "--save_folder",
        metavar="FOLDER",
        help="gets the manifests (default: results/ and the name of the first table)",
    )
    add(
        "--split",
        metavar="NAME",
        help="the one split to take; all of a table without a column split is called so "
        "(default: every split of that column, else the name of the file)",
    )
    add(
        "--audio_folder",
        metavar="FOLDER",
        help="what the paths are relative to (default: the folder of the table)",
    )
    add("--sample_rate", type=int, default=SAMPLE_RATE, metavar="HZ", help="default: %(default)s")
    add("--resample", action="store_true", help="take other rates: training resamples them")
    add("--skip_bad", action="store_true", help="leave unusable utterances out, do not fail")
    add("--verify", action="store_true", help="decode every file whole: also finds cut audio")
    add("--num_workers", type=int, metavar="N", help="threads that read audio")
    add("--noprogressbar", action="store_true", help="no progress bars")
    return parser


def _check_splits(tables: Sequence[Path]) -> None:
    """Raises a ValueError where two tables have one split: no manifest is written then."""
    owners: dict[str, Path] = {}
    for table in tables:
        for part in read_table(table):
            if part.name in owners:
                raise ValueError(f"{table}: {owners[part.name]} has the split {part.name}, too.")
            owners[part.name] = table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = vars(build_parser().parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.pop("kind")
    tables, split = [Path(table) for table in options.pop("tables")], options.pop("split")
    save_folder = options.pop("save_folder") or f"results/{tables[0].stem}"
    audio_folder = options.pop("audio_folder")
    try:
        if split and len(tables) > 1:
            raise ValueError("--split names one table: prepare one after the other.")
        counts: dict[str, int] = {}
        if len(tables) > 1:
            _check_splits(tables)
        # A run has one data folder, that of the first table.
        root = tables[0].parent
        for table in tables:
            made = prepare_tables(
                {split or "": table},
                save_folder,
                audio_folder=_below(root, audio_folder or table.parent),
                root=root,
                **options,
            )
            counts |= made
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    rates = " --resample True" if options["resample"] else ""
    if options["sample_rate"] != SAMPLE_RATE:
        rates += f" --sample_rate {options['sample_rate']}"
    print(
        "\nTo train on them:\n  python train_CTC.py hparams/CTC/conmamba_small.yaml "
        f"--skip_prep True{rates} --data_folder {shlex.quote(str(tables[0].parent))} "
        f"--output_folder {shlex.quote(save_folder)} \\\n"
        f"    --train_splits {_named(counts, 'train')} --dev_splits {_named(counts, 'dev', 'val')} "
        f"--test_splits {_named(counts, 'test')}"
        f"   # of {', '.join(counts)}"
    )
    return 0


def _below(root: Path, folder: str | Path) -> str:
    """A folder as seen from the root, so that both can be moved; absolute if it lies elsewhere."""
    inside = os.path.relpath(folder, root)
    if inside.split(os.sep)[0] == os.pardir:
        return str(Path(folder).absolute())
    return "" if inside == os.curdir else inside


def _named(splits: Iterable[str], *beginnings: str) -> str:
    """The splits that are called so, as a value for the command line; dots where there is none."""
    names = [x for x in splits if x.startswith(beginnings) and re.fullmatch(r"[\w.-]+", x)]
    return f"'[{', '.join(names) or '...'}]'"


if __name__ == "__main__":
    sys.exit(main())
