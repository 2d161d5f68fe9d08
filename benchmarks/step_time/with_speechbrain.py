"""Steps of SpeechBrain's models that are nearest to ours, of the nearest number of parameters."""

import warnings
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

warnings.simplefilter("ignore")

import speechbrain as sb  # noqa: E402
from competitor import N_MELS, Task, imports_are_done, parameters, serve, training_step  # noqa: E402
from speechbrain.lobes.models.ContextNet import ContextNet  # noqa: E402
from speechbrain.lobes.models.CRDNN import CRDNN  # noqa: E402
from speechbrain.nnet.embedding import Embedding  # noqa: E402
from speechbrain.nnet.losses import ctc_loss, nll_loss  # noqa: E402
from speechbrain.nnet.RNN import LSTM, RNN, AttentionalRNNDecoder  # noqa: E402

Modules = tuple[nn.ModuleDict, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]


def seq2seq(encoder: nn.Module, encoded: int, width: int, task: Task, kind: str) -> Modules:
    """An encoder with the attentional decoder and the loss of SpeechBrain's LibriSpeech recipe."""
    modules = nn.ModuleDict(
        {
            "encoder": encoder,
            "embedding": Embedding(num_embeddings=task.vocabulary, embedding_dim=width),
            "decoder": AttentionalRNNDecoder(
                rnn_type=kind,
                attn_type="location" if kind == "lstm" else "keyvalue",
                hidden_size=width,
                attn_dim=width,
                num_layers=2 if task.model == "las" and task.preset == "paper" else 1,
                enc_dim=encoded,
                input_size=width,
                channels=10,
                kernel_size=25,
            ),
            "output": nn.Linear(width, task.vocabulary),
        }
    )

    def loss(features: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
        previous, targets = nn.functional.pad(tokens, (1, 0), value=1), nn.functional.pad(tokens, (0, 1), value=2)
        heard = modules["encoder"](features)
        decoded, _ = modules["decoder"](modules["embedding"](previous), heard, lengths / lengths.max())
        log_probs = modules["output"](decoded).log_softmax(dim=-1)
        return nll_loss(log_probs, targets, length=(token_lengths + 1) / (token_lengths.max() + 1))

    return modules, loss


def las(width: int, task: Task) -> Modules:
    layers = 4 if task.preset == "paper" else 3
    encoder = CRDNN(
        input_size=N_MELS,
        cnn_blocks=2,
        cnn_channels=[64, 64],
        time_pooling=True,
        time_pooling_size=4,
        inter_layer_pooling_size=[2, 2],
        rnn_class=LSTM,
        rnn_layers=layers,
        rnn_neurons=width,
        dnn_blocks=1,
        dnn_neurons=width,
    )
    return seq2seq(encoder, width, width, task, "lstm")


def tds(width: int, task: Task) -> Modules:
    blocks, layers = (11, 5) if task.preset == "paper" else (4, 2)
    strides = [1] * blocks
    for block in (0, blocks // 3, 2 * blocks // 3):
        strides[block] = 2
    encoder = ContextNet(
        input_shape=(None, None, N_MELS),
        out_channels=width,
        conv_channels=[width] * blocks,
        strides=strides,
        num_blocks=blocks,
        num_layers=layers,
        residuals=[True] * blocks,
    )
    return seq2seq(encoder, width, 512 if task.preset == "paper" else 160, task, "gru")


def deepspeech2(width: int, task: Task) -> Modules:
    paper = task.preset == "paper"
    modules = nn.ModuleDict(
        {
            "encoder": CRDNN(
                input_size=N_MELS,
                cnn_blocks=2,
                cnn_channels=[32, 32] if paper else [8, 16],
                time_pooling=True,
                time_pooling_size=2 if paper else 4,
                inter_layer_pooling_size=[2, 2],
                rnn_class=RNN if paper else LSTM,
                rnn_layers=7 if paper else 2,
                rnn_neurons=width,
                dnn_blocks=1,
                dnn_neurons=width,
            ),
            "output": nn.Linear(width, task.vocabulary),
        }
    )

    def loss(features: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor) -> Tensor:
        log_probs = modules["output"](modules["encoder"](features)).log_softmax(dim=-1)
        shares = (lengths / lengths.max(), token_lengths / token_lengths.max())
        return ctc_loss(log_probs, tokens, *shares, blank_index=0)

    return modules, loss


BUILD = {"las": las, "tds": tds, "deepspeech2": deepspeech2}
TITLES = {
    "las": "CRDNN with LSTM, location-aware decoder",
    "tds": "ContextNet, key-value decoder",
    "deepspeech2": "CRDNN, CTC",
}

task = Task.from_command_line()
imports_are_done()
assert task.wanted is not None


def nearest_width(wanted: int) -> int:
    """The number of parameters is a polynomial of second degree in the width, so three small models give it."""
    few = (64, 128, 192)
    curve = np.polyfit(few, [parameters([BUILD[task.model](width, task)[0]]) for width in few], 2)
    return min(range(32, 2048, 8), key=lambda width: abs(np.polyval(curve, width) - wanted))


modules, loss = BUILD[task.model](nearest_width(task.wanted), task)
data = task.data()
modules.train()
step = training_step(modules, lambda: loss(*data))
serve({"parameters": parameters([modules]), "title": f"SpeechBrain {sb.__version__} {TITLES[task.model]}"}, step)
