"""Bringing the data of a recipe up to date with DVC.

The project's own ``params.yaml`` and ``dvc.lock`` describe one set of data. A run whose recipe asks for another
(``-P data.corpus=an4``, ``-P features.n_mels=40``) must not rewrite them, nor disturb a run beside it. It gets a DVC
workspace of its own under ``.sonosco/data/<digest of the data recipe>``, with the same stages and the same cache, so
that what is equal is made once, and the same remotes.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sonosco_mlflow.config import Config
from sonosco_mlflow.data.corpora import CORPORA
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.errors import UserError, nearest
from sonosco_mlflow.sections import Corpus
from sonosco_mlflow.settings import yaml_text
from sonosco_mlflow.tracking.data_lock import CORPUS_STAGES, LAST_STAGE
from sonosco_mlflow.tracking.dvc_command import remove_torn
from sonosco_mlflow.tracking.file_lock import locked

STAGE_MESSAGE = "sonosco: "


def prepare_data(config: Config, project: Path) -> DataFolder:
    """Run what must run of the data stages and return the folder with the data of ``config``.

    Args:
        config: the recipe of the run.
        project: folder with ``dvc.yaml`` and ``params.yaml``.

    Raises:
        UserError: there is no pipeline here, no such corpus or source, or a stage failed; then the message is its own.
    """
    project = project.resolve()
    for name, corpus in config.data.corpora.items():
        if corpus.kind not in CORPORA:
            raise UserError(f"data.corpora.{name}.kind: found '{corpus.kind}', {nearest(corpus.kind, CORPORA)}")
    require_pipeline(project)
    require_sources(config, project)
    own = _is_own_recipe(config, project)
    workspace = project if own else workspace_of(config, project)
    with workspace_locked(workspace, project):
        if not own:
            make_private(workspace, config, project)
        reproduce(workspace)
    return DataFolder(workspace / "data")


def ready_data(config: Config, project: Path) -> DataFolder:
    """Return the folder with the data of ``config`` as it lies there, without running anything."""
    project = project.resolve()
    own = _is_own_recipe(config, project)
    return DataFolder((project if own else workspace_of(config, project)) / "data")


def workspace_of(config: Config, project: Path) -> Path:
    """Return the private workspace for the data of ``config``."""
    recipe = json.dumps(_absolute(config, project), sort_keys=True)
    return project / ".sonosco" / "data" / hashlib.sha256(recipe.encode()).hexdigest()[:12]


def require_pipeline(project: Path) -> None:
    """Return if ``project`` is one.

    Raises:
        UserError: there is no pipeline in it.
    """
    if not (project / "dvc.yaml").exists():
        raise UserError(f"{project}: no dvc.yaml here; run in the project's folder")


def require_sources(config: Config, project: Path) -> None:
    """Return if the source of each corpus, where it is none on the web, exists.

    Raises:
        UserError: one does not.
    """
    for name, corpus in config.data.corpora.items():
        source = _local_source(corpus, project)
        if source is not None and not source.exists():
            raise UserError(
                f"data.corpora.{name}.source: found '{corpus.source}', expected an archive or a folder; there is none "
                "of that name"
            )


def require_watched(config: Config, name: str, project: Path) -> None:
    """Return if DVC, which runs the stages in ``project``, sees a change inside the source of a corpus.

    Raises:
        UserError: it does not: the stage does not name the source.
    """
    corpus = config.data.corpora[name]
    source = _local_source(corpus, project)
    if source is None:
        return
    stages = YAML(typ="safe").load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    stage = stages.get(f"corpus-{name}") or stages["corpus"]
    named = [
        path.replace("${item.source}", str(corpus.source)).replace("${key}", name) for path in _commands(stage)["deps"]
    ]
    if not {source, *source.parents} & {(project / path).resolve() for path in named}:
        raise UserError(
            f"{project / 'dvc.yaml'}: the stage corpus does not name '{corpus.source}' among its deps, and DVC would "
            f"not see a changed recording; add the line `- {corpus.source}` to them, or, of several corpora, one that "
            "is each one's own: docs/corpora.md"
        )


def _commands(stage: Any) -> Any:
    """Return what a stage of dvc.yaml does: of one that stands for many, what each of them does."""
    return stage.get("do", stage)


def _local_source(corpus: Corpus, project: Path) -> Path | None:
    """Return the source of a corpus, or None where it is one on the web or needs none."""
    if corpus.source is None or "://" in corpus.source:
        return None
    return (project / Path(corpus.source).expanduser()).resolve()


def workspace_locked(workspace: Path, project: Path) -> AbstractContextManager[None]:
    """Keep other processes from changing ``workspace`` meanwhile."""
    return locked(project / ".sonosco" / "locks" / f"data-{workspace.name}.lock")


def _is_own_recipe(config: Config, project: Path) -> bool:
    # Outside git the project itself is no DVC repository, and the private workspace serves.
    return _inside_git(project) and Config.load(project / "params.yaml").data_recipe == config.data_recipe


def _inside_git(project: Path) -> bool:
    return any((folder / ".git").exists() for folder in (project, *project.parents))


def _absolute(config: Config, project: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads(json.dumps(config.data_recipe))
    for name, corpus in config.data.corpora.items():
        source = _local_source(corpus, project)
        if source is not None:
            recipe["data"]["corpora"][name]["source"] = str(source)
    return recipe


def make_private(workspace: Path, config: Config, project: Path) -> None:
    """Make, or bring up to date, a DVC workspace for the data of ``config``, with the project's stages and code."""
    (workspace / ".dvc").mkdir(parents=True, exist_ok=True)
    share_settings(workspace, project)
    (workspace / ".dvcignore").touch()
    # The same names as in the project, so that the cache of stages serves both.
    code = workspace / "src"
    if not code.is_symlink():
        code.symlink_to(os.path.relpath(project / "src", workspace))
    recipe = _as_written(_absolute(config, project), config, project)
    recipe["data"] |= {"processes": config.data.processes, "cluster": config.data.cluster}
    stages = YAML(typ="safe").load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    chosen = {LAST_STAGE: stages[LAST_STAGE]}
    for name, corpus in config.data.corpora.items():
        for stage in CORPUS_STAGES:
            chosen[f"{stage}-{name}"] = _of_corpus(_commands(stages[stage]), name)
        # The sources of the project's own recipe are none of this one's.
        code_of = [path for path in chosen[f"corpus-{name}"]["deps"] if Path(path).parts[0] == "src"]
        source = _local_source(corpus, project)
        chosen[f"corpus-{name}"]["deps"] = code_of if source is None else [*code_of, str(source)]
    for file_name, content in {"dvc.yaml": {"stages": chosen}, "params.yaml": recipe}.items():
        (workspace / file_name).write_text(yaml_text(content), encoding="utf-8")


