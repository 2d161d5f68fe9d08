"""Randomness by key, and the settings on which equal bits depend.

A random draw that is *carried* (the state of one generator, passed on from step to step) can only be repeated by
repeating everything before it. A draw that is *keyed* is a pure function of what it is for: the seed, the name of
the stream, the epoch, the utterance. So a run can be continued at any step, by any number of workers, without a replay.

>>> random_stream(0, "augment", 3, "an4-fash-b").random() == random_stream(0, "augment", 3, "an4-fash-b").random()
True
"""

import functools
import hashlib
import inspect
import json
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

Key = int | str


def _key_digest(key: tuple[Key, ...]) -> bytes:
    # JSON keeps 1 and "1" apart and needs no separator that a key could contain.
    return hashlib.sha256(json.dumps(key).encode()).digest()


def random_stream(*key: Key) -> np.random.Generator:
    """Return a generator whose draws depend on ``key`` alone, the same on every machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key_digest(key)[:16], "little")))


def seed_for(*key: Key) -> int:
    """Return a seed in [0, 2**63) for ``key``, for generators other than NumPy's (``torch.manual_seed``)."""
    return int.from_bytes(_key_digest(key)[:8], "little") >> 1


def configure(threads: int) -> None:
    """Make torch's results a function of its inputs: deterministic algorithms and a fixed number of threads.

    The number of threads belongs to the result (sums are split by it), so it is a setting of the run and not of the
    machine. Call it before the first CUDA operation: cuBLAS reads its workspace setting then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor with NaN first, a safeguard for code that reads what it never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread in a block, whatever :func:`configure` has set: what comes out must not depend on it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seed_generators(*key: Key) -> None:
    """Seed the global generators of Python, NumPy, torch and every CUDA device for ``key``.

    Otherwise their states would come from the clock, and two equal trainings would keep unequal states.
    """
    import torch

    seed = seed_for(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_states() -> dict[str, object]:
    """Return the states of the global generators of Python, NumPy, torch and every CUDA device, as plain data.

    Nothing in this package draws from them across steps; user code may.
    """
    import torch

    version, internal, gauss = random.getstate()
    # The dictionary form of the legacy state names its parts; the tuple form would be loaded by position.
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = numpy_state["state"]
    return {
        "python": {"version": version, "internal": torch.tensor(internal), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(inner["key"].astype(np.int64)),
            "position": int(inner["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def set_generator_states(states: Mapping[str, object]) -> None:
    """Set the global generators to what :func:`generator_states` returned."""
    import torch

    python, numpy_state = states["python"], states["numpy"]
    torch_state, cuda_states = states["torch"], states["cuda"]
    assert isinstance(python, dict)
    assert isinstance(numpy_state, dict)
    assert isinstance(torch_state, torch.Tensor)
    assert isinstance(cuda_states, list)
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {
                "key": numpy_state["key"].numpy().astype(np.uint32),
                "pos": numpy_state["position"],
            },
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(torch_state)
    if torch.cuda.is_available() and cuda_states:
        torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def python_generator_of_this_thread() -> Iterator[None]:
    """Keep other threads from drawing of Python's global generator while the block runs; they get one of their own.

    Clients of tracking servers and object stores draw from it how long to wait before they ask again. Were that seen by
    the thread that trains, an outage would change the numbers of code that draws from it.
    """
    owner = threading.get_ident()
    others = random.Random()
    # The functions of the module are methods of its one generator.
    names = [name for name, function in vars(random).items() if isinstance(_owner_of(function), random.Random)]
    originals = {name: getattr(random, name) for name in names}

    def shared(name: str) -> Callable[..., object]:
        mine, theirs = originals[name], getattr(others, name)

        @functools.wraps(mine)
        def draw(*arguments: object, **options: object) -> object:
            return (mine if threading.get_ident() == owner else theirs)(*arguments, **options)

        return draw

    for name in names:
        setattr(random, name, shared(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(random, name, original)


class KeptGenerators:
    """The global generators as a training has them: what is drawn elsewhere, before, between or beside, is not seen."""

    def __init__(self) -> None:
        # While nothing is trained: the states to go on with.
        self._waiting: Mapping[str, object] | None = None

    @contextmanager
    def drawing(self, *key: Key, first: bool) -> Iterator[None]:
        """Train inside the block: from generators seeded for ``key`` at first, later from where they were left."""
        with python_generator_of_this_thread():
            if first:
                seed_generators(*key)
            elif self._waiting is not None:
                set_generator_states(self._waiting)
            self._waiting = None
            try:
                yield
            finally:
                self._waiting = generator_states()

    def state_dict(self) -> dict[str, object]:
        """Return the states of the generators (:func:`generator_states`)."""
        return generator_states() if self._waiting is None else dict(self._waiting)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Set the generators to ``state``, now and once more when training goes on."""
        self._waiting = state
        set_generator_states(state)


def _owner_of(function: object) -> object:
    return getattr(inspect.unwrap(function) if callable(function) else function, "__self__", None)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Leave every global generator after the block as it was before it (validation must not disturb training)."""
    states = generator_states()
    try:
        yield
    finally:
        set_generator_states(states)
