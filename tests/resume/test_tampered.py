"""Something that the state belongs to has changed: refused, with what differs and what allows it."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from harness import World
from proofs import NewWorld, Proof

from sonosco_mlflow.tracking.lease import HEARTBEAT, HOST, OWNER, PID
from toy import ALPHABET

# Who tried last, which even a refused one may leave.
OF_THE_LEASE = {OWNER, HOST, PID, HEARTBEAT}


def facts(world: World) -> dict[str, Any]:
    """Return all that a refusal must leave alone."""
    run = world.run
    return {
        "status": run.info.status,
        "tags": {name: value for name, value in run.data.tags.items() if name not in OF_THE_LEASE},
        "metrics": run.data.metrics,
        "files": {
            str(path.relative_to(folder)): path.read_bytes()
            for folder in (world.artifacts, world.run_folder)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith("console")
        },
    }


def other_config(world: World) -> dict[str, Any]:
    return {"config": {"size": 2}}


def other_data(world: World) -> dict[str, Any]:
    manifest = world.corpus / "manifest.jsonl"
    first, *rest = manifest.read_text().splitlines(keepends=True)
    row = json.loads(first)
    manifest.write_text(json.dumps({**row, "text": row["text"] + "A"}) + "\n" + "".join(rest))
    return {}


def other_vocabulary(world: World) -> dict[str, Any]:
    return {"alphabet": tuple(reversed(ALPHABET))}


def other_code(world: World) -> dict[str, Any]:
    (world.project / "train.py").write_text("# edited\n")
    return {}


def set_variable() -> None:
    os.environ["MKL_CBWR"] = "COMPATIBLE"


def other_environment(world: World) -> dict[str, Any]:
    return {"sabotage": set_variable}


def set_canary() -> None:
    from sonosco_mlflow.tracking import origin

    origin.canary = lambda: "0" * 64


def other_numerics(world: World) -> dict[str, Any]:
    return {"sabotage": set_canary}


@pytest.mark.parametrize(
    ("tamper", "said", "changes"),
    [
        (other_config, "size was 1, is 2", {"config"}),
        (other_data, "the train manifest", {"data"}),
        (other_vocabulary, "vocabulary", {"vocabulary", "data"}),
        (other_code, "train.py", {"code"}),
        (other_environment, "MKL_CBWR", {"environment"}),
        (other_numerics, "the same operations give other bits here", {"numerics"}),
    ],
)
def test_tampered(
    tamper: Callable[[World], dict[str, Any]],
    said: str,
    changes: set[str],
    proof: Proof,
    killed_copy: Callable[[], World],
) -> None:
    world = killed_copy()
    before = facts(world)
    settings = tamper(world)

    refused = proof.note(world.launch(**settings))
    assert refused.status == 1, refused.output
    assert "Traceback" not in refused.output
    assert said in refused.output
    assert {flag for flag in FLAGS if f"--allow-{flag}-change" in refused.output} == changes, refused.output
    after = facts(world)
    assert {key: after[key] == before[key] for key in before} == dict.fromkeys(before, True)

    allowed = world.launch(**settings, allowed=tuple(changes))
    assert allowed.status == 0, allowed.output
    assert world.run.data.tags["sonosco.state"] == "finished"
    recorded = set(world.run.data.tags["sonosco.allowed_changes"].split(","))
    assert recorded & {*changes, "batches", "canary"}, recorded
    segment = (world.artifacts / "segments" / "2" / "segment.json").read_text()
    assert all(change in segment for change in changes - {"data", "numerics"}), segment


FLAGS = ("config", "code", "data", "vocabulary", "environment", "numerics")


def test_an_allowed_change_goes_on_where_the_run_has_later_rows(killed_copy: Callable[[], World]) -> None:
    """It was killed after rows that no checkpoint counts were sent; otherwise continued, they come out otherwise."""
    world = killed_copy()
    world.client.log_metric(str(world.run_id), "train_loss", 123.0, step=4)
    settings = other_code(world)
    allowed = world.launch(**settings, allowed=("code",))
    assert allowed.status == 0, allowed.output


def test_an_unknown_change_cannot_be_allowed(killed_copy: Callable[[], World]) -> None:
    refused = killed_copy().launch(allowed=("kode",))
    assert refused.status == 1
    assert "did you mean 'code'?" in refused.output


def test_nothing_tampered(proof: Proof, killed_copy: Callable[[], World], undisturbed: NewWorld) -> None:
    """What is allowed and not needed changes nothing, and is not recorded."""
    world = killed_copy()
    ended = proof.note(world.launch(allowed=FLAGS))
    assert ended.status == 0, ended.output
    proof.check(undisturbed(), world)
    assert "sonosco.allowed_changes" not in world.run.data.tags
