"""The life of a run: stepping, skipping, stopping, resuming, checkpoints and logs."""

import json
import logging
import math
import random
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import speechbrain as sb
import torch
import yaml
from speechbrain.core import INTRA_EPOCH_CKPT_FLAG, AMPConfig
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import if_main_process, is_distributed_initialized
from speechbrain.utils.epoch_loop import EpochCounterWithStopper
from speechbrain.utils.train_logger import FileTrainLogger, TrainLogger
from torch import Tensor
from torch.utils.data import DataLoader

from common.errors import Interrupted, UserError
from modules.layer_stack import LayerStack
from training.brains.cast_weights import CastWeights
from training.brains.optimization import (
    clip_gradients,
    first_lr,
    parameter_groups,
    scale_gradients,
)
from training.brains.weight_average import WeightAverage
from training.checkpoints.checkpointer import EMA, load_model_hook
from training.data.epoch_batches import EpochBatches
from training.launch.devices import (
    computes_bf16,
    explained_memory,
    gpu_use_percent,
    memory_gib,
    peak_memory_gib,
)
from training.launch.interrupts import StopRequest
from training.reporting.loggers import ReadableTrainLogger
from training.reporting.metrics_log import MetricsLog
from training.reporting.plots import plot_curves, run_title
from training.reporting.step_clock import StepClock
from training.seeding import derive_seed, seed_everything

logger = logging.getLogger(__name__)

_ANOTHER_PROCESS = "that of another process"


