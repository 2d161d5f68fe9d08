"""The difference of two runs for a reader: as text in the terminal, and as one page of HTML that needs nothing else."""

from pathlib import Path

from sonosco_mlflow.evaluation import compared_curves
from sonosco_mlflow.pages import data_address, page
from sonosco_mlflow.tracking.difference import Difference

# A terminal shows the beginning of a long list; the page has all of it.
_MOST_LINES = 12


def difference_text(found: Difference) -> str:
    """Return the difference as text: the likely cause, then inputs, then outcomes, then the code."""
    one, other = found.runs
    lines = [f"a  {one.run_id}  {one.name}, {one.state}", f"b  {other.run_id}  {other.name}, {other.state}", ""]
    lines += [f"likely cause  {found.cause}"] if found.comparison.partings else [found.cause]
    first = found.comparison.first
    if first is not None:
        lines.append(f"they part at  step {first.step}: {first.what}")
    weights = {None: "not both have final ones", True: "the same, to the last bit", False: "other ones"}
    lines += [f"weights       {weights[found.same_weights]}", *found.branches]
    for change in found.changes:
        lines += ["", change.name + ("" if change.matters else " (can have changed nothing)")]
        lines += [f"  {line}" for line in change.what[:_MOST_LINES]]
        more = len(change.what) - _MOST_LINES
        lines += [f"  and {more} more; --html shows all"] if more > 0 else []
    lines += ["", f"{'metric':<28} {'a, last':>12} {'b, last':>12} {'a, lowest':>12} {'b, lowest':>12}"]
    lines += [
        f"{pair.name:<28} " + " ".join(f"{_number(value):>12}" for value in (*pair.last, *pair.lowest))
        for pair in found.metrics
    ]
    return "\n".join(lines) + "\n" + (f"\n{found.code}" if found.code else "")


def difference_page(found: Difference) -> str:
    """Return the difference as a page of HTML; its picture is part of it."""
    # A single point says no more than its row in the table.
    names = {name for curves in found.curves for name, (steps, _) in curves.items() if len(steps) > 1}
    shown = [
        {name: curve for name, curve in curves.items() if name in names and name.endswith(("loss", "error_rate"))}
        for curves in found.curves
    ]
    picture = data_address(compared_curves(shown[0], shown[1]), "image/png")
    return page("difference.html", found=found, picture=picture, code_lines=found.code.splitlines(), number=_number)


def write_difference_page(found: Difference, path: Path) -> None:
    """Write the page to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(difference_page(found), encoding="utf-8")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
