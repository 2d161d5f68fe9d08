"""Servers that tests start on this machine: MLflow's, and one that stands in for Amazon's object store."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import boto3

PATIENCE = 180.0
# Browsers refuse it, and so may what stands between.
REFUSED_PORT = 5060


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port if port != REFUSED_PORT else free_port()


class Server:
    """A program that listens on a port of this machine, with a log in ``folder``."""

    name = "server"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def variables(self) -> Mapping[str, str]:
        return {}

    def start(self) -> None:
        """Start it and return when it answers."""
        path = self.folder / f"{self.name}.log"
        with path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.command()],
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, **self.variables()},
            )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with suppress(OSError):
                if self._answers():
                    return
            time.sleep(0.5)
        raise AssertionError(path.read_text()[-2000:])

    def _answers(self) -> bool:
        with suppress(HTTPError), urlopen(f"{self.address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def kill(self) -> None:
        """End all its processes at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class TrackingServer(Server):
    """An MLflow server with one worker over the store in ``folder``; artifacts go through it.

    Args:
        folder: of the store and the log.
        artifacts: where the server keeps them; by default in ``folder``.
        variables: by which the server reaches that place.
    """

    def __init__(self, folder: Path, artifacts: str | None = None, variables: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self.artifacts = artifacts or str(folder / "served")
        self._variables = variables or {}

    def command(self) -> list[str]:
        store = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"]
        place = ["--host", "127.0.0.1", "--port", str(self.port)]
        return ["mlflow", "server", *place, *store, "--artifacts-destination", self.artifacts]

    def variables(self) -> Mapping[str, str]:
        # Its workers for background jobs, a dozen processes that each import all of MLflow, have nothing to do here.
        return {**self._variables, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


class ObjectStore(Server):
    """A stand-in for Amazon's object store, in memory, with an empty bucket ``kept``."""

    name = "object-store"
    credentials = {  # noqa: RUF012
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }

    def command(self) -> list[str]:
        return ["moto.server", "--host", "127.0.0.1", "--port", str(self.port)]

    def start(self) -> None:
        super().start()
        self._client().create_bucket(Bucket="kept")

    def names(self, prefix: str) -> list[str]:
        """Return what stands in the bucket under a prefix."""
        listed = self._client().list_objects_v2(Bucket="kept", Prefix=prefix)
        return [item["Key"] for item in listed.get("Contents", [])]

    def _client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.address,
            region_name=self.credentials["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.credentials["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.credentials["AWS_SECRET_ACCESS_KEY"],
        )

    def _answers(self) -> bool:
        with urlopen(f"{self.address}/moto-api/", timeout=5) as answer:
            return bool(answer.status == 200)

    def client_variables(self) -> dict[str, str]:
        """Return by what MLflow, DVC and their libraries find it."""
        return {**self.credentials, "MLFLOW_S3_ENDPOINT_URL": self.address, "AWS_ENDPOINT_URL": self.address}
