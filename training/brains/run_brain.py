"""The life of a run: stepping, skipping, stopping, resuming, checkpoints and logs."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
import yaml
from speechbrain.core import INTRA_EPOCH_CKPT_FLAG
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import if_main_process, is_distributed_initialized
from speechbrain.utils.epoch_loop import EpochCounterWithStopper
from speechbrain.utils.train_logger import TrainLogger
from torch import Tensor
from torch.utils.data import DataLoader

from common.errors import Interrupted, UserError
from training.brains.optimization import (
    clip_gradients,
    first_lr,
    parameter_groups,
    scale_gradients,
)
from training.checkpoints.checkpointer import load_model_hook
from training.launch.devices import peak_memory_gib
from training.launch.interrupts import StopRequest
from training.reporting.metrics_log import MetricsLog
from training.reporting.plots import plot_curves
from training.seeding import seed_everything

logger = logging.getLogger(__name__)


@register_checkpoint_hooks
class RunBrain(sb.Brain):
    """Training loop of any model: seeding, skipping, stopping, checkpoints and logs.

    Subclasses give ``compute_forward``, ``compute_objectives``, ``describe``, ``amount`` and
    ``validation_stats``, and set ``best_metric`` (key of ``validation_stats``), ``best_is`` ("min"
    or "max") and ``amount_unit``.
    """

    best_metric = "loss"
    best_is = "min"
    amount_unit = "batches"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop_request = StopRequest()
        self.epoch = 0
        self.rank = int(getattr(self, "rank", 0))
        self.metrics_log = MetricsLog(Path(self.hparams.output_folder) / "metrics.jsonl")
        self.loggers: list[TrainLogger] = [self.hparams.train_logger]
        self.resume_from: str | None = None
        self._void_window = False
        self._window_batches = 0
        self._train_loader: DataLoader | None = None
        self._amount = 0.0
        self._stage_started = 0.0
        self._train_stats: dict = {}
        self._train_steps = 0
        if self.checkpointer is not None:
            self.checkpointer.custom_load_hooks["model"] = load_model_hook

    def describe(self, batch) -> str:
        """Hook of the subclasses: what names a batch in a message."""
        raise NotImplementedError

    def amount(self, batch) -> float:
        """Hook of the subclasses: how much a batch holds, in ``amount_unit``."""
        raise NotImplementedError

    def score(self, outputs, batch, stage: sb.Stage) -> None:
        """Hook of the subclasses: what an evaluation measures beside the loss."""

    # -- one batch ------------------------------------------------------------------------------

    def fit_batch(self, batch) -> Tensor:
        """One forward and backward; all ranks agree before it on skipping and on stopping."""
        should_step = self._completes_window()
        self._window_batches += 1
        self.on_fit_batch_start(batch, should_step)
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            finite_here = bool(torch.isfinite(loss))
            finite, stop = self.agree(finite_here, self.stop_request.signal_number)
            if finite:
                self.scaler.scale(loss / self.grad_accumulation_factor).backward()
            else:
                ids = "that of another process" if finite_here else self.describe(batch)
                self._count_nonfinite("loss", ids)
                self._void_window = True
        if should_step:
            self._step_or_skip(batch)
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        loss = loss.detach().cpu()
        if stop and should_step:
            self.avg_train_loss = self.update_average(loss, self.avg_train_loss)
            self._save_intra_epoch_ckpt()
            raise Interrupted(stop)
        return loss

    def agree(self, finite: bool, signal_number: int) -> tuple[bool, int]:
        """Whether all ranks have ``finite``, and the signal that any of them got (0: none).

        A rank that skipped or stopped alone would leave the others waiting for it.
        """
        if not is_distributed_initialized():
            return finite, signal_number
        flags = torch.tensor([int(not finite), signal_number], device=self.device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        nonfinite, signal_number = flags.tolist()
        return not nonfinite, signal_number

    def _step_or_skip(self, batch) -> None:
        window_batches, self._window_batches = self._window_batches, 0
        if self._void_window:
            # The batches accumulated beside a non-finite one were not synchronised: drop them all.
            self._void_window = False
            self.zero_grad(set_to_none=True)
            return
        self.scaler.unscale_(self.optimizer)
        if window_batches < self.grad_accumulation_factor:
            # The last of an epoch: each loss was divided by the whole factor.
            scale_gradients(self.optimizer, self.grad_accumulation_factor / window_batches)
        norm = clip_gradients(self.optimizer, self.max_grad_norm)
        if not torch.isfinite(norm) and not self.scaler.is_enabled():
            self._count_nonfinite("gradient", self.describe(batch))
            self.zero_grad(set_to_none=True)
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_step += 1
        self.hparams.noam_scheduler(self.optimizer)

    def _count_nonfinite(self, what: str, items: str) -> None:
        self.nonfinite_count += 1
        if self.nonfinite_count > self.nonfinite_patience:
            raise UserError(
                f"The {what} was not finite {self.nonfinite_count} times in epoch {self.epoch} "
                f"(--nonfinite_patience {self.nonfinite_patience}). Last batch: {items}. "
                "Look at it, lower lr_adam, or use --precision fp32."
            )
        logger.warning("The %s is not finite; step skipped. Batch: %s", what, items)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Log the step."""
        del outputs
        self._amount += self.amount(batch)
        if should_step and self.optimizer_step % self.hparams.log_interval_steps == 0:
            values = {
                "step": self.optimizer_step,
                "epoch": self.epoch,
                "train_loss": float(loss.detach()),
                "lr": self.optimizer.param_groups[0]["lr"],
            }
            self._log_step(values)

    def _log_step(self, values: dict) -> None:
        if if_main_process():
            self.metrics_log.append(**values)

    @torch.no_grad()
    def evaluate_batch(self, batch, stage):
        """Forward, loss and scoring of one batch; honours a stop request."""
        if stage == sb.Stage.VALID:
            _, stop = self.agree(True, self.stop_request.signal_number)
            if stop:
                # The checkpoint says "epoch trained, not validated": resuming goes on from there.
                self.step, self.avg_train_loss = self._train_steps, self._train_stats["loss"]
                self._save_intra_epoch_ckpt()
                raise Interrupted(stop)
        elif self.stop_request.signal_number:
            raise Interrupted(self.stop_request.signal_number)
        with self.evaluation_ctx:
            outputs = self.compute_forward(batch, stage=stage)
            loss = self.compute_objectives(outputs, batch, stage=stage)
            self.score(outputs, batch, stage)
        return loss.detach().cpu()

    def unwrap_modules(self) -> None:
        """Drop the distributed wrappers, whose forward waits for the other ranks."""
        for name, module in self.modules.items():
            if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                self.modules[name] = module.module

    # -- stages ---------------------------------------------------------------------------------

    def on_stage_start(self, stage, epoch=None):
        """Seed the stage, reset what is measured in it."""
        self._stage_started = time.perf_counter()
        self._amount = 0.0
        if stage == sb.Stage.TRAIN:
            self.epoch = epoch
            self._void_window, self._window_batches = False, 0
            # Creating a loader's iterator draws from the main generator.
            seed_everything(self.hparams.seed, epoch, "loader", self.rank)

    def validation_stats(self, loss: float) -> dict[str, float]:
        """Figures of a validation."""
        return {"loss": loss}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log an epoch, save its checkpoint, decide on stopping early."""
        if stage == sb.Stage.TRAIN:
            seconds = max(time.perf_counter() - self._stage_started, 1e-9)
            self._train_stats = {
                "loss": stage_loss,
                f"{self.amount_unit}_per_s": self._amount / seconds,
                "peak_memory_gib": peak_memory_gib(self.device),
            }
            self._train_steps = self.step
            return
        if stage != sb.Stage.VALID:
            return
        stats = self.validation_stats(stage_loss)
        meta = {
            "epoch": epoch,
            "step": self.optimizer_step,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        for stats_logger in self.loggers:
            stats_logger.log_stats(meta, train_stats=self._train_stats, valid_stats=stats)
        if self.hparams.early_stop_patience:
            self.hparams.counter.update_metric(stats[self.best_metric])
        self.checkpointer.save_checkpoint(meta={"epoch": epoch, **stats})
        self.checkpointer.keep_best(
            self.hparams.avg_checkpoints, **{f"{self.best_is}_key": self.best_metric}
        )
        if if_main_process():
            self.metrics_log.append(
                step=self.optimizer_step,
                epoch=epoch,
                valid_loss=stats["loss"],
                **{k.lower(): v for k, v in stats.items() if k != "loss"},
            )
            plot_curves(
                self.metrics_log.path,
                Path(self.hparams.output_folder) / "curves.png",
                title=Path(self.hparams.output_folder).name,
            )

    # -- the run --------------------------------------------------------------------------------

    def init_optimizers(self):
        """One optimiser over two parameter groups, at the schedule's first learning rate."""
        groups = parameter_groups(self.modules)
        try:
            self.optimizer = self.opt_class(groups)
        except (TypeError, ValueError) as error:
            raise UserError(f"opt_class cannot be made with these values: {error}") from error
        self.optimizers_dict = {"opt_class": self.optimizer}
        for group in self.optimizer.param_groups:
            group["lr"] = first_lr(self.hparams.noam_scheduler)
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def on_fit_start(self):
        """Wrap, make the optimiser, go on from a checkpoint if there is one."""
        self._compile()
        self._wrap_distributed()
        self.init_optimizers()
        if self.checkpointer is None:
            return
        self.checkpointer.remove_unfinished()
        if self.resume_from is not None:
            checkpoint = self.checkpointer.go_back_to(self.resume_from)
        else:
            checkpoint = self.checkpointer.recover_if_possible()
        if checkpoint is not None:
            logger.info(
                "Going on from %s (optimiser step %d)", checkpoint.path, self.optimizer_step
            )
            if if_main_process():
                self.metrics_log.truncate_after(self.optimizer_step)
            self._judge_stopping_anew()

    def _judge_stopping_anew(self) -> None:
        """An early stop is undone where ``early_stop_patience`` is longer now, or 0."""
        patience, counter = self.hparams.early_stop_patience, self.hparams.counter
        if isinstance(counter, EpochCounterWithStopper):
            without_gain = counter.current - counter.best_limit
            counter.should_stop &= bool(patience) and without_gain >= patience

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Nothing: the weights to evaluate are loaded by ``training.evaluation.average_best``."""

    def fit(self, *args, **kwargs):
        """As SpeechBrain's, with SIGINT and SIGTERM caught.

        Raises:
            Interrupted: a signal came; the checkpoint is saved.
        """
        with self.stop_request:
            super().fit(*args, **kwargs)

    def make_dataloader(self, dataset, stage, ckpt_prefix=None, **loader_kwargs):
        """As SpeechBrain's, whose record of the position would be a count of batches."""
        del ckpt_prefix
        loader = super().make_dataloader(dataset, stage, ckpt_prefix=None, **loader_kwargs)
        if stage == sb.Stage.TRAIN:
            self._train_loader = loader
        return loader

    def _train_loader_specifics(self, dataset, loader_kwargs):
        # EpochBatches shares the batches out among the processes.
        return loader_kwargs

    def is_last_batch(self) -> bool:
        """Whether the batch in work is the last one of the epoch."""
        return self.step == len(self._train_loader)

    def _completes_window(self) -> bool:
        """Whether gradients are applied after this batch; the rest of an epoch is not dropped."""
        return self.step % self.grad_accumulation_factor == 0 or self.is_last_batch()

    def position(self) -> Any:
        """What of the epoch has been trained on, as a JSON value: here the utterances' ids."""
        return {"seen": self.train_sampler.seen(self.step)}

    def go_on_from(self, position: Any) -> bool:
        """Enter an epoch where a checkpoint's ``position`` says, if that is possible now."""
        if not isinstance(position, dict) or "seen" not in position:
            return False
        self.train_sampler.go_on(self.step, position["seen"])
        return True

    @mark_as_saver
    def _save(self, path):
        progress = {
            "step": self.step,
            "avg_train_loss": float(self.avg_train_loss),
            "optimizer_step": self.optimizer_step,
        }
        if self.step:
            progress["position"] = self.position()
        with open(path, "w", encoding="utf-8") as stream:
            json.dump(progress, stream)

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        del end_of_epoch
        text = Path(path).read_text(encoding="utf-8")
        # YAML once, which takes minutes to read where there are many ids.
        progress = json.loads(text) if text.startswith("{") else yaml.safe_load(text)
        self.step, self.avg_train_loss = progress["step"], progress["avg_train_loss"]
        self.optimizer_step = progress["optimizer_step"]
        if self.step and not self.go_on_from(progress.get("position")):
            logger.warning(
                "The interrupted epoch begins again: what it has been trained on cannot be told "
                "from the checkpoint, or its batches are others now."
            )
            self.step, self.avg_train_loss = 0, 0.0

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        due = super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)
        # Gradients accumulated so far are not in a checkpoint: wait for the optimiser step.
        return due and self._completes_window()

    def _save_intra_epoch_ckpt(self):
        self.checkpointer.save_checkpoint(end_of_epoch=False, meta={INTRA_EPOCH_CKPT_FLAG: True})
        self.checkpointer.keep_best(
            self.hparams.avg_checkpoints, **{f"{self.best_is}_key": self.best_metric}
        )
