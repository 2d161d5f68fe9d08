"""A process that is not to outlive the one that has started it."""

import os
import threading
import time

_SECONDS_BETWEEN_LOOKS = 0.5


def end_with_parent() -> None:
    """Have this process end, as if it were killed, soon after its parent has ended, however that was.

    Nobody is left who would take what it makes, and a successor may already be at the same work.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), name="sonosco-orphans", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)
