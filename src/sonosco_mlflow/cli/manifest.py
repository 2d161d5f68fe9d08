"""The verbs that work on manifests: ``sonosco manifest ...``."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sonosco_mlflow.cli.app import app
from sonosco_mlflow.errors import UserError

if TYPE_CHECKING:
    from sonosco_mlflow.data.manifest import Manifest
    from sonosco_mlflow.data.manifest_tools.findings import Finding

manifest = typer.Typer(no_args_is_help=True, help="Make, check, cut and look at manifests.")
app.add_typer(manifest, name="manifest")

One = Annotated[Path, typer.Argument(help="A manifest.")]
Several = Annotated[list[Path], typer.Argument(help="Manifests, one or more.")]
Into = Annotated[Path, typer.Option(help="The new manifest; nothing else may stand there.")]
VocabularyFile = Annotated[Path | None, typer.Option(help="A vocabulary.json; other characters are findings.")]
RowsOnly = Annotated[bool, typer.Option("--rows-only", help="Open no recordings.")]
SampleRate = Annotated[int, typer.Option(help="Hz that each recording should have.")]
Channels = Annotated[int, typer.Option(help="Channels that each recording should have.")]
Processes = Annotated[int, typer.Option(min=1, help="How many open recordings at once.")]
CPUS = os.cpu_count() or 1


@manifest.command()
def create(
    folder: Annotated[Path, typer.Argument(help="wav/x.wav with txt/x.txt, or x.txt beside x.flac.")],
    into: Into,
    prefix: Annotated[str, typer.Option(help="What each id begins with.")] = "",
    processes: Processes = CPUS,
) -> None:
    """Make a manifest of a folder with recordings and their transcripts."""
    from sonosco_mlflow.console import stage_progress
    from sonosco_mlflow.data.manifest_tools.editing import create, write_new

    with stage_progress() as progress:
        made = create(folder, into, prefix, processes, lambda done, total: progress("recordings", done, total))
    write_new(made, into)
    _say_written(into, made)


@manifest.command()
def validate(
    manifests: Several,
    vocabulary: VocabularyFile = None,
    rows_only: RowsOnly = False,
    sample_rate: SampleRate = 16_000,
    channels: Channels = 1,
    processes: Processes = CPUS,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each finding.")] = False,
) -> None:
    """Say what is wrong with manifests and their recordings, row by row; status 1 where anything is."""
    counts: Counter[str] = Counter()
    for finding in _findings(manifests, vocabulary, rows_only, sample_rate, channels, processes):
        counts[finding.check] += 1
        typer.echo(finding.to_json() if as_json else str(finding))
    summary = ", ".join(f"{count} {check}" for check, count in counts.items())
    typer.echo(f"findings: {summary}" if counts else "no findings", err=True)
    if counts:
        raise typer.Exit(1)


@manifest.command()
def merge(manifests: Several, into: Into) -> None:
    """Make one manifest of several."""
    from sonosco_mlflow.data.manifest_tools.editing import merge, write_new

    merged = merge(manifests, into)
    write_new(merged, into)
    _say_written(into, merged)


@manifest.command("filter")
def filter_(
    path: One,
    into: Into,
    min_duration: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    max_duration: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    min_rate: Annotated[float | None, typer.Option(help="Characters a second.")] = None,
    max_rate: Annotated[float | None, typer.Option(help="Characters a second.")] = None,
) -> None:
    """Make a manifest of the utterances that keep to limits, and say what the others were."""
    from sonosco_mlflow.data.manifest_tools.editing import Limits, dropped_text, keep_within, read, write_new

    kept, dropped = keep_within(read(path), Limits(min_duration, max_duration, min_rate, max_rate))
    write_new(kept, into)
    for line in dropped_text(dropped):
        typer.echo(line)
    _say_written(into, kept)


@manifest.command()
def split(
    path: One,
    into: Annotated[Path, typer.Option(help="The folder for a manifest of each split.")],
    ratios: Annotated[str, typer.Option(help="Splits and their shares.")] = "dev=0.1,test=0.1,train=0.8",
    by: Annotated[Literal["speaker", "utterance"], typer.Option(help="What stays together.")] = "speaker",
    seed: Annotated[int, typer.Option(help="Another one cuts otherwise.")] = 0,
) -> None:
    """Cut a manifest into splits; rows that are added later move none that was there."""
    from sonosco_mlflow.data.manifest_tools.editing import parse_ratios, read, split, write_new

    for name, part in split(read(path), parse_ratios(ratios), by, seed).items():
        write_new(part, into / f"{name}.jsonl")
        _say_written(into / f"{name}.jsonl", part)


@manifest.command()
def stats(
    manifests: Several,
    picture: Annotated[Path | None, typer.Option(help="Draw the histograms into this .png file.")] = None,
) -> None:
    """Count hours, speakers and words, and show how durations and rates of speech are spread."""
    from sonosco_mlflow.data.manifest import Manifest
    from sonosco_mlflow.data.manifest_tools.statistics import statistics_of

    _require_suffix("--picture", picture, ".png")
    found = statistics_of(utterance for path in manifests for utterance in Manifest.read(path))
    typer.echo(str(found))
    if picture is not None:
        from sonosco_mlflow.pictures import histograms

        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(histograms(found.histograms))
        typer.echo(f"written: {picture}")


@manifest.command()
def report(
    manifests: Several,
    into: Annotated[Path, typer.Option(help="The .html file.")],
    vocabulary: VocabularyFile = None,
    rows_only: RowsOnly = False,
    sample_rate: SampleRate = 16_000,
    channels: Channels = 1,
    processes: Processes = CPUS,
    most_megabytes: Annotated[float, typer.Option(min=1, help="Of the page; sounds beyond it are left out.")] = 20,
) -> None:
    """Write one page with statistics, pictures, findings, and the rows to listen to."""
    from sonosco_mlflow.manifest_report import report

    _require_suffix("--into", into, ".html")
    found = _findings(manifests, vocabulary, rows_only, sample_rate, channels, processes)
    page = report(manifests, found, int(most_megabytes * 1e6))
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text(page, encoding="utf-8")
    typer.echo(f"written: {into}")


def _findings(
    manifests: list[Path], vocabulary: Path | None, rows_only: bool, sample_rate: int, channels: int, processes: int
) -> "Iterator[Finding]":
    from sonosco_mlflow.console import stage_progress
    from sonosco_mlflow.data.manifest_tools.recordings import Expected
    from sonosco_mlflow.data.manifest_tools.validation import findings_of

    expected = None if rows_only else Expected(sample_rate, channels)
    with stage_progress() as progress:
        yield from findings_of(
            manifests, vocabulary, expected, processes, lambda done, total: progress("recordings", done, total)
        )


def _require_suffix(option: str, path: Path | None, suffix: str) -> None:
    """Return if ``path`` has the suffix of what is to be written: else, by a slip, a manifest might stand there.

    Raises:
        UserError: it has another.
    """
    if path is not None and path.suffix.lower() != suffix:
        raise UserError(f"{option}: found '{path}', expected the name of a {suffix} file, which it replaces")


def _say_written(path: Path, made: "Manifest") -> None:
    typer.echo(f"{path}: {len(made)} utterances, {made.hours:.2f} h, {len(made.speakers)} speakers")
