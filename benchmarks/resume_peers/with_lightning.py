"""One segment of the toy training by Lightning's Trainer, with torch's DataLoader or with torchdata's."""

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from toy import Segment, StepLog, ToyDataset, ToyModel


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = ToyModel()

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch["features"]), batch["labels"])
        log.step(self.current_epoch, self.global_step + 1, batch["ids"], loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StatefulDataset(ToyDataset):
    """Tells StatefulDataLoader the state of the generator that augmentation draws from, as torchdata's guide says."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["generator"])


class GeneratorState(Callback):
    """Keeps the main process's generator in the checkpoint, which Lightning does not: by hand, not documented."""

    saved: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        # Without workers StatefulDataset has set this very generator, and the first batch has drawn from it since.
        if segment.workers > 0 or not segment.augment:
            self.saved = state["generator"]

    def on_train_batch_start(self, *arguments: object) -> None:
        if self.saved is not None:
            torch.set_rng_state(self.saved)
            self.saved = None


segment = Segment.from_command_line()
lightning.seed_everything(0, workers=True)
log = StepLog(segment, lambda step: (segment.checkpoints / f"step={step}.ckpt").exists())
model = Classifier()
stateful = segment.variant in ("stateful", "by hand")
dataset = (StatefulDataset if stateful and segment.augment else ToyDataset)(segment.samples, segment.augment)
loader = (StatefulDataLoader if stateful else DataLoader)(
    dataset, batch_size=segment.batch_size, shuffle=True, num_workers=segment.workers
)
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=1,
    deterministic=True,
    max_epochs=segment.epochs,
    callbacks=[
        *([GeneratorState()] if segment.variant == "by hand" else []),
        ModelCheckpoint(
            segment.checkpoints, filename="{step}", every_n_train_steps=segment.checkpoint_every, save_top_k=-1
        ),
    ],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
saved = segment.checkpoints.glob("step=*.ckpt")
newest = max(saved, key=lambda path: int(path.stem.removeprefix("step=")), default=None)
trainer.fit(model, loader, ckpt_path=newest if segment.resume else None)
segment.write_weights(model.network)
