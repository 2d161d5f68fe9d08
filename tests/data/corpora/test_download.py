import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from file_server import Faults, FileServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonosco_mlflow.data.corpora import download as module
from sonosco_mlflow.data.corpora.download import download, download_all, download_page
from sonosco_mlflow.errors import UserError

SOURCES = Path(module.__file__).parents[3]
CONTENT = bytes(range(256)) * 8  # 2048 bytes
OTHER = CONTENT[::-1]


def show_nothing(done: int, everything: int) -> None:
    pass


def fetch(server: FileServer, fragment: str = "") -> bytes:
    return download(server.address("/a.bin") + fragment, show_nothing).read_bytes()


def sha256(content: bytes) -> str:
    return f"#sha256={hashlib.sha256(content).hexdigest()}"


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (tmp_path / "cache" / "sonosco-mlflow").iterdir())


@pytest.fixture
def tagged(server: FileServer) -> FileServer:
    """A server of one file with an ETag, by which a part of it can be continued."""
    server.files["/a.bin"] = CONTENT
    server.tags["/a.bin"] = '"one"'
    return server


def test_a_broken_line_costs_only_what_had_not_arrived(tagged: FileServer, tmp_path: Path) -> None:
    tagged.faults.cut = 3
    assert fetch(tagged) == CONTENT
    assert tagged.ranges == [None, "bytes=500-", "bytes=1000-", "bytes=1500-"]
    assert cached(tmp_path) == ["a.bin"]


def test_lines_that_bring_something_new_may_break_as_often_as_they_like(tagged: FileServer) -> None:
    tagged.faults = Faults(cut=40, limit=50)
    assert fetch(tagged) == CONTENT


def test_what_brings_nothing_new_is_given_up_and_taken_up_later(tagged: FileServer, tmp_path: Path) -> None:
    tagged.faults.cut = 1
    tagged.faults.on_answer = lambda: setattr(tagged.faults, "errors", -1 if len(tagged.asked) > 1 else 0)
    with pytest.raises(UserError, match=r"could not be downloaded \(HTTP Error 500.*; 500 bytes are here\. Try again"):
        fetch(tagged)
    assert len(tagged.asked) == 5
    assert cached(tmp_path) == ["a.bin.part", "a.bin.part.note"]
    tagged.faults = Faults()
    assert fetch(tagged) == CONTENT
    assert tagged.ranges[-1] == "bytes=500-"


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_a_server_that_recovers_is_asked_again(tagged: FileServer, code: int) -> None:
    tagged.faults = Faults(errors=3, error=code)
    assert fetch(tagged) == CONTENT


def test_a_refusal_is_not_asked_again(server: FileServer) -> None:
    with pytest.raises(UserError, match=r"answered 404 .*\. Check the address"):
        fetch(server)
    assert len(server.asked) == 1


def test_nobody_at_the_address(server: FileServer) -> None:
    with pytest.raises(UserError, match=r"could not be downloaded .*refused"):
        download("http://127.0.0.1:1/a.bin", show_nothing)


def test_a_length_that_is_too_long_is_never_reached(tagged: FileServer, tmp_path: Path) -> None:
    tagged.faults.length_error = 100
    with pytest.raises(UserError, match="could not be downloaded"):
        fetch(tagged)
    assert "a.bin" not in cached(tmp_path)


def test_a_length_that_is_too_short_is_found_by_the_digest(tagged: FileServer, tmp_path: Path) -> None:
    tagged.faults.length_error = -100
    with pytest.raises(UserError, match=r"the sha256 of what arrived is .*, so it was deleted"):
        fetch(tagged, sha256(CONTENT))
    assert cached(tmp_path) == []


def test_a_server_without_ranges_begins_anew(tagged: FileServer) -> None:
    tagged.faults = Faults(cut=2, ignores_ranges=True)
    assert fetch(tagged) == CONTENT
    assert tagged.ranges == [None, "bytes=500-", "bytes=500-"]


def change_after_the_first_answer(server: FileServer, tag: str | None) -> None:
    def change() -> None:
        if len(server.asked) == 2:
            server.files["/a.bin"] = OTHER
            server.tags |= {"/a.bin": tag} if tag else {}

    server.faults.on_answer = change
    server.faults.cut = 1


DATE, LATER = "Fri, 27 Nov 2026 08:00:00 GMT", "Sat, 28 Nov 2026 08:00:00 GMT"


