"""The house is built in storeys: imports run one way only."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "sonosco_mlflow"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# From the bottom to the top: a module may import its own storey and those before it.
STOREYS = [
    *(
        "errors",
        "settings",
        "sections",
        "config",
        "decisive",
        "console",
        "text",
        "background",
        "processes",
        "digests",
        "serialization",
        "word_pieces",
        "vocabulary",
        "determinism",
        "canary",
        "data",
    ),
    *("decoding", "models", "metrics", "training", "testing", "tracking", "pictures", "pages", "evaluation"),
    *("serving", "reporting", "manifest_report"),
    *(
        "experiment",
        "recipe",
        "language_models",
        "preview",
        "outcome",
        "runs",
        "trained",
        "search_space",
        "sweep",
        "reproduction",
        "overview",
        "difference_report",
        "cli",
        "__main__",
    ),
]

# Where each of these may be imported; whatever is not listed here may be used anywhere.
HOMES = {
    "mlflow": {"tracking", "serving"},  # serving is MLflow's own flavour of a model
    "dvc": {"tracking"},
    "dvc_data": {"tracking"},
    "git": {"tracking"},
    "sentencepiece": {"word_pieces"},
    "typer": {"cli"},
    "matplotlib": {"evaluation", "pictures"},
    "jinja2": {"pages"},
    "flashlight": set(),  # by way of torchaudio alone
    "optuna": {"search_space", "sweep"},
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def storey(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that ``path`` imports, in functions too, and in branches for the type checker."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == PACKAGE)


def test_every_module_has_its_storey() -> None:
    assert {storey(path) for path in modules()} - {"__init__"} == set(STOREYS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    here = storey(path)
    if here == "__init__":
        return
    for name in imported(path):
        root, _, rest = name.partition(".")
        if root == PACKAGE and rest:
            assert STOREYS.index(rest.split(".")[0]) <= STOREYS.index(here), f"{path} imports {name}"
        assert here in HOMES.get(root, {here}), f"{path} imports {name}"


def test_serialization_knows_nothing_of_speech() -> None:
    allowed = {"errors", "serialization"}
    for path in (SOURCE / "serialization").glob("*.py"):
        used = {name.split(".")[1] for name in imported(path) if name.startswith(PACKAGE + ".")}
        assert used <= allowed, f"{path} imports {used - allowed}"


def test_training_knows_nothing_of_models_and_tracking() -> None:
    for path in (SOURCE / "training").rglob("*.py"):
        used = {name.split(".")[1] for name in imported(path) if name.startswith(PACKAGE + ".")}
        assert not used & {"models", "tracking", "experiment", "config"}, f"{path} imports {used}"


def loaded_by(program: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after ``program``."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    program += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sonosco_mlflow", {"torch", "mlflow", "numpy", "pydantic", "rich"}),
        ("sonosco_mlflow.errors", {"torch", "mlflow", "numpy", "pydantic"}),
        ("sonosco_mlflow.config", {"torch", "mlflow", "numpy"}),
        ("sonosco_mlflow.text", {"torch", "mlflow", "numpy"}),
        ("sonosco_mlflow.serialization.serializer", {"torch", "mlflow", "numpy"}),
        ("sonosco_mlflow.determinism", {"torch", "mlflow"}),
        ("sonosco_mlflow.data.manifest", {"torch", "mlflow"}),
        ("sonosco_mlflow.data.batching", {"torch", "mlflow"}),
        ("sonosco_mlflow.metrics", {"torch", "mlflow", "jiwer"}),
        ("sonosco_mlflow.training.trainer", {"mlflow", "dvc", "git", "pydantic"}),
    ],
)
def test_low_modules_load_only_what_they_need(module: str, absent: set[str]) -> None:
    assert not loaded_by(f"import {module}") & absent


def test_importing_the_package_is_quick() -> None:
    """Measured inside the interpreter, so that its own start does not count; the best of three."""
    program = f"import time; t = time.perf_counter(); import {PACKAGE}; print(time.perf_counter() - t)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    seconds = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.2
