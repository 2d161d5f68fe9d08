import io
import json
import math
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from torch import nn

from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.metrics import word_error_rate
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer
from sonosco_mlflow.serialization.state import split_tree, tensor_bytes
from sonosco_mlflow.training import callbacks as package
from sonosco_mlflow.training.callbacks import (
    Callback,
    CosineDecay,
    EarlyStopping,
    EpochTimeEstimate,
    History,
    InverseSquareRootDecay,
    LayerGradientNorms,
    LinearWarmUp,
    ModelCheckpoint,
    PlateauLearningRateReduction,
    ProgressBar,
    ScheduledLearningRateReduction,
    SoftWindow,
    StepwiseLearningRateReduction,
    TeacherForcedTextComparison,
    TextComparison,
)
from sonosco_mlflow.training.callbacks.gradient_norms import layer_gradient_norms
from sonosco_mlflow.training.callbacks.progress_bar import duration_text
from sonosco_mlflow.training.callbacks.text_comparison import comparison_table
from sonosco_mlflow.training.trainer import ModelTrainer
from sonosco_mlflow.training.validation import Validation
from toy import ToyModel, tone_loader

PERIODS = ("every_steps", "every_minutes", "every_epochs", "keep_every_steps")


class Standing:
    """As much of a trainer as a schedule looks at."""

    def __init__(self, epoch: int = 0, step: int = 0, base: float = 0.1) -> None:
        self.progress = SimpleNamespace(epoch=epoch, step=step)
        self.optimizer_recipe = SimpleNamespace(groups=[{"lr": base}])
        self.stopped: list[str] = []

    def stop_training(self, reason: str) -> None:
        self.stopped.append(reason)


def standing(**position: Any) -> Any:
    return Standing(**position)


def validation(**metrics: float) -> Validation:
    return Validation({f"val_{name}": value for name, value in metrics.items()}, [], [], [])


def new_trainer(manifest: Manifest, *callbacks: Callback, **settings: Any) -> ModelTrainer:
    torch.manual_seed(7)
    return ModelTrainer(
        ToyModel(),
        train_loader=tone_loader(manifest[:8]),
        val_loader=tone_loader(manifest[8:14], seed=None),
        metrics=[word_error_rate],
        callbacks=callbacks,
        **{"epochs": 2, **settings},
    )


class Texts(Callback):
    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def on_text(self, trainer: ModelTrainer, name: str, text: str) -> None:
        self.texts.append((name, text))


# ------------------------------------------------------------------ early stopping


def test_early_stopping_counts_validations_without_improvement() -> None:
    trainer = standing()
    callback = EarlyStopping(patience=2, minimum_change=0.1)
    for loss in (1.0, 0.95, 0.8, 0.75, 0.71):
        assert trainer.stopped == []
        callback.on_validation_end(trainer, validation(loss=loss))
    assert trainer.stopped == ["val_loss has not improved on 0.8 for 2 validations"]


def test_early_stopping_takes_nan_for_no_improvement() -> None:
    trainer = standing()
    callback = EarlyStopping(patience=1)
    callback.on_validation_end(trainer, validation(loss=1.0))
    callback.on_validation_end(trainer, validation(loss=float("nan")))
    assert len(trainer.stopped) == 1


def test_early_stopping_remembers_across_a_resume() -> None:
    first = EarlyStopping(patience=2)
    for loss in (1.0, 2.0):
        first.on_validation_end(standing(), validation(loss=loss))
    second = EarlyStopping(patience=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    trainer = standing()
    second.on_validation_end(trainer, validation(loss=1.5))
    assert len(trainer.stopped) == 1


def test_an_unknown_monitor_is_refused_with_the_nearest() -> None:
    callback = EarlyStopping(monitor="val_los")
    with pytest.raises(UserError, match=r"'val_los', .* did you mean 'val_loss'"):
        callback.on_validation_end(standing(), validation(loss=1.0, word_error_rate=0.5))


def test_patience_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="patience is 0"):
        EarlyStopping(patience=0)


# ------------------------------------------------------------------ learning rate