def test_a_date_is_a_version_and_a_weak_tag_is_none(tagged: FileServer, tmp_path: Path) -> None:
    tagged.tags["/a.bin"] = DATE
    tagged.faults.cut = 1
    assert fetch(tagged) == CONTENT
    assert tagged.ranges == [None, "bytes=500-"]
    download(tagged.address("/a.bin"), show_nothing).unlink()
    tagged.asked.clear()
    change_after_the_first_answer(tagged, LATER)
    assert fetch(tagged) == OTHER
    assert tagged.ranges == [None, "bytes=500-"]
    download(tagged.address("/a.bin"), show_nothing).unlink()
    tagged.asked.clear()
    tagged.tags["/a.bin"] = 'W/"one"'
    tagged.faults = Faults(cut=1)
    assert fetch(tagged) == OTHER
    assert tagged.ranges == [None, None]


@pytest.mark.parametrize("ignores", [False, True])
def test_a_file_that_changed_meanwhile_is_fetched_anew(tagged: FileServer, ignores: bool) -> None:
    tagged.faults.ignores_if_range = ignores
    change_after_the_first_answer(tagged, '"two"')
    assert fetch(tagged) == OTHER
    # A server that understands the condition sends the whole at once.
    assert tagged.ranges == [None, "bytes=500-", *([None] if ignores else [])]


def test_a_file_that_changed_its_length_is_fetched_anew(tagged: FileServer) -> None:
    tagged.faults.ignores_if_range = True
    change_after_the_first_answer(tagged, None)
    tagged.files["/a.bin"] = CONTENT + b"and more"
    assert fetch(tagged) == OTHER


def test_without_a_version_or_a_digest_nothing_is_continued(server: FileServer) -> None:
    server.files["/a.bin"] = CONTENT
    change_after_the_first_answer(server, None)
    assert fetch(server) == OTHER
    assert server.ranges == [None, None]


