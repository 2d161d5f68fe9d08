"""Pictures as bytes of a PNG that depend on the data alone, and those that need no model."""

import io
import warnings
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sonosco_mlflow.data.manifest_tools.statistics import Histogram

_BLUE, _ORANGE = "#3a78b5", "#c87000"


def histograms(shown: Sequence[Histogram]) -> bytes:
    """Return a PNG of histograms side by side; empty ones are left out."""
    shown = [histogram for histogram in shown if histogram.counts]
    figure = Figure(figsize=(3.4 * max(1, len(shown)), 2.8), layout="constrained")
    for axes, histogram in zip(figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown, strict=False):
        step = histogram.edges[1] - histogram.edges[0]
        colours = [_BLUE] * (len(histogram.counts) - 1) + [_ORANGE]
        style = {"width": step, "align": "edge", "edgecolor": "white", "linewidth": 0.6}
        # What lies above the last edge has a bar of its own beyond it.
        bars = len(histogram.counts) if histogram.counts[-1] else len(histogram.counts) - 1
        axes.bar(histogram.edges[:bars], histogram.counts[:bars], color=colours[:bars], **style)
        if histogram.counts[-1]:
            above = f"{histogram.counts[-1]:,} above {histogram.edges[-1]:g}"
            axes.annotate(above, (1, 1), xycoords="axes fraction", ha="right", va="top", color=_ORANGE, fontsize=9)
        axes.set_title(histogram.name, fontsize=10)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A transcript may hold characters that the font lacks: they become boxes.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        # Without the software's version in its metadata the picture depends on the data alone.
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
