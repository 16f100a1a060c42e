"""TensorBoard and Weights & Biases, as far as a run asks for them."""

import uuid
from collections.abc import Mapping
from pathlib import Path

from speechbrain.utils.distributed import ddp_barrier, if_main_process, main_process_only
from speechbrain.utils.train_logger import (
    FileTrainLogger,
    TensorboardLogger,
    TrainLogger,
    WandBLogger,
)

from common.errors import UserError
from common.files import atomic_write


class ReadableTrainLogger(FileTrainLogger):
    """SpeechBrain's ``train_log.txt`` with numbers as they are read: 100.00, not 1.00e+02."""

    PERCENT = ("WER", "CER", "ACC")

    def _item_to_string(self, key, value, dataset=None):
        if isinstance(value, float) and (
            key in self.PERCENT or value == 0 or 0.1 <= abs(value) < 1e5
        ):
            value = f"{value:.{self.precision}f}"
        return super()._item_to_string(key, value, dataset)


class EpochTensorboardLogger(TensorboardLogger):
    """SpeechBrain's logger with the epoch as the step, so that a resumed run's curve goes on."""

    @main_process_only
    def log_stats(
        self, stats_meta, train_stats=None, valid_stats=None, test_stats=None, verbose=False
    ):
        """Scalars ``<name>/<stage>`` at the epoch; those of a test split without one."""
        tagged = dict(stats_meta)
        epoch = tagged.pop("epoch", None)
        test_tag = tagged.pop("split", "test")
        for tag, stats in (("train", train_stats), ("valid", valid_stats), (test_tag, test_stats)):
            tagged |= {f"{name}/{tag}": value for name, value in (stats or {}).items()}
        for name, value in tagged.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()


class RunWandBLogger(WandBLogger):
    """SpeechBrain's logger; test splits go to the run's summary, where one number belongs."""

    @main_process_only
    def log_stats(
        self, stats_meta, train_stats=None, valid_stats=None, test_stats=None, verbose=False
    ):
        """One point per epoch, one summary entry per test split."""
        if "split" in stats_meta:
            self.run.summary.update({stats_meta["split"]: test_stats})
            return
        super().log_stats(stats_meta, train_stats, valid_stats, test_stats, verbose)


def run_id(folder: Path) -> str:
    """An id of this folder's own: the same run after an interruption, and nobody else's."""
    path = folder / "wandb_id"
    if not path.is_file() and if_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            stream.write(uuid.uuid4().hex[:12])
    ddp_barrier()
    return path.read_text(encoding="utf-8")


def make_loggers(hparams: Mapping) -> list[TrainLogger]:
    """The loggers that ``use_tensorboard`` and ``use_wandb`` ask for.

    Raises:
        UserError: the package is not installed, or Weights & Biases does not take the run.
    """
    loggers: list[TrainLogger] = []
    folder = Path(hparams["output_folder"])
    if hparams["use_tensorboard"]:
        try:
            loggers.append(EpochTensorboardLogger(str(folder / "tensorboard")))
        except ImportError:
            raise UserError(
                "--use_tensorboard True needs: pip install -e '.[tensorboard]'"
            ) from None
    if hparams["use_wandb"]:
        try:
            import wandb
        except ImportError:
            raise UserError("--use_wandb True needs: pip install -e '.[wandb]'") from None
        plain = {k: v for k, v in hparams.items() if isinstance(v, (int, float, str, list, dict))}
        try:
            loggers.append(
                RunWandBLogger(
                    wandb.init,
                    entity=hparams["wandb_entity"],
                    project=hparams["wandb_project"],
                    name="-".join(folder.parts[-2:]),
                    id=run_id(folder),
                    resume="allow",
                    dir=str(folder),
                    config=plain,
                )
            )
        except (wandb.errors.Error, TypeError) as error:
            # SpeechBrain calls the error that it means to raise.
            reason = error.__context__ if isinstance(error, TypeError) else error
            if not isinstance(reason, wandb.errors.Error):
                raise
            raise UserError(
                f"--use_wandb True: {str(reason).strip().splitlines()[0]} Log in once with "
                "`wandb login`, or set WANDB_MODE=offline to keep the figures here."
            ) from None
    return loggers
