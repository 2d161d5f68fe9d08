import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sonosco_mlflow.decisive import decisive
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.tracking.code_snapshot import CodeSnapshot, snapshot_code
from sonosco_mlflow.tracking.environment import Environment
from sonosco_mlflow.tracking.identity import (
    CHANGE_OF,
    CHANGES,
    check_identity,
    code_difference,
    config_difference,
    data_difference,
    environment_difference,
    numerics_difference,
)
from sonosco_mlflow.tracking.lineage import DataLineage
from sonosco_mlflow.tracking.origin import Command, Origin

RECORDED = {name: f"old-{name}" for name in CHANGE_OF}
FLAGS = {
    "config": "--allow-config-change",
    "trainer": "--allow-config-change",
    "code": "--allow-code-change",
    "imported": "--allow-code-change",
    "data": "--allow-data-change",
    "vocabulary": "--allow-vocabulary-change",
    "batches": "--allow-data-change",
    "environment": "--allow-environment-change",
    "threads": "--allow-numerics-change",
    "canary": "--allow-numerics-change",
    "precision": "--allow-numerics-change",
}
ENVIRONMENT = Environment(
    "numpy==2.0.0\ntorch==2.11.0\n",
    {
        "python": "3.11.7",
        "machine": "x86_64",
        "processor": "one",
        "capability": "AVX2",
        "threads": 1,
        "canary": "c1",
        "variables": {},
    },
)
LINEAGE = DataLineage({"train": "a" * 64, "dev": "b" * 64}, "v1", {"data/manifests": "m1", "data/features": "f1"}, {})


def check(present: dict[str, str], *allowed: str) -> dict[str, tuple[str, str]]:
    explain = {name: (lambda name=name: f"how {name} differs") for name in CHANGE_OF}
    return check_identity("ab12", RECORDED, present, frozenset(allowed), explain)


def test_what_is_the_same_differs_in_nothing() -> None:
    assert check(RECORDED) == {}


@pytest.mark.parametrize("name", CHANGE_OF)
def test_a_difference_is_refused_and_says_how_and_what_allows_it(name: str) -> None:
    with pytest.raises(UserError) as raised:
        check({**RECORDED, name: "new"}, *(set(CHANGES) - {CHANGE_OF[name]}))
    message = str(raised.value)
    assert message.startswith("run ab12 would not continue as it began:\n")
    assert message.count("how ") == 1
    assert f"\n  {name}: how {name} differs\n" in message
    assert message.count("--allow-") == 1
    assert f"pass {FLAGS[name]}: " in message


@pytest.mark.parametrize("name", CHANGE_OF)
def test_one_that_is_allowed_is_returned(name: str) -> None:
    assert check({**RECORDED, name: "new"}, CHANGE_OF[name]) == {name: (f"old-{name}", "new")}


def test_all_that_is_refused_stands_in_one_message_and_what_is_allowed_does_not() -> None:
    present = dict.fromkeys(CHANGE_OF, "new")
    with pytest.raises(UserError) as raised:
        check(present, "code")
    message = str(raised.value)
    assert all((f"how {name} differs" in message) == (change != "code") for name, change in CHANGE_OF.items())
    # Two digests of one change share its flag.
    assert message.count("--allow-data-change") == message.count("--allow-numerics-change") == 1
    assert check(present, *CHANGES).keys() == CHANGE_OF.keys()


def test_what_one_side_does_not_know_is_not_compared() -> None:
    assert check({}) == {}
    assert check({**RECORDED, "new kind": "x"}) == {}
    assert check_identity("ab12", {}, RECORDED, frozenset(), {}) == {}


def test_a_config_difference_names_keys_and_both_values() -> None:
    was = {"optimizer": {"lr": 0.1, "name": "adam"}, "schedule": {"epochs": [1, 2]}, "gone": None}
    now = {"optimizer": {"lr": 0.2, "name": "adam"}, "schedule": {"epochs": [1, 3]}, "come": "x"}
    recorded, present = (decisive(settings, is_recipe=False) for settings in (was, now))
    assert config_difference(recorded, present) == (
        "optimizer.lr was 0.1, is 0.2, schedule.epochs was '[1, 2]', is '[1, 3]', come was None, is 'x'"
    )


def test_equal_recipes_under_another_digest_are_told_so() -> None:
    assert "not the one whose digest it recorded" in config_difference({"a": 1}, {"a": 1})


def test_of_many_names_the_first_are_listed() -> None:
    text = config_difference({f"key{number}": 1 for number in range(9)}, {})
    assert text.count("key") == 6
    assert text.endswith(" and 3 more")


