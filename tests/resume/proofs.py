"""What a proof counts: disturbances, runs that came out equal, and how long the recovery took."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from compare import compare_runs
from harness import Ended, World

NewWorld = Callable[..., World]
MOST_FAILURES = 10


@dataclass
class Proof:
    """A line of the table.

    Attributes:
        tried: kills and other disturbances.
        runs: how many runs were compared with an undisturbed one, and how many of them were ``equal``.
        recovery: the longest time from the launch of a process to its first step.
        failures: what :meth:`attempt` has held back.
    """

    scenario: str
    tried: int = 0
    runs: int = 0
    equal: int = 0
    recovery: float = 0.0
    failures: list[str] = field(default_factory=list)

    def note(self, ended: Ended, *, kill: bool = True) -> Ended:
        """Count the disturbance that ended a process, and how long it had taken to make its first step."""
        self.tried += kill
        self.recovery = max(self.recovery, ended.recovery or 0.0)
        return ended

    def finish(self, expected: World, found: World, what: str = "", *, local: bool = True) -> None:
        """Continue ``found`` to its end without disturbance, and demand that it equals ``expected``; then remove it."""
        ended = self.note(found.launch(), kill=False)
        assert ended.status == 0, f"{what}: ended with {ended.status}\n{ended.output}"
        self.check(expected, found, what, local=local)
        found.remove()

    def check(self, expected: World, found: World, what: str = "", *, local: bool = True) -> None:
        """Demand that two finished runs are equal."""
        self.runs += 1
        differences = compare_runs(expected, found, local=local)
        assert not differences, f"{what}\nwhat differs, undisturbed and disturbed, in {found.folder}:\n{differences}"
        self.equal += 1

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let the next ones be tried although this one failed; :meth:`conclude` tells."""
        try:
            yield
        except AssertionError as error:
            self.failures.append(str(error))

    def conclude(self) -> None:
        """Fail if an attempt has."""
        report = "\n\n".join(self.failures[:MOST_FAILURES])
        assert not self.failures, f"{len(self.failures)} attempts failed:\n{report}"
