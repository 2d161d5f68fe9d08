"""Several processes that train together: each has its part of the same batches."""

import json
import os
import subprocess
import sys
from itertools import chain, zip_longest
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from sonosco_mlflow.data.loader import AudioDataLoader, Batch
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.training.trainer import ModelTrainer
from toy import PROCESSOR, ToyModel, batch_digest, tone_loader

PATIENCE = 120.0
FRAMES = 60


def whole_loader(manifest: Manifest, seed: int | None = 0) -> AudioDataLoader:
    return tone_loader(manifest, frames_per_batch=FRAMES, seed=seed)


def loaders_of(manifest: Manifest, ranks: int, workers: int = 0, seed: int | None = 0) -> list[AudioDataLoader]:
    dataset = tone_loader(manifest, seed=seed).dataset
    return [
        AudioDataLoader(dataset, frames_per_batch=FRAMES, seed=seed, workers=workers, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]


def in_turn(batches: list[list[Batch]]) -> list[Batch]:
    """The batches of the ranks as one process has them: of each step one of each rank, in the order of the ranks."""
    return [batch for batch in chain.from_iterable(zip(*batches, strict=True)) if len(batch)]


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 3), st.none() | st.integers(0, 3))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_together_the_ranks_have_what_one_process_has(
    tone_manifest: Manifest, ranks: int, start: int, epoch: int, seed: int | None
) -> None:
    expected = list(map(batch_digest, whole_loader(tone_manifest, seed=seed).epoch(epoch, start)))
    loaders = loaders_of(tone_manifest, ranks, seed=seed)
    assert {loader.batches_in(epoch) for loader in loaders} == {
        whole_loader(tone_manifest, seed=seed).batches_in(epoch)
    }
    parts = [list(loader.epoch(epoch, start)) for loader in loaders]
    assert {len(part) for part in parts} == {-(-len(expected) // ranks)}, "as many steps in each"
    assert list(map(batch_digest, in_turn(parts))) == expected
    assert all(len(batch) for part in parts for batch in part[:-1]), "only in the last step a rank may have no batch"


def test_an_epoch_goes_on_with_another_number_of_ranks(tone_manifest: Manifest) -> None:
    expected = list(map(batch_digest, whole_loader(tone_manifest).epoch(1)))
    assert len(expected) == 12
    found: list[Batch] = []
    for ranks, steps in ((3, 1), (2, 2), (1, 1), (3, None)):
        parts = [list(loader.epoch(1, start=len(found)))[:steps] for loader in loaders_of(tone_manifest, ranks)]
        found += in_turn(parts)
    assert list(map(batch_digest, found)) == expected


def test_a_batch_of_no_utterances_has_the_shapes_of_one(tone_manifest: Manifest) -> None:
    parts = [list(loader.epoch(1, start=1)) for loader in loaders_of(tone_manifest, 2)]
    whole, last = parts[0][-1], parts[1][-1]
    assert (len(last), last.ids, last.texts, last.frames) == (0, [], [], 0)
    assert last.features.shape == (0, 0, PROCESSOR.size)
    for name in ("features", "feature_lengths", "tokens", "token_lengths"):
        ours, other = getattr(last, name), getattr(whole, name)
        assert (ours.dtype, ours.ndim, len(ours)) == (other.dtype, other.ndim, 0)


def test_ranks_may_have_workers_and_one_identity(tone_manifest: Manifest) -> None:
    expected = [list(map(batch_digest, loader.epoch(0))) for loader in loaders_of(tone_manifest, 2)]
    loaders = loaders_of(tone_manifest, 2, workers=1)
    assert [list(map(batch_digest, loader.epoch(0))) for loader in loaders] == expected
    assert {loader.digest for loader in loaders} == {whole_loader(tone_manifest).digest}
    assert {loader.padding_in(0) for loader in loaders} == {whole_loader(tone_manifest).padding_in(0)}


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_there_is_not_is_refused(rank: int, ranks: int, tone_manifest: Manifest) -> None:
    with pytest.raises(UserError, match=f"rank is {rank} of {ranks} ranks"):
        AudioDataLoader(whole_loader(tone_manifest).dataset, frames_per_batch=FRAMES, rank=rank, ranks=ranks)


def test_what_goes_through_everything_takes_no_part(tone_manifest: Manifest) -> None:
    part, whole = loaders_of(tone_manifest, 2)[1], whole_loader(tone_manifest)
    with pytest.raises(UserError, match="rank 1 of 2 its part of the batches"):
        ModelTrainer(ToyModel(), train_loader=part).start_training()
    with pytest.raises(UserError, match="rank 1 of 2 its part of the batches"):
        ModelTrainer(ToyModel(), train_loader=whole).evaluate(part, "val_")


LAUNCHED = """
import json, sys
from pathlib import Path
import torch.distributed as distributed
from sonosco_mlflow.data.loader import AudioDataLoader
from sonosco_mlflow.data.manifest import Manifest
from toy import tone_loader

distributed.init_process_group("gloo")
rank, ranks = distributed.get_rank(), distributed.get_world_size()
dataset = tone_loader(Manifest.read(Path(sys.argv[1]))).dataset
loader = AudioDataLoader(dataset, frames_per_batch=60, seed=0, workers=1, rank=rank, ranks=ranks)
steps = []
for batch in loader.epoch(1, start=3):
    ids = [None] * ranks
    # It would wait for ever for a rank that makes fewer steps.
    distributed.all_gather_object(ids, batch.ids)
    steps.append(ids)
if rank == 0:
    Path(sys.argv[2]).write_text(json.dumps(steps))
distributed.destroy_process_group()
"""


def test_ranks_that_torchrun_starts(tone_manifest: Manifest, tmp_path: Path) -> None:
    tone_manifest.write(tmp_path / "manifest.jsonl")
    (tmp_path / "program.py").write_text(LAUNCHED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    # By address: a machine may not know its own name.
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    found = tmp_path / "steps.json"
    command = [*launcher, *place, str(tmp_path / "program.py"), str(tmp_path / "manifest.jsonl"), str(found)]
    done = subprocess.run(command, env=variables, text=True, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    expected = [batch.ids for batch in whole_loader(tone_manifest).epoch(1, start=3)]
    assert len(expected) == 9
    assert json.loads(found.read_text()) == [list(step) for step in zip_longest(*[iter(expected)] * 2, fillvalue=[])]
