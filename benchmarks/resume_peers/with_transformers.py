"""One segment of the toy training by Hugging Face's Trainer."""

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from toy import Segment, StepLog, ToyDataset, ToyModel


class Classifier(nn.Module):
    def __init__(self, log: StepLog) -> None:
        super().__init__()
        self.network = ToyModel()
        self.log = log
        self.position = (0, 1)

    def forward(self, features: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(self.network(features), labels)
        self.log.step(*self.position, ids, loss)
        return {"loss": loss}


class Position(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        model.position = (int(state.epoch), state.global_step + 1)


segment = Segment.from_command_line()
set_seed(0)
log = StepLog(segment, lambda step: (segment.checkpoints / f"checkpoint-{step}" / "trainer_state.json").exists())
model = Classifier(log)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(segment.checkpoints),
        seed=0,
        data_seed=0,
        use_cpu=True,
        per_device_train_batch_size=segment.batch_size,
        num_train_epochs=segment.epochs,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        warmup_steps=10,
        save_strategy="steps",
        save_steps=segment.checkpoint_every,
        dataloader_num_workers=segment.workers,
        ignore_data_skip=False,
        remove_unused_columns=False,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=ToyDataset(segment.samples, segment.augment),
    callbacks=[Position()],
)
trainer.train(resume_from_checkpoint=segment.resume)
segment.write_weights(model)