def _as_written(recipe: dict[str, Any], config: Config, project: Path) -> dict[str, Any]:
    """Return ``recipe`` in the words of the project's own, where that says the same.

    To DVC a default that stands in ``params.yaml`` is another parameter than one that does not.
    """
    path = project / "params.yaml"
    own, written = Config.load(path), YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    if own.features == config.features and "features" in written:
        recipe["features"] = written["features"]
    corpora = (written.get("data") or {}).get("corpora") or {}
    for name, corpus in config.data.corpora.items():
        if own.data.corpora.get(name) == corpus and name in corpora and _local_source(corpus, project) is None:
            recipe["data"]["corpora"][name] = corpora[name]
    return recipe


def _of_corpus(part: Any, name: str) -> Any:
    """Return a part of a stage that DVC has stand for each corpus, as it is for the corpus ``name``."""
    match part:
        case str():
            return part.replace("${key}", name)
        case dict():
            return {key: _of_corpus(value, name) for key, value in part.items()}
        case list():
            return [_of_corpus(value, name) for value in part]
        case _:
            return part


def share_settings(workspace: Path, project: Path) -> None:
    """Give ``workspace`` DVC's settings of the project: where its cache is, its remotes and how to enter them."""
    # It takes a third of a second to import, and the project's own data needs none of it.
    from dvc.config import Config as Settings

    shared = Settings(str(project / ".dvc"))
    for level, name in (("repo", Settings.CONFIG), ("local", Settings.CONFIG_LOCAL)):
        path = workspace / ".dvc" / name
        # The passwords of a remote may stand in either.
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text("")
        # DVC knows which settings are paths, and that these start from the folder of their file.
        with Settings(str(workspace / ".dvc")).edit(level) as settings:
            settings.update(shared.read(level))
            if level == "repo":
                settings["core"].update({"no_scm": True, "analytics": False})
                settings["cache"].setdefault("dir", str(project / ".dvc" / "cache"))


def borrow_settings(workspace: Path, project: Path) -> None:
    """Let ``workspace``, whose settings are under version control, use the cache and the remotes of ``project``."""
    from dvc.config import Config as Settings

    shared = Settings(str(project / ".dvc"))
    path = workspace / ".dvc" / Settings.CONFIG_LOCAL
    path.touch(mode=0o600)
    with Settings(str(workspace / ".dvc")).edit("local") as settings:
        for level in ("repo", "local"):
            for section in ("cache", "remote", "core"):
                settings[section].update(shared.read(level).get(section, {}))
        settings["cache"].setdefault("dir", str(project / ".dvc" / "cache"))


def remotes(workspace: Path) -> list[str]:
    """Return the names of DVC's remotes that may have data: the default one, or else all."""
    from dvc.config import Config as Settings

    settings = Settings(str(workspace / ".dvc"))
    default = settings["core"].get("remote")
    return list(settings["remote"]) if default is None else [default]


def dvc(
    workspace: Path, *arguments: str, variables: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command of DVC that starts no stages, and return what it says. It may name addresses and passwords."""
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=workspace,
        env={**os.environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def reproduce(workspace: Path) -> None:
    """Run what must run of the data stages.

    Raises:
        UserError: a stage failed; then the message is its own.
    """
    remove_torn(workspace)
    # The stages name `python`: it must be the one that runs now, wherever DVC was called from.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [sys.executable, "-m", "dvc", "repro", LAST_STAGE]
    said = ""
    # DVC tells of its doings on stdout; errors, and the stages' own progress, come on stderr. Its process group is its
    # own, because a stage outlives a DVC that is killed alone.
    with subprocess.Popen(
        command,
        cwd=workspace,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                # A stage's last word is the message; what DVC makes of its exit status says nothing more.
                if line.startswith(STAGE_MESSAGE):
                    said = line.removeprefix(STAGE_MESSAGE).strip()
                elif not said:
                    print(line, end="", file=sys.stderr, flush=True)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode != 0:
        raise UserError(
            said
            or f"the data could not be brought up to date: `dvc repro {LAST_STAGE}` in {workspace} "
            f"ended with status {process.returncode}; its message stands above"
        )
