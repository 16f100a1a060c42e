"""Train a token language model on text and report its perplexity.

python train_LM.py hparams/LM/transformer_small.yaml --train_text text.txt.gz --valid_text dev.txt
torchrun --nproc-per-node=4 train_LM.py hparams/LM/transformer_large.yaml --train_text text.gz ...
"""

from collections.abc import Sequence

from training.launch.command_line import check_arguments, run_script

if __name__ == "__main__":
    # Help and mistakes are answered before torch is imported, which takes seconds.
    check_arguments(__doc__)

from training.lm.recipe import run_lm_recipe


def main(argv: Sequence[str]) -> None:
    """Run the recipe with these command-line arguments."""
    run_lm_recipe(argv, __doc__)


if __name__ == "__main__":
    run_script(main)
