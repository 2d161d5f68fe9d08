"""What ``dvc.lock`` says of the data: which stages made it, with which outputs.

DVC names the stage of a corpus ``features@an4`` where ``dvc.yaml`` has it made for each corpus, as the project's has.
A stage cannot be given that name, so in a private workspace it is ``features-an4``.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sonosco_mlflow.config import Config
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.settings import yaml_text

CORPUS_STAGES = ("corpus", "manifests", "features")
"""The stages of each corpus."""
LAST_STAGE = "dataset"


def stage_outputs(folder: DataFolder) -> dict[str, str]:
    """Return DVC's digest of each data output, by its path below the workspace, as ``dvc.lock`` states it."""
    return {output["path"]: output["md5"] for stage in locked_stages(folder).values() for output in stage["outs"]}


def lock_text(folder: DataFolder) -> str | None:
    """Return the ``dvc.lock`` of the data stages alone, by which DVC can bring the data again, or None without one."""
    stages = locked_stages(folder)
    return _lock(stages) if stages else None


def private_lock(text: str) -> str:
    """Return what :func:`lock_text` returned as the ``dvc.lock`` of a private workspace."""
    stages = YAML(typ="safe").load(text)["stages"]
    return _lock({name.replace("@", "-"): stage for name, stage in stages.items()})


def _lock(stages: Mapping[str, Any]) -> str:
    return yaml_text({"schema": "2.0", "stages": stages})


def locked_stages(folder: DataFolder) -> dict[str, Any]:
    """Return what ``dvc.lock`` says of the stages that made the dataset, named as in the project.

    Nothing where none was made; of a corpus that is no longer part of it, DVC goes on to tell, and this does not.
    """
    stages = _all_locked(folder.root.parent)
    if LAST_STAGE not in stages:
        return {}
    corpora = stages[LAST_STAGE]["params"]["params.yaml"]["data.corpora"]
    own = {f"{stage}{mark}{name}": f"{stage}@{name}" for name in corpora for stage in CORPUS_STAGES for mark in "@-"}
    return {own.get(name, name): stage for name, stage in stages.items() if name in own or name == LAST_STAGE}


def _all_locked(workspace: Path) -> dict[str, Any]:
    lock = workspace / "dvc.lock"
    stages: dict[str, Any] = YAML(typ="safe").load(lock.read_text("utf-8")).get("stages", {}) if lock.exists() else {}
    return stages


def remove_former(config: Config, workspace: Path) -> None:
    """Remove what DVC made of corpora that are no longer part of the recipe.

    DVC lets it lie. The stages that depend on the folders of all corpora would have other inputs here than where those
    never were.
    """
    for name, stage in _all_locked(workspace).items():
        kind, _, corpus = name.partition("@")
        if kind in CORPUS_STAGES and corpus not in config.data.corpora:
            for output in stage["outs"]:
                shutil.rmtree(workspace / output["path"], ignore_errors=True)
