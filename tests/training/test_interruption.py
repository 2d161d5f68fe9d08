import os
import signal
import threading

import pytest

from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.training.callbacks import Callback
from sonosco_mlflow.training.interruption import SIGNALS, Terminated, deferred_interrupts
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import ToyModel, tone_loader


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_the_first_signal_waits_for_the_caller(number: signal.Signals, error: type[BaseException]) -> None:
    with deferred_interrupts() as interruption:
        interruption.raise_if_requested()
        os.kill(os.getpid(), number)
        reached = True
        with pytest.raises(error) as raised:
            interruption.raise_if_requested()
        assert raised.type is error
    assert reached


def test_the_second_signal_does_not_wait() -> None:
    def interrupt(times: int) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was put off")

    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        interrupt(times=2)


def test_an_interrupt_passed_on_by_a_launcher_is_one_interrupt() -> None:
    with deferred_interrupts() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as raised:
            interruption.raise_if_requested()
    assert raised.type is KeyboardInterrupt


def test_a_signal_after_the_last_safe_point_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), deferred_interrupts():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_nothing_is_changed() -> None:
    seen = []

    def work() -> None:
        with deferred_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


class Interrupting(Callback):
    """Sends a signal while gradients stand, and notes which safe points are still reached."""

    def __init__(self) -> None:
        self.safe: list[int] = []
        self.errors: list[str] = []

    def on_gradients(self, trainer: ModelTrainer) -> None:
        if trainer.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        self.safe.append(trainer.progress.step)

    def on_exception(self, trainer: ModelTrainer, error: BaseException) -> None:
        self.errors.append(type(error).__name__)


def test_a_training_that_is_interrupted_finishes_its_step(tone_manifest: Manifest) -> None:
    callback = Interrupting()
    trainer = ModelTrainer(
        ToyModel(), train_loader=tone_loader(tone_manifest[:6], frames_per_batch=1), callbacks=[callback], epochs=1
    )
    with pytest.raises(Terminated):
        trainer.start_training()
    assert callback.safe == [1, 2]
    assert callback.errors == ["Terminated"]
    trainer.continue_training()
    assert callback.safe == [1, 2, 3, 4, 5, 6]
