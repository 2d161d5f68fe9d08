import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from sonosco_mlflow.canary import canary
from sonosco_mlflow.determinism import generator_states
from sonosco_mlflow.serialization.state import json_bytes, split_tree, tensor_bytes

SOURCE = Path(__file__).parents[1] / "src"

# torch's names of instruction sets, and the names of those that the same CPU also has.
NARROWER = {"AVX2": ["default"], "AVX512": ["default", "avx2"]}

PROGRAM = """
import json, sys, torch
from sonosco_mlflow.canary import canary

digests = []
for threads in map(int, sys.argv[1:]):
    torch.set_num_threads(threads)
    digests.append(canary())
print(json.dumps([torch.backends.cpu.get_cpu_capability(), digests]))
"""


def in_another_process(*threads: int, capability: str | None = None) -> tuple[str, list[str]]:
    """The instruction set that torch used there, and the canary under each number of threads, one after another."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment["PYTHONPATH"] = str(SOURCE)
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    command = [sys.executable, "-c", PROGRAM, *map(str, threads)]
    used, digests = json.loads(subprocess.run(command, capture_output=True, env=environment, check=True).stdout)
    return used, digests


@pytest.fixture(scope="module")
def elsewhere() -> tuple[str, list[str]]:
    """What a new process says that begins with two threads, of which one is taken away and given back."""
    return in_another_process(2, 1, 2)


def test_it_is_a_sha256() -> None:
    assert len(bytes.fromhex(canary())) == 32


def test_it_does_not_depend_on_the_process_nor_on_what_was_computed_before(elsewhere: tuple[str, list[str]]) -> None:
    if torch.backends.cpu.get_cpu_capability() != elsewhere[0]:
        pytest.skip(f"ATEN_CPU_CAPABILITY keeps this process from using {elsewhere[0]}")
    torch.nn.Conv2d(3, 5, 3)(torch.rand(2, 3, 9, 9)).sum().backward()
    assert canary() == canary() == elsewhere[1][1]


def test_it_tells_two_threads_from_one_and_comes_back_with_them(elsewhere: tuple[str, list[str]]) -> None:
    two, one, two_again = elsewhere[1]
    assert two != one
    assert two_again == two


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_it_tells_instruction_sets_apart(elsewhere: tuple[str, list[str]], capability: str) -> None:
    widest, digests = elsewhere
    if capability not in NARROWER.get(widest, []):
        pytest.skip(f"torch uses {widest} on this CPU, which has no narrower {capability}")
    used, narrower = in_another_process(1, capability=capability)
    assert used == capability.upper()
    assert narrower[0] != digests[1]


@contextmanager
def denormals_flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def without_mkldnn() -> Iterator[None]:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        yield


@pytest.mark.parametrize("change", [denormals_flushed, without_mkldnn])
def test_it_tells_switches_that_change_bits(change: Callable[[], AbstractContextManager[None]]) -> None:
    before = canary()
    with change():
        assert canary() != before
    assert canary() == before


@contextmanager
def default_dtype_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def settings() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "precision": torch.get_float32_matmul_precision(),
    }


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode, default_dtype_float64])
def test_it_is_the_same_in_every_mode_and_leaves_no_trace(mode: Callable[[], AbstractContextManager[None]]) -> None:
    torch.use_deterministic_algorithms(False)
    torch.rand(3)
    np.random.standard_normal()
    with mode():
        before, (document, tensors) = settings(), split_tree(generator_states())
        inside = canary()
        after, (new_document, new_tensors) = settings(), split_tree(generator_states())
    assert inside == canary()
    assert after == before
    assert json_bytes(new_document) == json_bytes(document)
    assert tensor_bytes(new_tensors) == tensor_bytes(tensors)


def test_it_does_not_depend_on_the_global_generators() -> None:
    torch.manual_seed(1)
    one = canary()
    torch.manual_seed(2)
    assert canary() == one


def test_it_is_quick() -> None:
    seconds = []
    for _ in range(3):
        started = time.process_time()
        canary()
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.5
