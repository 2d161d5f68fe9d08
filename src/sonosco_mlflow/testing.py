"""The proof that a training may be stopped anywhere, for models and callbacks of your own.

A training that continues "bit for bit" from one checkpoint may still fail to from another: in the middle of an
accumulation, just before a validation, at the end of an epoch. So this trains once without disturbance, takes the
state at every micro-step, and continues from each of them in a trainer that was just made. It goes red for a callback
that does not report its state, for a model that counts in a plain attribute, for anything that draws without a key.

>>> import tempfile
>>> from pathlib import Path
>>> import numpy, soundfile, torch
>>> from sonosco_mlflow import AudioDataLoader, AudioDataProcessor, AudioDataset, CharacterTokenizer, ModelTrainer
>>> from sonosco_mlflow.data.manifest import Manifest, Utterance
>>> folder = Path(tempfile.mkdtemp())
>>> soundfile.write(folder / "tone.wav", numpy.sin(numpy.arange(8000.0)), 16000)
>>> manifest = Manifest([Utterance("tone", "tone.wav", 0.5, "A", "me")], folder)
>>> dataset = AudioDataset(manifest, AudioDataProcessor(n_mels=8), CharacterTokenizer(["A"]))
>>> def loss(model, batch):
...     return model(batch.features).square().mean()
>>> def make_trainer():
...     torch.manual_seed(0)  # what make_trainer draws must be seeded, here the weights
...     model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
...     loader = AudioDataLoader(dataset, frames_per_batch=100, seed=0)
...     return ModelTrainer(model, loss=loss, train_loader=loader, epochs=3)
>>> assert_exact_resume(make_trainer)
4
"""

import json
import random
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from sonosco_mlflow.determinism import preserved_generators
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.serialization.state import Tree, join_tree, json_bytes, split_tree, tensor_bytes
from sonosco_mlflow.training.callbacks.base import Callback, is_timing
from sonosco_mlflow.training.trainer import ModelTrainer

MOST_DIFFERENCES = 5

MakeTrainer = Callable[[], ModelTrainer]
Frozen = dict[str, tuple[bytes, bytes]]  # the state's parts, each as JSON and safetensors
Record = tuple[str, str]


def assert_exact_resume(make_trainer: MakeTrainer, *, every: int = 1) -> int:
    """Prove that a training continued from any of its states ends as if it had never been stopped.

    It trains once from each state and keeps them all in memory: give it a small model and a few epochs. Python's,
    NumPy's and torch's global generators are set alike where the training begins and scrambled before each resume;
    they are left as found.

    Args:
        make_trainer: returns a new trainer, the same each time, the trainer's loaders and callbacks included. It may
            give loaders with another number of workers each time.
        every: try only every so many micro-steps. The state before the first step is always tried.

    Returns:
        The number of states that were tried.

    Raises:
        AssertionError: the state is not what was saved right after it was loaded, or what is recorded afterwards
            (timings aside) or the state at the end are not those of the undisturbed training. The message names the
            micro-step and the first entries that differ, by their path in the state. Also where two undisturbed
            trainings differ, or there is nothing to train.
        UserError: ``every`` is below 1.
    """
    if every < 1:
        raise UserError(f"every is {every}, expected at least 1 micro-step")
    with preserved_generators():
        training = undisturbed_training(make_trainer, seed=1)
        _assert_repeated(training, undisturbed_training(make_trainer, seed=2))
        tried = training.moments[::every]
        for moment in tried:
            differences = resume_differences(make_trainer, training, moment)
            if differences:
                raise AssertionError(
                    f"continued from micro-step {moment.micro_step}, the training becomes another one; what differs, "
                    f"undisturbed and continued:\n{differences}"
                )
    return len(tried)


@dataclass(frozen=True)
class Moment:
    """A point at which a training may be stopped: its state, and how much was recorded until then."""

    micro_step: int
    state: Frozen
    recorded: int


@dataclass(frozen=True)
class Training:
    """A training from its beginning to its end: every moment of it, and all that it recorded."""

    moments: list[Moment]
    records: list[Record]
    end: Frozen


@dataclass(frozen=True)
class Differences:
    """Entries that differ between a training and its continuation; it is false where there are none.

    Attributes:
        loaded: between the state that was saved and the trainer's right after loading it.
        recorded: between what both recorded from that point on.
        end: between the states at the end.
    """

    loaded: list[str]
    recorded: list[str]
    end: list[str]

    def __bool__(self) -> bool:
        return bool(self.loaded or self.recorded or self.end)

    def __str__(self) -> str:
        titles = {"right after loading": self.loaded, "recorded": self.recorded, "state at the end": self.end}
        return "\n".join(f"{title}:\n{_listed(entries)}" for title, entries in titles.items() if entries)