@dataclass
class UnreadBatch:
    """What the host has not seen yet of a batch.

    Attributes:
        step: number of the batch in its epoch.
        loss: on the device.
        items: what the batch holds, for a message.
        norm: of the gradient, where it was applied after this batch.
    """

    step: int
    loss: Tensor
    items: str
    norm: Tensor | None


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
    memory_keys: tuple[str, ...] = ("batch_size",)
    memory_keys_of_evaluation: tuple[str, ...] = ("batch_size",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop_request = StopRequest()
        self.epoch = 0
        self.rank = int(getattr(self, "rank", 0))
        self.metrics_log = MetricsLog(Path(self.hparams.output_folder) / "metrics.jsonl")
        own = self.hparams.train_logger
        if type(own) is FileTrainLogger:
            own = ReadableTrainLogger(own.save_file, own.precision)
        self.loggers: list[TrainLogger] = [own]
        self.resume_from: str | None = None
        self.weight_average: WeightAverage | None = None
        self._void_window = False
        # Whether a loss of the window that is being read was counted as not finite.
        self._told_window = False
        self._window_batches = 0
        self._ended_before = self._begins_again = False
        self._train_loader: DataLoader | None = None
        self._saved_at = 0
        self._amount = 0.0
        self._stage_started = 0.0
        self._train_stats: dict = {}
        self._train_steps = 0
        self.clock = StepClock(self.device)
        self.reads_late = False
        self.cast_weights: CastWeights | None = None
        self._unread: list[UnreadBatch] = []
        self._last_loss = self._last_norm = math.nan
        self._epoch_seconds: dict[str, float] = defaultdict(float)
        self._gpu_use: list[float] = []
        self._search_s = 0.0
        if self.checkpointer is not None:
            self.checkpointer.custom_load_hooks["model"] = load_model_hook

    def describe(self, batch) -> str:
        """Hook of the subclasses: what names a batch in a message."""
        raise NotImplementedError

    def amount(self, batch) -> float:
        """Hook of the subclasses: how much a batch holds, in ``amount_unit``."""
        raise NotImplementedError

    def describe_size(self, batch) -> str:
        """What a message says of a batch that did not fit into memory."""
        return f"{self.amount(batch):.0f} {self.amount_unit}"

    def score(self, outputs, batch, stage: sb.Stage) -> None:
        """Hook of the subclasses: what an evaluation measures beside the loss."""

    # -- one batch ------------------------------------------------------------------------------

    def fit_batch(self, batch) -> Tensor:
        """One forward and backward, and where it completes a window an optimiser step."""
        should_step = self._completes_window()
        self._window_batches += 1
        self.clock.end_of("data")
        self.on_fit_batch_start(batch, should_step)
        fit = self._fit_unread if self.reads_late else self._fit_read
        with explained_memory(self.memory_keys, self.describe_size, batch):
            outputs, loss, stop = fit(batch, should_step)
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        self.clock.start()
        if stop and should_step:
            self._save_intra_epoch_ckpt()
            raise Interrupted(stop)
        return loss.detach()

    def _fit_read(self, batch, should_step: bool) -> tuple[Any, Tensor, int]:
        """All ranks agree before the backward on skipping and on stopping: the host sees the loss.

        Returns:
            outputs, loss, and the signal that asks for an end (0: none).
        """
        with self.no_sync(not should_step):
            outputs, loss = self._forward(batch)
            finite_here = bool(torch.isfinite(loss))
            finite, stop = self.agree(finite_here, self.stop_request.signal_number)
            if finite:
                self.scaler.scale(loss / self.grad_accumulation_factor).backward()
            else:
                ids = _ANOTHER_PROCESS if finite_here else self.describe(batch)
                self._count_nonfinite("loss", ids)
                self._void_window = True
        self.clock.end_of("backward")
        self._unread.append(UnreadBatch(self.step, loss.detach(), "", None))
        if should_step:
            self._step_or_skip(batch)
        self.clock.end_of("optimizer")
        self.read_losses()
        return outputs, loss, stop

    def _fit_unread(self, batch, should_step: bool) -> tuple[Any, Tensor, int]:
        """The same without waiting for the device: the losses are read every few steps.

        A loss that is not finite makes all gradients so, on every rank, and the device itself
        leaves out the optimiser step. The schedule counts such a step.
        """
        with self.no_sync(not should_step):
            outputs, loss = self._forward(batch)
            poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            self.scaler.scale(loss * poison / self.grad_accumulation_factor).backward()
        self.clock.end_of("backward")
        norm = self._step_on_device() if should_step else None
        self.clock.end_of("optimizer")
        self._unread.append(UnreadBatch(self.step, loss.detach(), self.describe(batch), norm))
        last = self.is_last_batch()
        if should_step and (last or self.optimizer_step % self.hparams.log_interval_steps == 0):
            self.read_losses()
        elif is_distributed_initialized() or not should_step:
            # The others are asked where everybody reads.
            return outputs, loss, 0
        return outputs, loss, self.agree(True, self.stop_request.signal_number)[1]

    def _forward(self, batch) -> tuple[Any, Tensor]:
        cast = nullcontext() if self.cast_weights is None else self.cast_weights.in_place()
        with self.training_ctx, cast:
            outputs = self.compute_forward(batch, sb.Stage.TRAIN)
            loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
        self.clock.end_of("forward")
        return outputs, loss

    def read_losses(self) -> None:
        """Wait for what the device has to do, and note what came out of it."""
        if not self._unread:
            return
        nothing = self._unread[0].loss.new_zeros(())
        rows = [
            # In float32, since MPS has nothing wider.
            torch.stack([one.loss.float(), (nothing if one.norm is None else one.norm).float()])
            for one in self._unread
        ]
        values = torch.stack(rows)
        finite = values[:, :1].isfinite().float()
        if self.reads_late and is_distributed_initialized():
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        read = torch.cat([values, finite], dim=1).tolist()
        for one, (loss, norm, finite_everywhere) in zip(self._unread, read, strict=True):
            if math.isfinite(loss):
                self.avg_train_loss -= self.avg_train_loss / one.step
                self.avg_train_loss += loss / one.step
            if self.reads_late and not finite_everywhere:
                another = math.isfinite(loss)
                self._count_nonfinite("loss", _ANOTHER_PROCESS if another else one.items)
                self._told_window = True
            elif (
                self.reads_late
                and not math.isfinite(norm)
                and not self.scaler.is_enabled()
                # Else it follows from the loss.
                and not self._told_window
            ):
                self._count_nonfinite("gradient", one.items)
            self._last_loss = loss
            if one.norm is not None:
                self._last_norm, self._told_window = norm, False
        self._unread.clear()

    def update_average(self, loss, avg_loss):
        """As SpeechBrain's; in training ``read_losses`` has done it."""
        if self.modules.training:
            return self.avg_train_loss
        return super().update_average(loss, avg_loss)

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
        if self._void_window:
            # The batches accumulated beside a non-finite one were not synchronised: drop them all.
            self._void_window, self._window_batches = False, 0
            self.zero_grad(set_to_none=True)
            return
        norm = self._clipped()
        if not torch.isfinite(norm) and not self.scaler.is_enabled():
            self._count_nonfinite("gradient", self.describe(batch))
            self.zero_grad(set_to_none=True)
            return
        self._unread[-1].norm = norm
        self._apply_gradients()

    def _step_on_device(self) -> Tensor:
        """An optimiser step that the device leaves out where the gradient is not finite."""
        norm = self._clipped()
        if not self.scaler.is_enabled():
            # What a scaler of fp16 tells a fused optimiser.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~norm.isfinite()).float()
        self._apply_gradients()
        return norm

    def _clipped(self) -> Tensor:
        """Clip the gradients of a window; returns their norm before."""
        window_batches, self._window_batches = self._window_batches, 0
        self.scaler.unscale_(self.optimizer)
        if window_batches < self.grad_accumulation_factor:
            # The last of an epoch: each loss was divided by the whole factor.
            scale_gradients(self.optimizer, self.grad_accumulation_factor / window_batches)
        return clip_gradients(self.optimizer, self.max_grad_norm)

    def _apply_gradients(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_step += 1
        if self.weight_average is not None:
            self.weight_average.update(self.optimizer_step)
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
        del outputs, loss
        self._amount += self.amount(batch)
        if should_step and self.optimizer_step % self.hparams.log_interval_steps == 0:
            use_percent = gpu_use_percent(self.device)
            if use_percent is not None:
                self._gpu_use.append(use_percent)
            values = {
                "step": self.optimizer_step,
                "epoch": self.epoch,
                "train_loss": self._last_loss,
                "lr": self.optimizer.param_groups[0]["lr"],
                "grad_norm": self._last_norm,
                **self._read_clock(),
                "memory_gib": memory_gib(self.device),
                "gpu_use_percent": use_percent,
            }
            self._log_step({key: value for key, value in values.items() if value is not None})

    def _read_clock(self) -> dict[str, float]:
        """Seconds of the steps since the last line of the log, by part of the work."""
        seconds = self.clock.read()
        for part, value in seconds.items():
            self._epoch_seconds[part] += value
        return {f"{part}_s": round(value, 4) for part, value in seconds.items()}

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
                self._evaluates_average(False)
                self.step, self.avg_train_loss = self._train_steps, self._train_stats["loss"]
                self._save_intra_epoch_ckpt()
                raise Interrupted(stop)
        elif self.stop_request.signal_number:
            raise Interrupted(self.stop_request.signal_number, "evaluation stopped")
        with (
            explained_memory(self.memory_keys_of_evaluation, self.describe_size, batch),
            self.evaluation_ctx,
        ):
            outputs = self.compute_forward(batch, stage=stage)
            loss = self.compute_objectives(outputs, batch, stage=stage).detach().cpu()
            started = time.perf_counter()
            self.score(outputs, batch, stage)
            self._search_s += time.perf_counter() - started
        return loss

    def unwrap_modules(self) -> None:
        """Drop the distributed wrappers, whose forward waits for the other ranks."""
        for name, module in self.modules.items():
            if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                self.modules[name] = module.module

    # -- stages ---------------------------------------------------------------------------------

    def seed_step(self) -> None:
        """Seed what a step draws: its own in each process, but the layers that it leaves out."""
        seed_everything(self.hparams.seed, self.epoch, self.step, self.rank)
        for stack in self._dropping_layers():
            stack.layer_draw = random.Random(
                derive_seed(self.hparams.seed, self.epoch, self.step, "layers")
            )

    def _dropping_layers(self) -> list[LayerStack]:
        parts = self.hparams.model.modules()
        return [part for part in parts if isinstance(part, LayerStack) and part.layerdrop_prob]

    def on_stage_start(self, stage, epoch=None):
        """Seed the stage, reset what is measured in it."""
        self._stage_started = time.perf_counter()
        self._amount, self._search_s = 0.0, 0.0
        if stage == sb.Stage.TRAIN:
            self.epoch = epoch
            self._saved_at = self.optimizer_step
            self._epoch_seconds.clear()
            self._gpu_use.clear()
            self.clock.read()
            self.clock.start()
            self._void_window, self._window_batches = False, 0
            # Creating a loader's iterator draws from the main generator.
            seed_everything(self.hparams.seed, epoch, "loader", self.rank)
        elif stage == sb.Stage.VALID:
            self._evaluates_average(True)

    def _evaluates_average(self, now: bool) -> None:
        """Let a validation see the averaged weights; whatever is saved is saved after it."""
        if self.weight_average is not None:
            (self.weight_average.put_in if now else self.weight_average.take_out)()

    def validation_stats(self, loss: float) -> dict[str, float]:
        """Figures of a validation."""
        return {"loss": loss}

    def _of_main(self, figure: float) -> float:
        """The main process' figure: others may have rounded theirs to another decision."""
        if not is_distributed_initialized():
            return figure
        shared = torch.tensor(figure, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, src=0)
        return float(shared)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log an epoch, save its checkpoint, decide on stopping early."""
        if stage == sb.Stage.TRAIN:
            self.read_losses()
            self._read_clock()
            seconds = max(time.perf_counter() - self._stage_started, 1e-9)
            self._train_stats = {"loss": self.avg_train_loss}
            # Nothing was trained here where the run goes on behind the last batch of an epoch.
            if self._amount:
                self._train_stats |= {
                    f"{self.amount_unit}_per_s": self._amount / seconds,
                    "peak_memory_gib": peak_memory_gib(self.device),
                    "grad_norm": self._last_norm,
                    **{f"{part}_s": value for part, value in self._epoch_seconds.items()},
                }
            if self._gpu_use:
                self._train_stats["gpu_use_percent"] = fmean(self._gpu_use)
            self._train_steps = self.step
            return
        if stage != sb.Stage.VALID:
            return
        self._evaluates_average(False)
        stats = self.validation_stats(stage_loss)
        measured = {"search_s": round(self._search_s, 4)}
        meta = {
            "epoch": epoch,
            "step": self.optimizer_step,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        for stats_logger in self.loggers:
            stats_logger.log_stats(
                meta, train_stats=self._train_stats, valid_stats=stats | measured
            )
        if self.hparams.early_stop_patience:
            metric, counter = self._of_main(stats[self.best_metric]), self.hparams.counter
            if self.best_is == "max" and metric <= counter.best_score:
                # SpeechBrain's counter takes the same score again for a gain.
                metric = -math.inf
            counter.update_metric(metric)
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
                **measured,
            )
            plot_curves(
                self.metrics_log.path,
                Path(self.hparams.output_folder) / "curves.png",
                title=run_title(self.hparams.output_folder, self.param_file),
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
        # Only a fused optimiser can be told on the device to leave out a step.
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self.reads_late = fused and torch.device(self.device).type == "cuda"
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def on_fit_start(self):
        """Wrap, make the optimiser, go on from a checkpoint if there is one."""
        if torch.device(self.device).type == "cuda":
            logger.info(
                "The first steps compile kernels for this GPU, once for a machine and a network: "
                "some twenty seconds."
            )
        if self.training_dtype == torch.bfloat16 and not computes_bf16(self.device):
            logger.info("This CPU has no bf16 instructions: --precision fp32 trains faster here.")
        self._compile()
        # A layer that is left out has no gradients, which the processes would wait for.
        self.find_unused_parameters |= bool(self._dropping_layers())
        self._wrap_distributed()
        if self.casts_weights():
            self.cast_weights = CastWeights(self.modules.values(), self.training_dtype)
        self.init_optimizers()
        if self.hparams.ema_decay:
            self.weight_average = WeightAverage(self.hparams.model, self.hparams.ema_decay)
        if self.checkpointer is None:
            return
        if self.weight_average is not None:
            # A run that goes on may have begun without.
            self.checkpointer.add_recoverable(EMA, self.weight_average, optional_load=True)
        self.checkpointer.remove_unfinished()
        own = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        if self.resume_from is not None:
            checkpoint = self.checkpointer.go_back_to(self.resume_from)
        else:
            checkpoint = self.checkpointer.recover_if_possible()
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            # Of a checkpoint are the moments; weight decay and the like are this run's.
            group.update(options)
        if checkpoint is not None:
            if self.weight_average is not None and EMA not in checkpoint.paramfiles:
                self.weight_average.reset()
            logger.info(
                "Going on from %s (optimiser step %d)", checkpoint.path, self.optimizer_step
            )
            self._judge_stopping_anew()
        if if_main_process():
            # Amid an epoch, the counter has come to the one before.
            self.metrics_log.truncate_after(self.optimizer_step, self.hparams.counter.current)

    @property
    def training_dtype(self) -> torch.dtype:
        """Of autocast in training."""
        return AMPConfig.from_name(self.precision).dtype

    def casts_weights(self) -> bool:
        """Whether all weights are cast at the beginning of a step, not one use at a time."""
        # Layers that run twice would meet two kinds of weights.
        recomputes = getattr(self.hparams, "gradient_checkpointing", False)
        on_gpu = torch.device(self.device).type == "cuda"
        half = self.training_dtype != torch.float32
        return on_gpu and half and not recomputes and not self.compile

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

    def _fit_train(self, train_set, epoch, enable):
        # What a run that has reached its limit goes on to is no epoch, unless it was left within.
        within = self.step or self._begins_again
        self._ended_before = self._optimizer_step_limit_exceeded and not within
        self._begins_again = False
        if not self._ended_before:
            super()._fit_train(train_set, epoch, enable)

    def _fit_valid(self, valid_set, epoch, enable):
        if not self._ended_before:
            super()._fit_valid(valid_set, epoch, enable)

    def make_dataloader(self, dataset, stage, ckpt_prefix=None, **loader_kwargs):
        """As SpeechBrain's, whose record of the position would be a count of batches."""
        del ckpt_prefix
        if torch.device(self.device).type == "cuda":
            # From there a copy to the device does not keep the host.
            loader_kwargs.setdefault("pin_memory", True)
        loader = super().make_dataloader(dataset, stage, ckpt_prefix=None, **loader_kwargs)
        if stage == sb.Stage.TRAIN:
            self._train_loader = loader
        return loader

    def _train_loader_specifics(self, dataset, loader_kwargs):
        if isinstance(loader_kwargs.get("batch_sampler"), EpochBatches):
            # It shares the batches out among the processes.
            return loader_kwargs
        return super()._train_loader_specifics(dataset, loader_kwargs)

    def is_last_batch(self) -> bool:
        """Whether the batch in work is the last one of the epoch."""
        return self.step == len(self._train_loader)

    def _completes_window(self) -> bool:
        """Whether gradients are applied after this batch; the rest of an epoch is not dropped."""
        return self.step % self.grad_accumulation_factor == 0 or self.is_last_batch()

    def position(self) -> Any:
        """What of the epoch has been trained on, as a JSON value: here the utterances' ids."""
        if not isinstance(self.train_sampler, EpochBatches):
            return None
        return {"seen": self.train_sampler.seen(self.step)}

    def go_on_from(self, position: Any) -> bool:
        """Enter an epoch where a checkpoint's ``position`` says, if that is possible now."""
        sampler = self.train_sampler
        if not isinstance(sampler, EpochBatches) or not position or "seen" not in position:
            return False
        sampler.go_on(self.step, position["seen"])
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
            self._begins_again = True

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        # SpeechBrain counts batches.
        steps_since_ckpt = self.optimizer_step - self._saved_at
        due = super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)
        # Gradients accumulated so far are not in a checkpoint: wait for the optimiser step.
        return due and self._completes_window()

    def _save_intra_epoch_ckpt(self):
        self._saved_at = self.optimizer_step
        self.read_losses()
        self.checkpointer.save_checkpoint(end_of_epoch=False, meta={INTRA_EPOCH_CKPT_FLAG: True})
        self.checkpointer.keep_best(
            self.hparams.avg_checkpoints, **{f"{self.best_is}_key": self.best_metric}
        )