def test_warm_up_rises_to_the_base_rate() -> None:
    callback = LinearWarmUp(steps=4)
    assert [callback.learning_rate_factor(standing(step=step)) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert LinearWarmUp(steps=0).learning_rate_factor(standing()) == 1.0


def test_stepwise_reduction() -> None:
    callback = StepwiseLearningRateReduction(every_epochs=2, factor=0.5, floor=0.02)
    factors = [callback.learning_rate_factor(standing(epoch=epoch)) for epoch in range(8)]
    assert factors == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2])


def test_scheduled_reduction() -> None:
    callback = ScheduledLearningRateReduction(epochs=[1, 3], factor=0.1)
    factors = [callback.learning_rate_factor(standing(epoch=epoch)) for epoch in range(5)]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_plateau_reduction_starts_its_patience_anew() -> None:
    callback = PlateauLearningRateReduction(patience=2, factor=0.5, floor=0.03, monitor="val_loss")
    factors = []
    for loss in (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5):
        callback.on_validation_end(standing(), validation(loss=loss))
        factors.append(callback.learning_rate_factor(standing()))
    assert factors == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3])


def test_the_inverse_square_root_falls_from_the_end_of_warm_up() -> None:
    callbacks = [LinearWarmUp(steps=4), InverseSquareRootDecay(warmup_steps=4, floor=0.02)]
    # Vaswani et al. 2017, equation 3, with its maximum as the base.
    for step in (1, 2, 4, 5, 9, 16, 64):
        factor = math.prod(callback.learning_rate_factor(standing(step=step - 1)) for callback in callbacks)
        assert factor == pytest.approx(min(step**-0.5, step * 4**-1.5) * 4**0.5)
    assert callbacks[1].learning_rate_factor(standing(step=10**6)) == pytest.approx(0.2)
    assert InverseSquareRootDecay(warmup_steps=0).learning_rate_factor(standing(step=3)) == 0.5


def test_the_cosine_goes_from_the_base_to_the_floor_over_the_steps_of_all_epochs(tone_manifest: Manifest) -> None:
    history = History()
    model = ToyModel()
    trainer = ModelTrainer(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_loader=tone_loader(tone_manifest[:10], frames_per_batch=100),
        callbacks=[CosineDecay(warmup_steps=2, floor=0.02), history],
        epochs=3,
        accumulation=2,
    )
    trainer.start_training()
    total = trainer.progress.step
    rates = history.curve("learning_rate")[1]
    assert len(rates) == total > 5
    shares = [max(0, step - 2) / (total - 2) for step in range(total)]
    assert rates == pytest.approx([0.02 + 0.08 * (1 + math.cos(math.pi * share)) / 2 for share in shares])
    # Where a callback has trained beyond it, the floor stays.
    trainer.progress.step = total + 5
    assert CosineDecay(floor=0.02).learning_rate_factor(trainer) == pytest.approx(0.2)
    assert CosineDecay.follows_total_epochs


def test_a_floor_above_the_base_rate_raises_nothing() -> None:
    callback = StepwiseLearningRateReduction(every_epochs=1, factor=0.5, floor=5.0)
    assert callback.learning_rate_factor(standing(epoch=3)) == 1.0


@pytest.mark.parametrize(("factor", "floor"), [(0.0, 0.0), (1.0, 0.0), (1.5, 0.0), (0.5, -1e-3)])
def test_a_factor_or_floor_out_of_range_is_refused(factor: float, floor: float) -> None:
    with pytest.raises(UserError, match="of StepwiseLearningRateReduction is"):
        StepwiseLearningRateReduction(1, factor, floor)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (StepwiseLearningRateReduction, "every_epochs"),
        (LayerGradientNorms, "every_steps"),
        *((lambda value, name=name: ModelCheckpoint(**{name: value}), name) for name in PERIODS),
    ],
)
@pytest.mark.parametrize("value", [0, -2])
def test_a_period_that_never_comes_is_refused(make: Callable[[int], Callback], name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name} of .* is {value}, expected a number above 0"):
        make(value)


