"""Stopped as `timeout`, systemd and a cluster's scheduler stop a program: each process of it is sent SIGTERM."""

import os
import signal
import time

from proofs import NewWorld, Proof

PATIENCE = 120.0


def test_a_signal_to_the_loaders_workers_too_loses_nothing(
    proof: Proof, make_world: NewWorld, undisturbed: NewWorld
) -> None:
    settings = {"workers": 2, "pace": 0.5}
    world = make_world(**settings)
    process = world.begin(sabotage=os.setpgrp)
    deadline = time.monotonic() + PATIENCE
    while process.lives and not process.steps and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    ended = proof.note(world.end(process))
    assert ended.status == 128 + signal.SIGTERM, ended.output
    assert len(ended.steps) < 4, "it had ended by itself"
    assert world.run.data.tags["sonosco.state"] == "interrupted"
    proof.finish(undisturbed(**settings), world)