# ---------------------------------------------------------------------- what differs


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    for name in ("same.py", "changed.py", "removed.py", "script.sh"):
        (folder / name).write_text(f"# {name}\n")
    return folder


@pytest.fixture(scope="module")
def code(repository: Path) -> CodeSnapshot:
    return snapshot_code(repository)


def test_a_code_difference_names_files(code: CodeSnapshot, repository: Path) -> None:
    (repository / "changed.py").write_text("x = 2\n")
    (repository / "removed.py").unlink()
    (repository / "added.py").write_text("")
    (repository / "script.sh").chmod(0o755)
    present = snapshot_code(repository)
    assert present.digest != code.digest
    assert (
        code_difference(code.archive, present.archive) == "4 files differ: added.py, changed.py, removed.py, script.sh"
    )


def test_an_environment_difference_names_distributions_and_settings() -> None:
    system = {**ENVIRONMENT.system, "python": "3.12.1", "variables": {"OMP_NUM_THREADS": "2"}, "processor": "two"}
    present = Environment("torch==2.11.0\nscipy==1.0\n", system)
    assert environment_difference(ENVIRONMENT, present) == (
        "numpy 2.0.0 -> none, scipy none -> 1.0, python 3.11.7 -> 3.12.1, OMP_NUM_THREADS None -> 2"
    )


def test_a_numerics_difference_names_what_may_have_made_it() -> None:
    present = Environment("", {**ENVIRONMENT.system, "processor": "two", "threads": 4})
    text = numerics_difference(ENVIRONMENT, present)
    assert text.startswith("the same operations give other bits here; ")
    assert text.endswith("; processor was one, is two, threads was 1, is 4")
    assert "the processor and threads are the same" in numerics_difference(ENVIRONMENT, ENVIRONMENT)


def test_a_data_difference_names_its_parts() -> None:
    other = replace(LINEAGE, manifests={"train": "c" * 64}, outputs={**LINEAGE.outputs, "data/features": "f2"})
    assert data_difference(LINEAGE.to_json(), other.to_json()) == (
        "the dev manifest (none, was bbbbbbbbbbbb), the train manifest (cccccccccccc, was aaaaaaaaaaaa), "
        "data/features of DVC"
    )
    assert (
        data_difference(LINEAGE.to_json(), replace(LINEAGE, vocabulary="v2").to_json())
        == "the data differs in its vocabulary"
    )


def test_a_split_that_came_is_a_difference_too() -> None:
    other = replace(LINEAGE, manifests={**LINEAGE.manifests, "test": "d" * 64})
    assert other.digest != LINEAGE.digest
    assert data_difference(LINEAGE.to_json(), other.to_json()) == "the test manifest (dddddddddddd, was none)"


def test_a_distribution_that_nothing_names_is_compared_where_both_have_it() -> None:
    name = "distribution:einops"
    with pytest.raises(UserError, match=r"distribution:einops: was 0\.7, is 0\.8\n.*--allow-environment-change"):
        check_identity("run", {name: "0.7"}, {name: "0.8"}, frozenset(), {})
    assert check_identity("run", {name: "0.7"}, {}, frozenset(), {}) == {}
    assert check_identity("run", {name: "0.7"}, {name: "0.8"}, frozenset({"environment"}), {}) == {name: ("0.7", "0.8")}


def test_what_a_run_kept_can_be_told_apart_from_the_recipe_alone(code: CodeSnapshot) -> None:
    command = Command(("-m", "sonosco_mlflow", "train"), ".", (), trains_recipe=True)
    origin = Origin(code, ENVIRONMENT, {"training": {"epochs": 2}, "optimizer": {"lr": 0.1}}, command)
    more = replace(origin, settings={"training": {"epochs": 3}, "optimizer": {"lr": 0.1}})
    other = replace(origin, settings={"training": {"epochs": 2}, "optimizer": {"lr": 0.2}})
    # More epochs are the same way, only further; the tag still tells the recipes apart.
    assert origin.digests == more.digests != other.digests
    assert origin.tags()["sonosco.config_digest"] != more.tags()["sonosco.config_digest"]
    # What it means in the settings of a program's own, nobody knows here.
    own = replace(command, trains_recipe=False)
    assert replace(origin, command=own).digests != replace(more, command=own).digests
    assert origin.digests.keys() <= CHANGE_OF.keys()
    assert json.loads(json.dumps(origin.digests)) == origin.digests
