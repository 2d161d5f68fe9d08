"""Tracking servers that go away: a client that is refused for a while, a real server, and a wire that is cut."""

import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import mlflow
from mlflow.exceptions import MlflowException

SECONDS_AWAY = 4.0
# Browsers refuse it, and so may what stands between.
REFUSED_PORT = 5060
PATIENCE = 180.0
REQUEST = "API request to http://127.0.0.1:1/api/2.0/mlflow/runs/log-batch"


def client_is_refused() -> None:
    """In this process: the third batch of metrics arrives, its answer does not; then nothing arrives for a while."""
    since = [0.0]

    def answer(log: Callable[[], Any], number: int) -> Any:
        if number == 3:
            log()
            since[0] = time.monotonic()
        if since[0] and time.monotonic() - since[0] < SECONDS_AWAY:
            raise MlflowException(f"{REQUEST} failed with exception refused")
        return log()

    _answer_batches(answer)


def client_hangs() -> None:
    """In this process: the third batch of metrics is neither answered nor refused for a while."""

    def answer(log: Callable[[], Any], number: int) -> Any:
        if number == 3:
            time.sleep(SECONDS_AWAY)
            raise MlflowException(f"{REQUEST} failed with exception read timed out")
        return log()

    _answer_batches(answer)


def _answer_batches(answer: Callable[[Callable[[], Any], int], Any]) -> None:
    original, numbers = mlflow.MlflowClient.log_batch, itertools.count(1)

    def log_batch(self: Any, *arguments: Any, **options: Any) -> Any:
        return answer(partial(original, self, *arguments, **options), next(numbers))

    mlflow.MlflowClient.log_batch = log_batch


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port if port != REFUSED_PORT else free_port()


class Server:
    """An MLflow server with one worker over the store in ``folder``; artifacts go through it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and return when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        store = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"]
        artifacts = ["--artifacts-destination", str(self.folder / "served")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *store, *artifacts], stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with suppress(OSError), urlopen(f"{self.address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.5)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """End all its processes at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Wire:
    """A port that leads to another one, until it is told to cut answers in their middle, or to refuse."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.state = "whole"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            if self.state == "refused":
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                other = {client: server, server: client}
                while True:
                    for readable in select.select([client, server], [], [])[0]:
                        content = readable.recv(65536)
                        if not content or (self.state == "refused"):
                            return
                        if readable is server and self.state == "cut":
                            # The server has done what it was asked for; nobody will know.
                            client.sendall(content[:10])
                            return
                        other[readable].sendall(content)
