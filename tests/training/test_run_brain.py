"""When a run saves within an epoch, and whose score decides on its end."""

from types import SimpleNamespace

import pytest
import speechbrain as sb

from training.brains import run_brain
from training.brains.run_brain import RunBrain


@pytest.fixture
def brain():
    """What the methods below read of a Brain."""
    brain = RunBrain.__new__(RunBrain)
    brain.saved = []
    brain.checkpointer = SimpleNamespace(
        save_checkpoint=lambda **_: brain.saved.append(brain.step), keep_best=lambda *_, **__: None
    )
    brain.hparams = SimpleNamespace(avg_checkpoints=1, early_stop_patience=1)
    brain.device = "cpu"
    brain.step = brain.optimizer_step = brain._saved_at = 0
    brain._unread, brain.loggers, brain._train_stats = [], [], {}
    brain._search_s, brain.weight_average = 0.0, None
    return brain


@pytest.mark.parametrize(("interval", "saved"), [(1, [3, 6, 9, 12]), (2, [6, 12])])
def test_checkpoints_within_an_epoch_come_after_so_many_optimiser_steps(brain, interval, saved):
    brain.ckpt_interval_minutes, brain.ckpt_interval_steps = 0, interval
    brain.grad_accumulation_factor, brain._train_loader = 3, range(100)
    for brain.step in range(1, 15):
        brain.optimizer_step += brain.step % 3 == 0
        if brain._should_save_intra_epoch_ckpt(0.0, brain.step):
            brain._save_intra_epoch_ckpt()
    assert brain.saved == saved


def test_the_score_of_the_main_process_decides_on_stopping_early(brain, monkeypatch):
    scores = []
    brain.hparams.counter = SimpleNamespace(update_metric=scores.append)
    brain.optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])

    def broadcast(tensor, src):
        assert src == 0
        tensor.fill_(0.1)

    monkeypatch.setattr(run_brain, "is_distributed_initialized", lambda: True)
    monkeypatch.setattr(run_brain, "if_main_process", lambda: False)
    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    brain.on_stage_end(sb.Stage.VALID, 0.2, epoch=3)
    assert scores == [0.1]