def test_without_a_version_the_digest_tells(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    change_after_the_first_answer(server, None)
    with pytest.raises(UserError, match="the sha256 of what arrived"):
        fetch(server, sha256(CONTENT))
    assert cached(tmp_path) == []


def test_a_rest_that_begins_elsewhere_is_not_taken(tagged: FileServer) -> None:
    tagged.faults = Faults(cut=1, wrong_start=True)
    assert fetch(tagged) == CONTENT
    assert tagged.ranges == [None, "bytes=500-", None]


def test_a_download_stopped_before_its_renaming_is_recognised(tagged: FileServer) -> None:
    path = download(tagged.address("/a.bin"), show_nothing)
    path.rename(path.with_name(f"{path.name}.part"))
    path.with_name(f"{path.name}.part.note").write_text('{"validator": "\\"one\\"", "total": 2048}')
    assert fetch(tagged) == CONTENT
    assert tagged.ranges == [None, "bytes=2048-"]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_digest_vouches_for_the_content(tagged: FileServer, tmp_path: Path, algorithm: str) -> None:
    right = hashlib.new(algorithm, CONTENT).hexdigest()
    assert fetch(tagged, f"#{algorithm}={right.upper()}") == CONTENT
    with pytest.raises(UserError, match=f"the {algorithm} of what arrived is {right}, so it was deleted"):
        fetch(tagged, f"#{algorithm}={right[::-1]}")
    assert cached(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("fragment", ["#md5=1", "#sha1=" + "0" * 40, "#sha256=" + "g" * 64, "#" + "0" * 64])
def test_what_is_no_digest_is_refused(tagged: FileServer, fragment: str) -> None:
    with pytest.raises(UserError, match=r"Expected '#sha256=' and 64, or '#md5=' and 32 hexadecimal digits"):
        fetch(tagged, fragment)
    assert tagged.asked == []


def test_several_come_at_once_with_one_progress(server: FileServer) -> None:
    server.files |= {f"/{n}": bytes([n]) * (n + 1) * 1000 for n in range(6)}
    together = Barrier(4, timeout=30)
    server.lock = replace_lock = Waiting(server, together)
    shown: list[tuple[int, int]] = []
    addresses = [server.address(f"/{n}") for n in (5, 0, 1, 2, 3, 4, 0)]
    paths = download_all(addresses, lambda *counts: shown.append(counts))
    assert [path.read_bytes()[0] for path in paths] == [5, 0, 1, 2, 3, 4, 0]
    assert len(server.asked) == 6
    assert replace_lock.waited == 4
    assert shown[-1] == (21_000, 21_000)
    assert all(here < there for here, there in shown[:-1])
    assert [here for here, _ in shown] == sorted(here for here, _ in shown)


class Waiting:
    """In place of a lock: the first four answers wait until all of them have been asked for."""

    def __init__(self, server: FileServer, barrier: Barrier) -> None:
        self.lock, self.barrier, self.waited, self.server = server.lock, barrier, 0, server

    def __enter__(self) -> None:
        with self.lock:
            self.waited += 1
            waits = self.waited <= 4
            self.waited = min(self.waited, 4)
        if waits:
            self.barrier.wait()
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def test_one_that_fails_stops_the_others_and_what_came_is_kept(server: FileServer, tmp_path: Path) -> None:
    server.files |= {f"/{n}": CONTENT for n in range(8)}
    addresses = [server.address(f"/{n}") for n in range(8)]
    with pytest.raises(UserError, match="answered 404"):
        download_all([*addresses[:2], server.address("/nothing"), *addresses[2:]], show_nothing)
    before = len(server.asked)
    assert before < 9
    assert [path.read_bytes() for path in download_all(addresses, show_nothing)] == [CONTENT] * 8
    assert len([name for name in cached(tmp_path) if not name.endswith((".part", ".note"))]) == 8


def test_two_who_want_one_file_fetch_it_once(tagged: FileServer, tmp_path: Path) -> None:
    tagged.faults.on_answer = lambda: time.sleep(0.2)
    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(lambda _: fetch(tagged), range(4)))
    assert contents == [CONTENT] * 4
    assert len(tagged.asked) == 1
    assert cached(tmp_path) == ["a.bin"]


def test_who_comes_while_another_finds_it_there_finds_it_there_too(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    assert fetch(server) == CONTENT
    # As they are between two looks at the cache: it was not there at the first.
    wanted = module._Wanted.read(server.address("/a.bin"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda _: module._bring(wanted, module._Tally([], show_nothing)), range(8000)):
                pass
    finally:
        sys.setswitchinterval(interval)
    assert len(server.asked) == 1
    assert cached(tmp_path) == ["a.bin"]


def test_a_killed_download_goes_on(tagged: FileServer) -> None:
    tagged.files["/a.bin"] = content = os.urandom(3 << 20)
    code = (
        "import os, signal, sys\n"
        "from sonosco_mlflow.data.corpora.download import download\n"
        "download(sys.argv[1], lambda here, total: here > 1 << 20 and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    command = [sys.executable, "-c", code, tagged.address("/a.bin")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(SOURCES)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert fetch(tagged) == content
    assert tagged.ranges[0] is None
    assert tagged.ranges[1] is not None


def test_a_page_is_read_as_it_is_now_and_to_its_end(server: FileServer, tmp_path: Path) -> None:
    address = server.address("/list/")
    for text in ("<html>one</html>", "<HTML>two</HTML>\n"):
        server.files["/list/"] = text.encode()
        assert download_page(address, show_nothing) == text
    assert cached(tmp_path) == []
    server.files["/list/"] = b"<html>on"
    with pytest.raises(UserError, match="ends without </html>"):
        download_page(address, show_nothing)


faults = st.builds(
    Faults,
    cut=st.integers(0, 1),
    limit=st.integers(0, 3000),
    errors=st.integers(0, 1),
    length_error=st.sampled_from([0, 0, 0, 7]),
    ignores_ranges=st.booleans(),
    ignores_if_range=st.booleans(),
    wrong_start=st.booleans(),
)
versions = st.lists(st.integers(0, 2), min_size=12, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=st.lists(faults, max_size=12), versions=versions, tag=st.sampled_from(["", '"{}"', 'W/"{}"']))
def test_whatever_happens_a_file_is_one_version_or_none(
    server: FileServer, tmp_path: Path, story: list[Faults], versions: list[int], tag: str
) -> None:
    """Each answer of the server is as wrong as the story has it, and of the version that it has."""
    contents = [CONTENT, OTHER, OTHER + b"longer"]
    server.asked.clear()

    def tell() -> None:
        turn = len(server.asked) - 1
        step = story[turn] if turn < len(story) else Faults()
        server.faults = replace(step, on_answer=tell)
        version = versions[turn] if turn < len(versions) else 0
        server.files["/a.bin"] = contents[version]
        server.tags = {"/a.bin": tag.format(version)}

    server.files["/a.bin"] = CONTENT
    server.faults = Faults(on_answer=tell)
    for path in (tmp_path / "cache").rglob("*a.bin*"):
        path.unlink()
    for _ in range(12):
        with suppress(UserError):
            assert fetch(server) in contents
            return
    raise AssertionError("a server that had recovered was not enough")
