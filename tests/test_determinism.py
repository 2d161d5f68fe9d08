import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from sonosco_mlflow.determinism import (
    configure,
    generator_states,
    preserved_generators,
    python_generator_of_this_thread,
    random_stream,
    seed_for,
    set_generator_states,
)
from sonosco_mlflow.serialization.state import json_bytes, split_tree, tensor_bytes

KEYS = st.lists(st.integers(-(10**6), 10**6) | st.text(max_size=4), max_size=4).map(tuple)


EXPECTED_DRAWS = [0.23666174662203998, 0.5631456439553114, 0.5802172133341267]
EXPECTED_SEED = 2584381765938845739


def test_a_stream_draws_the_same_on_every_machine_and_in_every_version() -> None:
    """Written down once; a change here would break every run that was made before."""
    assert random_stream(0, "augment", 3, "an4-fash-b").random(3).tolist() == EXPECTED_DRAWS
    assert seed_for(0, "step", 17) == EXPECTED_SEED


@given(KEYS, KEYS)
def test_streams_are_equal_where_their_keys_are(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    same = one == other
    assert (random_stream(*one).random() == random_stream(*other).random()) == same
    assert (seed_for(*one) == seed_for(*other)) == same
    assert 0 <= seed_for(*one) < 2**63


@pytest.mark.parametrize(
    ("one", "other"), [((1,), ("1",)), ((1, 2), (12,)), (("a", "b"), ("ab",)), (("a", "b"), ('a","b',))]
)
def test_keys_that_read_alike_are_kept_apart(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert seed_for(*one) != seed_for(*other)


def test_a_stream_disturbs_no_global_generator() -> None:
    before = drawn()
    random_stream(1).random(1000)
    assert drawn(restore=False) == before


def drawn(restore: bool = True) -> tuple[float, float, float]:
    states = generator_states()
    values = (random.random(), float(np.random.rand()), float(torch.rand(())))
    if restore:
        set_generator_states(states)
    return values


def test_generator_states_are_plain_data_and_put_back_every_generator() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # leaves a second normal draw in the state
    states = generator_states()
    document, tensors = split_tree(states)
    expected = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(5).tolist())
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    set_generator_states(states)
    again = split_tree(generator_states())
    assert json_bytes(again[0]) == json_bytes(document)
    assert tensor_bytes(again[1]) == tensor_bytes(tensors)
    assert expected == (
        *(random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(5).tolist()),
    )


def test_generators_are_preserved_also_when_the_block_fails() -> None:
    before = drawn()
    with pytest.raises(ZeroDivisionError), preserved_generators():
        1 / (0 * drawn(restore=False)[0])
    assert drawn() == before


def in_another_thread(draw: Callable[[], object]) -> None:
    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()


def test_other_threads_draw_from_pythons_generator_without_being_seen() -> None:
    def drawn_after(disturb: Callable[[], object]) -> list[float]:
        random.seed(1)
        return [random.gauss(0, 1) for _ in range(3) if (in_another_thread(disturb), True)]

    expected = drawn_after(lambda: None)
    assert drawn_after(random.random) != expected, "without it, they are seen"
    functions = dict(vars(random))
    with python_generator_of_this_thread():
        for disturb in (lambda: random.random(), lambda: random.seed(5), lambda: random.shuffle([1, 2, 3])):
            assert drawn_after(disturb) == expected
        with suppress(KeyError), python_generator_of_this_thread():
            assert drawn_after(lambda: random.uniform(0, 1)) == expected
            raise KeyError
        assert drawn_after(lambda: random.uniform(0, 1)) == expected
        state = random.getstate()
    assert vars(random) == functions
    assert random.getstate() == state


def test_configure_makes_torch_deterministic_with_a_given_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.set_num_threads(3)
    try:
        configure(threads=2)
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