def test_factors_multiply_on_the_base_rate_of_each_group(tone_manifest: Manifest) -> None:
    history = History()
    model = ToyModel()
    optimizer = torch.optim.SGD(
        [{"params": model.inner.parameters(), "lr": 0.4}, {"params": model.outer.parameters()}], lr=0.1
    )
    trainer = ModelTrainer(
        model,
        optimizer=optimizer,
        train_loader=tone_loader(tone_manifest[:2], frames_per_batch=1),
        callbacks=[LinearWarmUp(8), StepwiseLearningRateReduction(1, 0.5), history],
        epochs=2,
    )
    trainer.start_training()
    assert history.curve("learning_rate")[1] == pytest.approx([0.4 / 8, 0.4 * 2 / 8, 0.2 * 3 / 8, 0.2 * 4 / 8])
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05 * 4 / 8)


# ------------------------------------------------------------------ history, gradient norms, texts


def test_history_keeps_curves_but_no_timings(tone_manifest: Manifest) -> None:
    history = History()
    trainer = new_trainer(tone_manifest, EpochTimeEstimate(), history)
    trainer.start_training()
    assert history.names() == [
        *("gradient_norm", "learning_rate", "padding_share", "train_loss", "val_loss", "val_word_error_rate")
    ]
    steps, values = history.curve("train_loss")
    assert steps == list(range(1, trainer.progress.step + 1))
    assert len(values) == len(steps)
    assert len(history.curve("val_loss")[0]) == 2
    with pytest.raises(UserError, match="did you mean 'val_loss'"):
        history.curve("val_los")


def test_layer_gradient_norms_are_those_of_the_parameters_in_each_layer() -> None:
    model = nn.ModuleDict({"a [0]": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 1), nn.Tanh())})
    model["b"](model["a [0]"](torch.ones(1, 2))).sum().backward()
    norms = layer_gradient_norms(model)
    first = model["a [0]"]
    assert list(norms) == ["a _0_", "b.0"]
    assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in norms)
    assert norms["a _0_"] == pytest.approx(
        torch.cat([first.weight.grad.flatten(), first.bias.grad]).norm().item()  # type: ignore[union-attr]
    )
    assert layer_gradient_norms(nn.Linear(1, 1)) == {}


def test_layer_gradient_norms_are_recorded_at_their_step(tone_manifest: Manifest) -> None:
    history = History()
    trainer = new_trainer(tone_manifest, LayerGradientNorms(every_steps=2), history, gradient_clip=1e-3)
    trainer.start_training()
    steps, values = history.curve("gradient_norm/inner")
    assert steps == list(range(2, trainer.progress.step + 1, 2))
    totals = dict(zip(*history.curve("gradient_norm"), strict=True))
    layers = [history.curve(f"gradient_norm/{name}")[1][0] for name in ("inner", "norm", "outer")]
    assert sum(norm**2 for norm in layers) ** 0.5 == pytest.approx(totals[2], rel=1e-5)
    assert values[0] > 1e-3, "measured before clipping"


def test_a_comparison_table_shows_each_error_rate_and_survives_pipes() -> None:
    table = comparison_table(["a", "b"], ["ONE TWO", "X"], ["ONE", "X|Y"])
    assert table.splitlines()[2:] == ["| a | ONE TWO | ONE | 50.0 % |", r"| b | X | X\|Y | 100.0 % |"]


def test_text_comparisons_show_decoded_and_teacher_forced_text(tone_manifest: Manifest) -> None:
    texts = Texts()
    trainer = new_trainer(tone_manifest, TextComparison(3), TeacherForcedTextComparison(4), texts)
    trainer.start_training()
    assert [name for name, _ in texts.texts] == ["text_comparison", "teacher_forced_text_comparison"] * 2
    found = trainer.validation
    assert found is not None
    rows = list(zip(found.ids, found.references, found.hypotheses, strict=True))
    # The toy model's decoding is its teacher-forced output.
    spread, first = [rows[0], rows[2], rows[4]], rows[:4]
    assert [text for _, text in texts.texts[2:]] == [
        comparison_table(*zip(*chosen, strict=True)) for chosen in (spread, first)
    ]


def test_the_teacher_forced_comparison_disturbs_nothing(tone_manifest: Manifest) -> None:
    finals = []
    for callbacks in ([], [TeacherForcedTextComparison()]):
        trainer = new_trainer(tone_manifest, *callbacks)
        trainer.start_training()
        finals.append([*trainer.model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*finals, strict=True))


