"""docs/models.md: the counts that it gives, and the fourth model whose code it shows."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sonosco_mlflow
from sonosco_mlflow.models import MODELS, build_model

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", re.MULTILINE)


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_every_preset_has_the_parameters_that_are_documented() -> None:
    rows = ROW.findall(PAGE)
    assert {(name, preset) for name, preset, _, _ in rows} == {(m, p) for m in MODELS for p in ("small", "paper")}
    for name, preset, vocabulary, parameters in rows:
        with torch.device("meta"):
            model = build_model(name, preset, 80, number(vocabulary), {})
        assert model.parameter_count() == number(parameters), (name, preset)


def test_the_paper_s_count_of_tds_is_derived_as_documented() -> None:
    with torch.device("meta"):
        model = build_model("tds", "paper", 80, 10_000, {})
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def of(part: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(part))

    norms = [size for name, size in sizes.items() if "norm" in name]
    scalar_norms = of("encoder.") - sum(norms) + len(norms)
    for count in (
        *(of("encoder.") - sum(norms), sum(norms), of("encoder."), of("embedding."), of("recurrent."), of("output.")),
        *(scalar_norms, sum(sizes.values())),
    ):
        assert f"{count:,}" in PAGE, count
    assert f"{len(norms) // 2} layer norms" in PAGE
    assert round(scalar_norms / 1e6, 1) == 36.5


# The page's file and line stand in a copy of the package, which this trains.
TRAINING = """
import dataclasses, sys
import torch
from torch.nn import functional
from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import collate
from sonosco_mlflow.models import build_model
from sonosco_mlflow.serialization.serializer import Deserializer, Serializer

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
patterns = torch.randn(10, 20)
samples = []
for tokens in ([5, 6, 7, 5], [8, 9], [6, 8, 5, 9, 7]):
    features = patterns[tokens].repeat_interleave(10, dim=0) + 0.1 * torch.randn(10 * len(tokens), 20)
    samples.append(Sample("", "", features, torch.tensor(tokens)))
batch = collate(samples)
model = build_model("quartznet", "small", 20, 10, {"channels": [32, 48], "dropout": 0.1}).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for _ in range(60):
    optimizer.zero_grad()
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
assert losses[-1] < 0.1 * losses[0], losses

model.eval()
assert [one.tokens for one in model.decode(batch)] == [sample.tokens.tolist() for sample in samples]
features = functional.pad(batch.features, (0, 0, 0, 31))
noise = torch.randn(features.shape)
padding = torch.arange(features.shape[1]) >= batch.feature_lengths[:, None]
padded = dataclasses.replace(batch, features=torch.where(padding[..., None], noise, features))
together = model(padded)
for row, sample in enumerate(samples):
    alone = model(collate([sample]))
    steps = int(alone.lengths[0])
    assert steps == int(together.lengths[row])
    torch.testing.assert_close(together.logits[row, :steps], alone.logits[0], rtol=0, atol=1e-5)

twin = Deserializer().build(Serializer().describe(model)).eval()
twin.load_state_dict(model.state_dict())
assert torch.equal(twin(batch).loss, model(batch).loss)

with torch.device("meta"):
    print(build_model("quartznet", "paper", 64, 29, {}).parameter_count())
"""


@pytest.fixture
def extended_package(tmp_path: Path) -> Path:
    """A copy of the package with the page's fourth model."""
    file, line = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    source = Path(sonosco_mlflow.__file__).parent
    copy = tmp_path / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "models" / "quartznet.py").write_text(file, encoding="utf-8")
    names = copy / "models" / "__init__.py"
    text = names.read_text(encoding="utf-8")
    last = '    "tds": "sonosco_mlflow.models.tds:TDS",\n'
    assert last in text
    names.write_text(text.replace(last, last + line), encoding="utf-8")
    return tmp_path


def test_a_fourth_model_is_one_file_and_one_line(extended_package: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", TRAINING],
        env={"PYTHONPATH": str(extended_package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == pytest.approx(18.9e6, rel=0.01)
