"""One segment of the toy training by SpeechBrain's Brain, Checkpointer and SaveableDataLoader."""

import torch
from speechbrain.core import Brain, Stage
from speechbrain.nnet.schedulers import NoamScheduler
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.seed import seed_everything
from torch import nn

from toy import Segment, StepLog, ToyDataset, ToyModel


class Classifier(Brain):
    def compute_forward(self, batch, stage):
        return self.modules.network(batch["features"])

    def compute_objectives(self, predictions, batch, stage):
        loss = nn.functional.cross_entropy(predictions, batch["labels"])
        log.step(self.hparams.counter.current - 1, self.optimizer_step + 1, batch["ids"], loss)
        return loss

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        self.hparams.schedule(self.optimizer)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == Stage.TRAIN:
            self.checkpointer.save_checkpoint()


def whole(step: int) -> bool:
    """The checkpoint's last file is there, and it is the checkpoint of ``step``."""
    return any(
        (folder / "CKPT.yaml").exists() and f"optimizer_step: {step}\n" in (folder / "brain.ckpt").read_text()
        for folder in segment.checkpoints.glob("CKPT+*")
    )


segment = Segment.from_command_line()
seed_everything(0)
log = StepLog(segment, whole)
network = ToyModel()
counter = EpochCounter(segment.epochs)
schedule = NoamScheduler(lr_initial=1e-2, n_warmup_steps=10)
brain = Classifier(
    modules={"network": network},
    opt_class=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    hparams={"counter": counter, "schedule": schedule},
    run_opts={"device": "cpu", "ckpt_interval_steps": segment.checkpoint_every, "noprogressbar": True},
    checkpointer=Checkpointer(
        segment.checkpoints, recoverables={"network": network, "counter": counter, "schedule": schedule}
    ),
)
brain.fit(
    counter,
    ToyDataset(segment.samples, segment.augment),
    train_loader_kwargs={"batch_size": segment.batch_size, "shuffle": True, "num_workers": segment.workers},
)
segment.write_weights(network)