def test_a_model_without_what_a_callback_needs_is_refused(tone_manifest: Manifest) -> None:
    loader = tone_loader(tone_manifest[:2])
    for callback, match in [
        (SoftWindow(1), "attribute soft_window, Sequential has none"),
        (TeacherForcedTextComparison(), r"teacher_forced\(output\), Sequential has none"),
        (TextComparison(), "needs hypotheses"),
    ]:
        model = nn.Sequential(nn.Linear(8, 1))
        trainer = ModelTrainer(model, train_loader=loader, callbacks=[callback])
        with pytest.raises(UserError, match=match):
            trainer.start_training()


# ------------------------------------------------------------------ soft window, time, progress


class WindowLog(Callback):
    def __init__(self) -> None:
        self.log: list[tuple[int, bool]] = []

    def on_gradients(self, trainer: ModelTrainer) -> None:
        self.log.append((trainer.progress.epoch, cast(bool, trainer.model.soft_window)))


def test_the_soft_window_is_on_in_the_first_epochs_also_after_a_resume(tone_manifest: Manifest) -> None:
    log = WindowLog()
    trainer = new_trainer(tone_manifest, SoftWindow(2), log, epochs=3)
    trainer.start_training()
    assert sorted(set(log.log)) == [(0, True), (1, True), (2, False)]
    resumed = new_trainer(tone_manifest, SoftWindow(2), WindowLog(), epochs=4)
    resumed.load_state_dict(trainer.state_dict())
    resumed.model.soft_window = True  # type: ignore[assignment]
    resumed.continue_training()
    assert set(cast(WindowLog, resumed.callbacks[1]).log) == {(3, False)}


class Rows(Callback):
    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    def on_metrics(self, trainer: ModelTrainer, metrics: Any) -> None:
        self.rows += [(trainer.progress.step, name, value) for name, value in metrics.items()]


def test_epoch_seconds_are_recorded_for_whole_epochs_only(tone_manifest: Manifest) -> None:
    rows = Rows()
    trainer = new_trainer(tone_manifest, EpochTimeEstimate(), rows)
    trainer.progress.batch = 1
    trainer.start_training()
    seconds = [(step, value) for step, name, value in rows.rows if name == "epoch_seconds"]
    assert [step for step, _ in seconds] == [trainer.progress.step]
    assert 0 < seconds[0][1] < 60


