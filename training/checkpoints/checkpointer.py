"""Checkpoints that a crash, a full disk or a flipped bit cannot turn into a wrong model."""

import glob
import json
import logging
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from speechbrain.utils.checkpoints import (
    CKPT_PREFIX,
    METAFNAME,
    Checkpoint,
    Checkpointer,
    average_checkpoints,
    ckpt_recency,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_barrier, ddp_broadcast, if_main_process
from speechbrain.utils.epoch_loop import EpochCounterWithStopper

from common.errors import WRITER_FAILED, UserError, in_words
from modules.weights import load_model_weights

logger = logging.getLogger(__name__)

# SpeechBrain marks the hooks of this class and forgets to register them. Those of its parent would
# save the epoch alone: a resumed run would forget its best score and that it had stopped.
register_checkpoint_hooks(EpochCounterWithStopper)

EMA = "ema"
"""Recoverable of the averaged weights, where a run has them: it is they that it evaluates."""

CHECKSUMS = "checksums.json"
UNFINISHED_PREFIX = "unfinished+"
DAMAGED_PREFIX = "damaged+"
SUPERSEDED_PREFIX = "superseded+"

_ATTEMPTS = 5

Result = TypeVar("Result")


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes, read in pieces."""
    checksum = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_checksums(folder: Path) -> None:
    """Record size and CRC-32 of every file in ``folder``."""
    files = {p.name: [p.stat().st_size, crc32(p)] for p in sorted(folder.iterdir()) if p.is_file()}
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as stream:
        json.dump(files, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None when every file is as it was written."""
    record = folder / CHECKSUMS
    if not record.is_file():
        return f"{CHECKSUMS} is missing"
    try:
        files = [
            (name, size, checksum)
            for name, (size, checksum) in json.loads(record.read_text(encoding="utf-8")).items()
        ]
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    for name, size, checksum in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
        if crc32(path) != checksum:
            return f"{name} has changed since it was written"
    return None


def _has_meta(folder: Path) -> bool:
    """Whether the meta file of a checkpoint folder can be read."""
    try:
        meta = yaml.safe_load((folder / METAFNAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(meta, dict) and {"unixtime", "end-of-epoch"} <= meta.keys()


def _set_aside(folder: Path, prefix: str) -> None:
    """Rename a checkpoint, so that it is neither found nor counted among the best again."""
    # A run may be evaluated from a folder that cannot be written.
    with suppress(OSError):
        os.replace(folder, folder.with_name(prefix + folder.name))


class RunCheckpointer(Checkpointer):
    """SpeechBrain's checkpointer, made atomic.

    A checkpoint is written under a temporary name, its sizes and checksums are recorded, and only
    then does it get the name under which it is found. A damaged one is reported and passed over.
    The folder is made with the first: a start that fails leaves none.

    Attributes:
        only_reads: leave damaged checkpoints where they are: a training may be at work beside.
    """

    only_reads = False

    def __init__(
        self,
        checkpoints_dir: str | Path,
        recoverables: Mapping[str, Any] | None = None,
        custom_load_hooks: Mapping[str, Callable] | None = None,
        custom_save_hooks: Mapping[str, Callable] | None = None,
        allow_partial_load: bool = False,
    ):
        # The parent makes the folder that it is given.
        super().__init__(
            *(Path.cwd(), recoverables, custom_load_hooks, custom_save_hooks, allow_partial_load)
        )
        self.checkpoints_dir = Path(checkpoints_dir)

    def _new_checkpoint_dirpath(self):
        return self._unfinished(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._unfinished(super()._custom_checkpoint_dirpath(name))

    def _list_checkpoint_dirs(self):
        # Ranking reads every meta file: one that is damaged must not stop the search.
        return [folder for folder in self._all_checkpoint_dirs() if _has_meta(folder)]

    def _all_checkpoint_dirs(self):
        return super()._list_checkpoint_dirs() if self.checkpoints_dir.is_dir() else []

    def find_checkpoints(
        self,
        importance_key=None,
        max_key=None,
        min_key=None,
        ckpt_predicate=None,
        max_num_checkpoints=None,
    ):
        """As in the parent; a checkpoint whose metric is not finite is none of the best."""
        metric = max_key or min_key

        def is_eligible(checkpoint: Checkpoint) -> bool:
            if metric and not math.isfinite(checkpoint.meta[metric]):
                return False
            return ckpt_predicate is None or ckpt_predicate(checkpoint)

        return super().find_checkpoints(
            importance_key, max_key, min_key, is_eligible, max_num_checkpoints
        )

    @staticmethod
    def _unfinished(path: Path) -> Path:
        return path.with_name(f"{UNFINISHED_PREFIX}{uuid.uuid4().hex[:8]}+{path.name}")

    def save_checkpoint(self, meta=None, end_of_epoch=True, name=None, verbosity=logging.DEBUG):
        """Save, verify, rename.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        try:
            self.checkpoints_dir.mkdir(parents=True, exist_ok=True)
            unfinished = super().save_checkpoint(meta or {}, end_of_epoch, name, verbosity)
            ddp_barrier()
            checkpoint = None
            if if_main_process():
                write_checksums(unfinished.path)
                final = unfinished.path.with_name(unfinished.path.name.split("+", 2)[2])
                if final.exists():
                    shutil.rmtree(final)
                os.replace(unfinished.path, final)
                paramfiles = {key: final / path.name for key, path in unfinished.paramfiles.items()}
                checkpoint = Checkpoint(final, unfinished.meta, paramfiles)
            ddp_barrier()
            return checkpoint
        except (OSError, RuntimeError) as error:
            self.remove_unfinished()
            if isinstance(error, OSError) or any(sign in str(error) for sign in WRITER_FAILED):
                reason = in_words(error).splitlines()[0]
                raise UserError(
                    f"No checkpoint could be written to {self.checkpoints_dir}: {reason}. Is the "
                    "disk full? Earlier checkpoints are whole: make room and repeat the command to "
                    "go on."
                ) from error
            raise

    def remove_unfinished(self) -> None:
        """Delete what saves that were cut short have left behind."""
        if if_main_process():
            for folder in self.checkpoints_dir.glob(f"{UNFINISHED_PREFIX}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def find_intact(self, **criteria) -> list[Checkpoint]:
        """Checkpoints as ``find_checkpoints`` ranks them; damaged ones are reported and renamed."""
        intact = None
        if if_main_process():
            intact = []
            for folder in self._all_checkpoint_dirs():
                if not _has_meta(folder):
                    self._dismiss(folder, f"{METAFNAME} cannot be read")
            limit = criteria.pop("max_num_checkpoints", None)
            for checkpoint in self.find_checkpoints(**criteria):
                damage = find_damage(checkpoint.path)
                if damage:
                    self._dismiss(checkpoint.path, damage)
                    continue
                intact.append(checkpoint)
                if len(intact) == limit:
                    break
        return ddp_broadcast(intact)

    def of_best(
        self, read: Callable[[Sequence[Checkpoint]], Result], num_best: int, **key: str
    ) -> Result | None:
        """What is made of the best checkpoints; None where there is no whole one.

        They are looked for again where a training beside has replaced one of them in the meantime.

        Args:
            read: makes it.
            key: ``min_key`` or ``max_key``, as of ``find_checkpoints``.

        Raises:
            UserError: they belong to another architecture.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            best = self.find_intact(max_num_checkpoints=num_best, **key)
            if not best:
                return None
            try:
                for checkpoint in best:
                    # A clear message before averaging meets tensors of different shapes.
                    load_model_weights(self.recoverables["model"], checkpoint.paramfiles["model"])
                return read(best)
            except (OSError, UserError):
                if attempt == _ATTEMPTS or all(c.path.is_dir() for c in best):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _dismiss(self, folder: Path, damage: str) -> None:
        logger.warning("Checkpoint %s is damaged (%s) and not used.", folder, damage)
        if not self.only_reads:
            _set_aside(folder, DAMAGED_PREFIX)

    def _delete_checkpoint(self, checkpoint, verbosity=logging.INFO):
        # Who reads beside the training meets it whole or not at all.
        vanishing = self._unfinished(checkpoint.path)
        os.replace(checkpoint.path, vanishing)
        shutil.rmtree(vanishing)
        logger.log(verbosity, "Deleted checkpoint %s", checkpoint.path)

    def recover_if_possible(
        self, importance_key=None, max_key=None, min_key=None, ckpt_predicate=None
    ):
        """Load the best (default: the latest) checkpoint that is whole.

        Raises:
            UserError: checkpoints exist and every one of them is damaged.
        """
        found = self.find_intact(
            importance_key=importance_key,
            max_key=max_key,
            min_key=min_key,
            ckpt_predicate=ckpt_predicate,
            max_num_checkpoints=1,
        )
        if not found:
            damaged = self.checkpoints_dir.glob(f"{DAMAGED_PREFIX}*")
            if any(damaged) or self._all_checkpoint_dirs():
                raise UserError(
                    f"Every checkpoint in {self.checkpoints_dir} is damaged. "
                    "Remove the folder to train anew."
                )
            return None
        self.load_checkpoint(found[0])
        return found[0]

    def check_architecture(self) -> None:
        """Try the latest checkpoint's weights, before anything of an existing run is overwritten.

        Raises:
            UserError: they belong to another architecture.
        """
        for checkpoint in self.find_checkpoints():
            # Damage is reported when the run recovers, which has a log to report it to.
            if find_damage(checkpoint.path) is None:
                load_model_weights(self.recoverables["model"], checkpoint.paramfiles["model"])
                return

    def keep_best(self, num_best: int, *, min_key=None, max_key=None) -> None:
        """Delete all but the ``num_best`` best and the two latest checkpoints.

        Two, so that a run whose latest is damaged loses no more than one interval.
        """
        ddp_barrier()
        # A folder can be renamed once: by one of the processes.
        if if_main_process():
            keep = self.find_checkpoints(importance_key=ckpt_recency, max_num_checkpoints=2)
            if min_key or max_key:
                keep += self.find_checkpoints(
                    min_key=min_key, max_key=max_key, max_num_checkpoints=num_best
                )
            kept_paths = {checkpoint.path for checkpoint in keep}
            for checkpoint in self.list_checkpoints():
                if checkpoint.path not in kept_paths:
                    self._delete_checkpoint(checkpoint, verbosity=logging.DEBUG)
        ddp_barrier()

    def go_back_to(self, folder: str) -> Checkpoint:
        """Load the checkpoint that is asked for; later ones of this run are renamed.

        They belong to a course of training that is left: they must not be averaged with what
        follows. Where the checkpoint is another run's, so do all of this run.

        Raises:
            UserError: see :meth:`checkpoint_at`.
        """
        checkpoint = self.checkpoint_at(folder)
        self.load_checkpoint(checkpoint)
        ddp_barrier()
        if if_main_process():
            is_own = checkpoint.path.resolve().parent == self.checkpoints_dir.resolve()
            for other in self.list_checkpoints():
                if not is_own or ckpt_recency(other) > ckpt_recency(checkpoint):
                    _set_aside(other.path, SUPERSEDED_PREFIX)
        ddp_barrier()
        return checkpoint

    def checkpoint_at(self, place: str) -> Checkpoint:
        """The newest checkpoint in a place that is whole.

        Args:
            place: a checkpoint folder, a save folder, a run's folder, or a pattern of any of these.

        Raises:
            UserError: there is none, or all are damaged.
        """
        matches = [place] if Path(place).exists() else glob.glob(place)
        found = {path for match in matches for path in _checkpoints_in(match)}
        described = {
            path: find_damage(path) if _has_meta(path) else f"{METAFNAME} cannot be read"
            for path in sorted(found)
            if self._is_checkpoint_dir(path)
        }
        if whole := [path for path, damage in described.items() if damage is None]:
            return max(self._construct_checkpoint_objects(whole), key=ckpt_recency)
        if described:
            reasons = "; ".join(f"{path.name}: {damage}" for path, damage in described.items())
            raise UserError(f"--resume: the checkpoint {place} is damaged: {reasons}.")
        raise UserError(
            f"--resume: {place} is no checkpoint folder and holds none. They are called "
            f"{CKPT_PREFIX}+... and lie in the save folder of a run."
        )


def _checkpoints_in(place: str) -> list[Path]:
    """A checkpoint folder itself, or those of a save folder or of a run."""
    path = Path(place)
    if path.name.startswith(CKPT_PREFIX) and path.is_dir():
        return [path]
    return [p for f in (path, path / "save") for p in f.glob(f"{CKPT_PREFIX}+*") if p.is_dir()]


def mean_weights(evaluated: Sequence[Checkpoint]) -> dict[str, torch.Tensor]:
    """The mean of the weights with which these checkpoints were validated."""
    models = [
        Checkpoint(c.path, c.meta, {"model": c.paramfiles.get(EMA, c.paramfiles["model"])})
        for c in evaluated
    ]
    return average_checkpoints(models, "model")


def load_model_hook(module: torch.nn.Module, path: Path, end_of_epoch: bool) -> None:
    """Checkpointer hook with a readable error for another architecture."""
    del end_of_epoch
    load_model_weights(module, Path(path))
