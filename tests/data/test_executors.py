import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from project import PATIENCE, REPOSITORY, make_after_corpus
from sonosco_mlflow.config import Config
from sonosco_mlflow.data import executors
from sonosco_mlflow.data.executors import Cluster, Executor, Processes
from sonosco_mlflow.data.extraction import extract_features
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError
from toy import PROCESSOR, tone_corpus, tone_texts

SOURCES = str(REPOSITORY / "src")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a small cluster: two workers, each a process of its own."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1"
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(params=["one process", "two processes", "cluster"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "cluster":
        return Cluster(request.getfixturevalue("scheduler"))
    return Processes(1 if request.param == "one process" else 2)


def slow_square(number: int) -> tuple[int, int, int]:
    # The first ones take the longest, so that they end last.
    time.sleep(max(0.0, 0.1 - number / 50))
    return number * number, os.getpid(), torch.get_num_threads()


def refused(number: int) -> int:
    if number == 3:
        raise UserError("three is refused")
    return number


def test_results_come_in_the_order_of_the_tasks(executor: Executor) -> None:
    results = list(executor.map(slow_square, range(20)))
    assert [square for square, _, _ in results] == [number * number for number in range(20)]
    assert {threads for _, _, threads in results} == {1}
    assert os.getpid() not in {pid for _, pid, _ in results}


def test_there_may_be_nothing_to_do(executor: Executor) -> None:
    assert list(executor.map(slow_square, [])) == []


def test_an_error_of_a_task_is_raised_here(executor: Executor) -> None:
    results = executor.map(refused, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="three is refused"):
        next(results)


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_is_killed_is_not_waited_for(count: int) -> None:
    with pytest.raises(UserError, match=r"one of . processes was killed .* set data\.processes"):
        list(Processes(count).map(killed, range(20)))


def test_no_process_is_left_when_all_is_done() -> None:
    results = Processes(2).map(slow_square, range(20))
    # Nobody asks whether there is one more.
    workers = {next(results)[1] for _ in range(20)}
    del results
    assert not any(map(psutil.pid_exists, workers))


def test_processes_end_with_whoever_began_them(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from sonosco_mlflow.data.executors import Processes\n"
        f"def task(number): (Path({str(tmp_path)!r}) / str(__import__('os').getpid())).touch(); time.sleep(600)\n"
        "list(Processes(2).map(task, range(4)))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": SOURCES})
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.wait()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    wait_for(lambda: not any(map(psutil.pid_exists, workers)))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_cluster_without_workers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(executors, "_SECONDS_FOR_A_WORKER", 1)
    with distributed.LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", host="127.0.0.1") as empty:
        address = re.escape(empty.scheduler_address)
        with pytest.raises(UserError, match=rf"the scheduler at '{address}' has no worker; start one"):
            list(Cluster(empty.scheduler_address).map(abs, [1]))


def test_a_cluster_extracts_the_same_bytes(scheduler: str, tone_manifest: Manifest, tmp_path: Path) -> None:
    here = extract_features(tone_manifest, PROCESSOR, tmp_path / "here")
    there = extract_features(tone_manifest, PROCESSOR, tmp_path / "there", executor=Cluster(scheduler))
    assert there.digest == here.digest


def test_no_more_tasks_are_out_than_keep_the_workers_busy(executor: Executor, tmp_path: Path) -> None:
    workers = executor.count if isinstance(executor, Processes) else 2
    results = executor.map(touched, [tmp_path / str(number) for number in range(40)])
    next(results)
    time.sleep(1.0)
    assert len(list(tmp_path.iterdir())) == 4 * workers
    assert len(list(results)) == 39


def taking_two_threads(number: int) -> int:
    found = torch.get_num_threads()
    torch.set_num_threads(2)
    return found


def test_a_task_on_a_cluster_has_one_thread_whatever_the_worker_had(scheduler: str) -> None:
    assert list(Cluster(scheduler).map(taking_two_threads, range(6))) == [1] * 6


def touched(path: Path) -> None:
    path.touch()


def test_a_recipe_names_its_cluster(scheduler: str, tmp_path: Path) -> None:
    digests = []
    for name, cluster in (("here", "null"), ("there", scheduler)):
        folder = DataFolder(tmp_path / name)
        for split in ("train", "dev", "test"):
            tone_corpus(folder.corpus("default"), tone_texts(6)).write(folder.corpus("default") / f"{split}.jsonl")
        config = Config.resolve({"features": {"n_mels": 8}}, {"data.cluster": cluster})
        make_after_corpus(config, folder)
        digests.append([path.read_bytes() for path in sorted(folder.features("default").rglob("*.*"))])
        assert not (folder.root / ".unfinished").exists()
    assert digests[0] == digests[1]


def test_a_cluster_that_is_not_there_is_named() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(UserError, match=r"data\.cluster: no scheduler of dask's answers at 'tcp://127\.0\.0\.1:9'"):
        list(Cluster("tcp://127.0.0.1:9").map(abs, [1]))


def test_without_dask_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"data\.cluster: found 'tcp://x:1', but dask\.distributed is not installed"):
        list(Cluster("tcp://x:1").map(abs, [1]))
