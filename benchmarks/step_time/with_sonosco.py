"""Steps of this package's models, as they are and written plainly, and the products that a step cannot do without."""

from dataclasses import replace

import obvious
import torch
from competitor import N_MELS, Task, imports_are_done, parameters, serve, training_step
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.models import build_model, model_settings
from sonosco_mlflow.models.attention import AttentionModel, sequence_loss, shifted
from sonosco_mlflow.models.base import SpeechModel

PRODUCT = 1024
# Of the profiler's names, those that are matrix products.
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "mkldnn_rnn_layer", "mkldnn_convolution")


def make_batch(task: Task) -> Batch:
    names = [str(number) for number in range(task.utterances)]
    return Batch(names, names, *task.data())


def make_model(task: Task) -> SpeechModel:
    torch.manual_seed(0)
    if task.competitor == "obvious":
        settings = model_settings(task.model, task.preset, {})
        return obvious.model_class(task.model)(n_mels=N_MELS, vocabulary_size=task.vocabulary, **settings)
    return build_model(task.model, task.preset, N_MELS, task.vocabulary, {})


def serve_model(task: Task) -> None:
    model, batch = make_model(task), make_batch(task)
    with torch.no_grad():
        loss = float(model.eval()(batch).loss)
    model.train()
    step = training_step(model, lambda: model(batch).loss)

    def decoder() -> None:
        assert isinstance(model, AttentionModel)
        previous, targets = shifted(batch.tokens, batch.token_lengths)
        logits, _, _ = model.spell_in_training(previous, memory)
        sequence_loss(logits, targets, batch.token_lengths + 1, model.label_smoothing).backward()
        model.zero_grad()

    if isinstance(model, AttentionModel):
        with torch.no_grad():
            memory = model.encode(batch.features, batch.feature_lengths)

    def largest() -> str:
        with profile() as measured:
            step()
        costs: dict[str, float] = {}
        for event in measured.key_averages():
            # The same operation in place has a name with a bar at its end.
            name = event.key.rsplit("::", maxsplit=1)[-1].removesuffix("_backward").rstrip("_")
            costs[name] = costs.get(name, 0.0) + event.self_cpu_time_total
        other = {name: cost for name, cost in costs.items() if name not in PRODUCTS}
        name = max(other, key=other.__getitem__)
        return f"`{name}` {100 * other[name] / sum(costs.values()):.0f} %"

    facts = {"parameters": parameters([model]), "loss": loss, "has_decoder": isinstance(model, AttentionModel)}
    serve(facts, step, decoder, largest)


def serve_floor(task: Task) -> None:
    """Count the products of a step in units of a large one, and make such a large one as a step."""
    # Written plainly and without fused layers, so that the counter sees each of them.
    model, batch = make_model(replace(task, competitor="obvious")).train(), make_batch(task)
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    square = torch.randn(PRODUCT, PRODUCT)
    serve({"products": counter.get_total_flops() / (2 * PRODUCT**3)}, lambda: square @ square)


task = Task.from_command_line()
imports_are_done()
if task.competitor == "floor":
    serve_floor(task)
else:
    serve_model(task)
