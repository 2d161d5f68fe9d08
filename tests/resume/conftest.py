"""What the proofs share: runs that nothing befell, a run that was killed, and the table printed at their end."""

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import World, make_template, new_world
from proofs import NewWorld, Proof

from toy import tone_corpus, tone_texts

TITLE = ("scenario", "kills tried", "bitwise equal", "longest recovery, s")
LAST_STEP = 4
PATIENCE = 120.0
ENOUGH_MEMORY = 2 * 1024**3
NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder for worlds: in memory where there is enough of it, because a SIGKILL loses nothing there either.

    SQLite waits for the disk several hundred times in a run.
    """
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < ENOUGH_MEMORY:
        yield tmp_path_factory.mktemp("worlds")
        return
    with tempfile.TemporaryDirectory(prefix="sonosco-resume-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def template(place: Path, empty_database: Path) -> Path:
    folder = make_template(place / "template", empty_database)
    tone_corpus(folder / "corpus", tone_texts(20)).write(folder / "corpus" / "manifest.jsonl")
    return folder


@pytest.fixture
def make_world(template: Path, place: Path) -> NewWorld:
    """Return a function that makes the world of a run that has not begun."""
    return lambda **settings: new_world(place / f"world-{next(NUMBERS)}", template, **settings)


@pytest.fixture(scope="session")
def undisturbed(template: Path, place: Path) -> NewWorld:
    """Return a function that returns the finished run of the given settings, which nothing befell."""
    known: dict[str, World] = {}

    def finished(**settings: Any) -> World:
        key = repr(sorted(settings.items()))
        if key not in known:
            known[key] = new_world(place / f"undisturbed-{len(known)}", template, **settings).finish()
        return known[key]

    return finished


@pytest.fixture(scope="session")
def killed_world(template: Path, place: Path) -> World:
    """A run that was killed in its last step, with the checkpoint before it whole on the disk and in MLflow."""
    world = new_world(place / "killed", template)
    process = world.begin(hold=LAST_STEP)
    deadline = time.monotonic() + PATIENCE
    while process.lives and time.monotonic() < deadline:
        run_id = process.run_id
        if run_id and world.client.get_run(run_id).data.tags.get("sonosco.checkpoint", "").endswith("3"):
            break
        time.sleep(0.2)
    process.kill()
    ended = world.end(process)
    assert ended.killed, ended.output
    assert world.run.data.tags["sonosco.checkpoint"] == "checkpoints/step-00000003"
    return world


@pytest.fixture
def killed_copy(killed_world: World, place: Path) -> Callable[[], World]:
    """Return a function that returns a copy of that run, to be spoiled."""
    return lambda: killed_world.copy(place / f"killed-{next(NUMBERS)}")


@pytest.fixture
def proof(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Proof]:
    made = Proof(request.node.name.removeprefix("test_").replace("_", " "))
    yield made
    if made.tried:
        record_property("proof", [made.scenario, made.tried, made.runs, made.equal, made.recovery])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one table of all proofs; the reports bring their lines from other processes too."""
    # Of every group: a line is written when its test is torn down, and a report of that is in none that has a name.
    reports = [report for group in terminalreporter.stats.values() for report in group]
    lines = {
        tuple(content): None
        for report in reports
        for name, content in getattr(report, "user_properties", [])
        if name == "proof"
    }
    if not lines:
        return
    rows = [
        (scenario, str(tried), f"{equal} of {runs}", f"{recovery:.1f}" if recovery else "-")
        for scenario, tried, runs, equal, recovery in sorted(lines)
    ]
    widths = [max(map(len, column)) for column in zip(TITLE, *rows, strict=True)]
    terminalreporter.section("exact resume")
    for row in (TITLE, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        terminalreporter.write_line("  ".join([row[0].ljust(widths[0]), *cells]))
