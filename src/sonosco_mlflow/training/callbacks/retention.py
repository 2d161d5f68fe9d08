"""Which scheduled checkpoints are kept: the last, the best, and each of so many steps.

That follows from their steps and scores alone, so that a training that was continued keeps what one that was never
stopped does.

>>> retention = Retention(last=1, best=1)
>>> for step, loss in {10: 2.0, 20: 1.0, 30: 3.0}.items():
...     retention.rate(step, loss)
...     retention.add(step)
>>> retention.steps
[20, 30]
"""

from collections.abc import Iterable


class Retention:
    """The steps of the checkpoints that are kept.

    Args:
        last: how many of the latest.
        best: how many of those with the lowest score; of equals the earlier is better.
        every_steps: a step that is a multiple of this is kept for good.

    Attributes:
        steps: those that are kept, in their order.
    """

    def __init__(self, last: int, best: int, every_steps: int | None = None) -> None:
        self.last, self.best, self.every_steps = last, best, every_steps
        self.steps: list[int] = []
        self._scores: dict[int, float] = {}

    def rate(self, step: int, score: float) -> None:
        """Note what a step is worth, whether it has a checkpoint or not."""
        self._scores[step] = score

    def is_among_best(self, step: int) -> bool:
        """Return whether a checkpoint of ``step`` would be kept for its score."""
        return step in self._ranked([*self.steps, step])[: self.best]

    def add(self, step: int) -> None:
        """Count a checkpoint, and no longer those that it leaves no place for."""
        known = sorted({*self.steps, step})
        kept = {*known[-self.last :], *self._ranked(known)[: self.best]}
        if self.every_steps is not None:
            kept |= {other for other in known if other % self.every_steps == 0}
        self.steps = sorted(kept)
        self._scores = {other: score for other, score in self._scores.items() if other in kept}

    def best_steps(self, count: int) -> list[int]:
        """Return the best ``count`` of those that are kept, the best first."""
        return self._ranked(self.steps)[:count]

    def _ranked(self, steps: Iterable[int]) -> list[int]:
        # NaN sorts nowhere: it is worth less than any number.
        scored = [
            (score if score == score else float("inf"), step)
            for step in steps
            if (score := self._scores.get(step)) is not None
        ]
        return [step for _, step in sorted(scored)]

    def state_dict(self) -> dict[str, object]:
        """Return which steps are kept, and what they are worth."""
        return {"kept": list(self.steps), "scores": dict(self._scores)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Become what :meth:`state_dict` described."""
        kept, scores = state["kept"], state["scores"]
        assert isinstance(kept, list)
        assert isinstance(scores, dict)
        self.steps, self._scores = list(kept), dict(scores)
