"""Tracking servers that go away: a client that is refused for a while, and a wire that is cut."""

import itertools
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

SECONDS_AWAY = 4.0
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