class Witness(Callback):
    """Takes the state at every safe point, in a checkpoint's bytes, and notes all that is recorded."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.records: list[Record] = []

    def on_metrics(self, trainer: ModelTrainer, metrics: Mapping[str, float]) -> None:
        """Note the metrics that a repeated training repeats."""
        for name, value in metrics.items():
            if not is_timing(name):
                self.records.append((f"{name} at step {trainer.progress.step}", repr(float(value))))

    def on_text(self, trainer: ModelTrainer, name: str, text: str) -> None:
        """Note the text."""
        self.records.append((f"{name} at step {trainer.progress.step}", text))

    def on_safe_point(self, trainer: ModelTrainer) -> None:
        """Take the state."""
        self.moments.append(Moment(trainer.progress.micro_step, frozen_state(trainer), len(self.records)))


def undisturbed_training(make_trainer: MakeTrainer, *, seed: int) -> Training:
    """Train to the end and return all of it; ``seed`` scrambles what ``make_trainer`` draws without a seed."""
    _seed_generators(seed)
    trainer = make_trainer()
    if trainer.finished:
        raise AssertionError("make_trainer gives a trainer that is finished: there is no state to continue from")
    _seed_generators(0)
    witness = Witness()
    witness.on_safe_point(trainer)
    trainer.attach(witness)
    trainer.start_training()
    return Training(witness.moments, witness.records, frozen_state(trainer))


def resume_differences(make_trainer: MakeTrainer, training: Training, moment: Moment) -> Differences:
    """Continue from ``moment`` in a new trainer, and return what differs from ``training``."""
    _seed_generators(3 + moment.micro_step)
    trainer = make_trainer()
    witness = Witness()
    try:
        trainer.load_state_dict(thawed_state(moment.state))
        loaded = frozen_state(trainer)
        trainer.attach(witness)
        trainer.continue_training()
    except Exception as error:
        error.add_note(f"while continuing from micro-step {moment.micro_step}")
        raise
    return Differences(
        loaded=_state_differences(moment.state, loaded),
        recorded=_record_differences(training.records[moment.recorded :], witness.records),
        end=_state_differences(training.end, frozen_state(trainer)),
    )


def frozen_state(trainer: ModelTrainer) -> Frozen:
    """Return the trainer's state as the bytes that a checkpoint of it holds."""
    parts = {part: split_tree(tree) for part, tree in trainer.state_dict().items()}
    return {part: (json_bytes(document), tensor_bytes(tensors)) for part, (document, tensors) in parts.items()}


def thawed_state(state: Frozen) -> dict[str, Tree]:
    """Return the state tree that was frozen, as a checkpoint is read."""
    return {
        part: join_tree(json.loads(document), safetensors.torch.load(tensors))
        for part, (document, tensors) in state.items()
    }


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _assert_repeated(first: Training, second: Training) -> None:
    for one, other in zip(first.moments, second.moments, strict=False):
        differences = _state_differences(one.state, other.state)
        if differences and one is first.moments[0]:
            raise AssertionError(
                f"make_trainer gives a different start each time; seed it. What differs:\n{_listed(differences)}"
            )
        if differences:
            break
    else:
        differences = _state_differences(first.end, second.end)
    recorded = _record_differences(first.records, second.records)
    if differences or recorded:
        raise AssertionError(
            "two trainings that were never stopped differ, though they start from the same state: make_trainer draws "
            "what no state holds (seed it), or the training depends on the clock or another source of chance; first "
            f"at micro-step {one.micro_step}:\n{Differences([], recorded, differences)}"
        )


def _record_differences(expected: list[Record], found: list[Record]) -> list[str]:
    nothing = ("nothing", "")
    return [
        f"{one[0]}: {_shown(one[1])} and {_shown(other[1])}" if one[0] == other[0] else f"{one[0]} and {other[0]}"
        for one, other in zip_longest(expected, found, fillvalue=nothing)
        if one != other
    ]


def _state_differences(expected: Frozen, found: Frozen) -> list[str]:
    if expected == found:
        return []
    first, second = dict(_leaves(thawed_state(expected))), dict(_leaves(thawed_state(found)))
    # The trainer's own entries are few, and tell more than the weights that follow from them.
    paths = sorted({*first, *second}, key=lambda path: (not path.startswith("trainer/"), path))
    compared = {path: _leaf_difference(first.get(path, _ABSENT), second.get(path, _ABSENT)) for path in paths}
    differences = [f"{path}: {difference}" for path, difference in compared.items() if difference]
    return differences or ["the same values in other bytes: tensors share memory in one of the two"]


_ABSENT = object()


def _leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Tree]]:
    """Yield the leaves by path; an empty node is a leaf, and so is a list of plain values."""
    if isinstance(tree, dict) and tree:
        children = {str(key): child for key, child in tree.items()}
    elif isinstance(tree, list) and any(isinstance(child, Tensor | list | dict) for child in tree):
        children = {str(position): child for position, child in enumerate(tree)}
    else:
        yield path, tree
        return
    for key, child in children.items():
        yield from _leaves(child, f"{path}/{key}" if path else key)


def _leaf_difference(expected: object, found: object) -> str:
    """Return how two leaves differ, or an empty string."""
    match expected, found:
        case Tensor(), Tensor() if (expected.shape, expected.dtype) == (found.shape, found.dtype):
            differing = int((_element_bytes(expected) != _element_bytes(found)).any(dim=1).sum())
            return f"{differing} of {expected.numel()} elements differ" if differing else ""
        case list(), list() if len(expected) == len(found):
            pairs = [(one, other) for one, other in zip(expected, found, strict=True) if repr(one) != repr(other)]
            if not pairs:
                return ""
            first = " and ".join(map(_shown, pairs[0]))
            return f"{len(pairs)} of {len(expected)} elements differ, the first: {first}"
        case Tensor(), Tensor():
            return f"{_shown(expected)} and {_shown(found)}"
    return "" if repr(expected) == repr(found) else f"{_shown(expected)} and {_shown(found)}"


def _element_bytes(tensor: Tensor) -> Tensor:
    # As bytes: a NaN equals itself, and 0.0 is not -0.0.
    return tensor.contiguous().reshape(-1).view(torch.uint8).reshape(tensor.numel(), tensor.element_size())


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "nothing"
    if isinstance(value, Tensor):
        return f"a {value.dtype} of shape {list(value.shape)}"
    return value if isinstance(value, str) and len(value) <= 30 else reprlib.repr(value)


def _listed(entries: list[str]) -> str:
    lines = [f"  {entry}" for entry in entries[:MOST_DIFFERENCES]]
    if len(entries) > MOST_DIFFERENCES:
        lines.append(f"  and {len(entries) - MOST_DIFFERENCES} more")
    return "\n".join(lines)