def test_the_time_left_follows_the_pace(tone_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr("sonosco_mlflow.training.callbacks.epoch_time.time", clock)
    trainer = new_trainer(tone_manifest, epochs=3)
    trainer.train_loader = tone_loader(tone_manifest[:8], frames_per_batch=1)
    estimate = EpochTimeEstimate()
    estimate.on_train_begin(trainer)
    estimate.on_epoch_begin(trainer)
    assert estimate.seconds_left(trainer) is None
    trainer.progress.batch = trainer.progress.micro_step = 2
    clock.monotonic = lambda: 110.0
    assert estimate.seconds_left(trainer) == 5.0 * (3 * 8 - 2)
    assert duration_text(110.0) == "0:01:50"


def test_without_a_terminal_progress_is_plain_lines(tone_manifest: Manifest) -> None:
    output = io.StringIO()
    with redirect_stdout(output):
        new_trainer(tone_manifest, ProgressBar()).start_training()
    lines = output.getvalue().splitlines()
    assert re.fullmatch(r"epoch 1/2  step 1  loss \d+\.\d{4}  \d+\.\d utterances/s  0:00:\d\d left", lines[0])
    assert lines[-1].startswith("epoch 2/2  step ")
    assert any(re.fullmatch(r"step \d+: val_loss \d\.\d{4}, val_word_error_rate \d\.\d{4}", line) for line in lines)
    assert "\x1b" not in output.getvalue()


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_progress_never_ends_a_training(tone_manifest: Manifest) -> None:
    trainer = new_trainer(tone_manifest, ProgressBar())
    with redirect_stdout(ClosedPipe()):
        trainer.start_training()
    assert trainer.finished


class Failing(Callback):
    def on_epoch_end(self, trainer: ModelTrainer, epoch: int) -> None:
        raise KeyboardInterrupt


def test_in_a_terminal_the_bar_leaves_the_cursor_as_it_was(tone_manifest: Manifest) -> None:
    terminal = io.StringIO()
    bar = ProgressBar()
    bar._console = Console(file=terminal, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    trainer = new_trainer(tone_manifest, bar, Failing())
    with pytest.raises(KeyboardInterrupt):
        trainer.start_training()
    hidden, shown = terminal.getvalue().rfind("\x1b[?25l"), terminal.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown
    assert "utterances/s" in terminal.getvalue()


# ------------------------------------------------------------------ all of them


def test_every_callback_is_exported_and_can_be_written_down_and_built_again() -> None:
    arguments: dict[str, dict[str, Any]] = {
        "StepwiseLearningRateReduction": {"every_epochs": 2},
        "ScheduledLearningRateReduction": {"epochs": [1, 2]},
        "LinearWarmUp": {"steps": 10},
        "InverseSquareRootDecay": {"warmup_steps": 10},
        "CosineDecay": {"warmup_steps": 10, "floor": 0.1},
        "ExponentialAverage": {"decay": 0.9},
        "CheckpointAverage": {"which": "best", "count": 3},
        "SoftWindow": {"epochs": 1},
        "ModelCheckpoint": {"every_steps": 5, "every_epochs": None, "keep_every_steps": 10},
    }
    for name in package.__all__:
        document = Serializer().describe(getattr(package, name)(**arguments.get(name, {})))
        again = Deserializer().build(document)
        assert type(again).__name__ == name
        assert Serializer().describe(again) == document
        for key, value in arguments.get(name, {}).items():
            assert getattr(again, key) == value


def test_where_checkpoints_lie_is_not_written_down(tmp_path: Path) -> None:
    documents = [Serializer().describe(package.ModelCheckpoint(folder)) for folder in (None, tmp_path / "a", "b")]
    assert documents[0] == documents[1] == documents[2]
    assert Deserializer().build(documents[0]).directory is None


def test_a_metric_has_one_value_a_step_in_the_history_however_often_it_comes() -> None:
    """A run that is continued records again what came after the step at which it was stopped."""
    history, trainer = History(), Mock()
    for step, value in ((1, 0.5), (2, 0.25), (2, 0.125)):
        trainer.progress.step = step
        history.on_metrics(trainer, {"drawn": value})
    assert history.curve("drawn") == ([1, 2], [0.5, 0.125])


def recorded_history(steps: int) -> History:
    history, trainer = History(), Mock()
    for step in range(1, steps + 1):
        trainer.progress.step = step
        history.on_metrics(trainer, {"train_loss": 1 / step, "drawn": math.nan})
    return history


def test_what_a_save_walks_through_does_not_grow_with_the_steps() -> None:
    """Only memory that is copied at once does: a save holds up the training."""
    documents = [split_tree(recorded_history(steps).state_dict())[0] for steps in (1, 1000)]
    assert documents[0] == documents[1]


def test_the_history_comes_back_and_shares_no_memory_with_its_state() -> None:
    history = recorded_history(3)
    state: Any = history.state_dict()
    before = tensor_bytes(split_tree(state)[1])
    assert {name: (part.dtype, part.shape) for name, part in state["train_loss"].items()} == {
        "steps": (torch.int64, (3,)),
        "values": (torch.float64, (3,)),
    }
    again = History()
    again.load_state_dict(state)
    for one in (history, again):
        one.on_metrics(Mock(progress=Mock(step=3)), {"train_loss": 7.0})
        one.on_metrics(Mock(progress=Mock(step=4)), {"train_loss": 8.0})
        assert one.curve("train_loss") == ([1, 2, 3, 4], [1.0, 0.5, 7.0, 8.0])
    assert tensor_bytes(split_tree(state)[1]) == before
    assert repr(again.curve("drawn")) == "([1, 2, 3], [nan, nan, nan])"


def test_a_value_that_is_no_number_leaves_the_history_whole() -> None:
    history = recorded_history(1)
    with pytest.raises(TypeError):
        history.on_metrics(Mock(progress=Mock(step=2)), {"train_loss": None})  # type: ignore[dict-item]
    assert history.curve("train_loss") == ([1], [1.0])
