"""A digest of how numbers come out here: the numerics canary.

Equal state continues bit for bit only where equal inputs give equal results. That depends on the number of threads, on
the processor's instruction set, on the versions of libraries and on a few switches. So the kinds of operation that
training is made of run once on small fixed inputs, forward and backward, and the bytes that come out are digested.

>>> canary() == canary()
True
"""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from sonosco_mlflow.determinism import preserved_generators, random_stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def canary(device: str = "cpu", precision: str = "float32") -> str:
    """Return the hexadecimal sha256 of the results of small passes on ``device``, under the settings in force.

    With another ``precision``, ``bfloat16`` or ``float16``, they run under torch's autocast.

    Different digests prove that bits differ. Equal digests do not prove that training is equal: they are a necessary
    test, which catches changes of threads, instruction set and library versions. The digest depends neither on the
    process nor on what was computed before. Generators, modes and settings stay as they were.

    On a GPU, call :func:`~sonosco_mlflow.determinism.configure` first: without deterministic algorithms there is no
    digest to rely on. CTC runs on the CPU even then, as it does in training: torch's CUDA kernel adds gradients in no
    fixed order.
    """
    import torch

    # Runs keep this digest: a change of any pass makes every earlier run's differ.
    passes = (
        *(_convolution, _recurrent, _ctc, _attention, _normalisation),
        *(_products, _reductions, _optimizer, _draws),
    )
    digest = hashlib.sha256()
    kind = torch.device(device).type
    computing = nullcontext() if precision == "float32" else torch.autocast(kind, getattr(torch, precision))
    # Leaving inference mode also switches gradients on, inside torch.no_grad too.
    with preserved_generators(), torch.inference_mode(False), computing:
        for run in passes:
            for result in run(torch.device(device)):
                digest.update(result.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _values(device: "torch.device", name: str, *shape: int) -> "Tensor":
    """Return float32 values in [-1, 1), the same on every machine, of which gradients can be taken."""
    import torch

    # Not by torch's generator, whose draws depend on the instruction set. torch.tensor copies into memory that begins
    # where torch lets its own tensors begin: a matrix product may round otherwise elsewhere.
    uniform = random_stream("canary", name).random(shape)
    return torch.tensor(2 * uniform - 1, dtype=torch.float32, device=device, requires_grad=True)


def _with_gradients(output: "Tensor", *inputs: "Tensor") -> Iterator["Tensor"]:
    """Yield ``output`` and the gradients of ``inputs``; the output's own gradient differs from place to place."""
    import torch

    yield output
    weights = _values(output.device, "gradient", *output.shape).detach()
    yield from torch.autograd.grad(output, inputs, weights)


def _convolution(device: "torch.device") -> Iterator["Tensor"]:
    from torch.nn import functional

    # Several pictures: threads share them, and the kernel's gradient is summed by thread.
    pictures = _values(device, "pictures", 4, 8, 64, 20)
    for kernel, stride in (((11, 5), (2, 2)), ((15, 1), (1, 1))):  # as in DeepSpeech2, as in TDS
        weight, bias = _values(device, "kernel", 8, 8, *kernel), _values(device, "kernel bias", 8)
        padding = (kernel[0] // 2, kernel[1] // 2)
        mixed = functional.conv2d(pictures, weight, bias, stride, padding)
        yield from _with_gradients(mixed.relu(), pictures, weight, bias)


def _recurrent(device: "torch.device") -> Iterator["Tensor"]:
    import torch
    from torch import nn

    # Few steps: each is many tiny products, and threads wait for each other in every one where another program holds a
    # core.
    sequences = _values(device, "sequences", 4, 4, 32)
    lengths = torch.tensor([4, 3, 2, 1])  # down to products of one row, which have code of their own
    for cell in (nn.LSTM, nn.GRU):
        layer = cell(32, 32, batch_first=True, bidirectional=True, device=device, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(_values(device, name, *parameter.shape) / 8)
        yield from _with_gradients(layer(sequences)[0], sequences, *layer.parameters())
        # Packed sequences take another path through torch.
        packed = nn.utils.rnn.pack_padded_sequence(sequences, lengths, batch_first=True)
        yield from _with_gradients(layer(packed)[0].data, sequences, *layer.parameters())


def _ctc(_: "torch.device") -> Iterator["Tensor"]:
    import torch
    from torch.nn import functional

    logits = _values(torch.device("cpu"), "logits", 60, 4, 30)
    tokens = (random_stream("canary", "tokens").random((4, 20)) * 29).astype("int64") + 1
    losses = functional.ctc_loss(
        (4 * logits).log_softmax(dim=-1),
        torch.tensor(tokens),
        torch.tensor([60, 51, 40, 33]),
        torch.tensor([20, 15, 10, 5]),
        reduction="none",
    )
    yield from _with_gradients(losses, logits)


def _attention(device: "torch.device") -> Iterator["Tensor"]:
    queries, keys, values = (_values(device, name, 4, 40, 64) for name in ("queries", "keys", "values"))
    contexts = (queries @ keys.transpose(1, 2)).softmax(dim=-1) @ values
    yield from _with_gradients(contexts, queries, keys, values)


def _normalisation(device: "torch.device") -> Iterator["Tensor"]:
    from torch.nn import functional

    pictures = _values(device, "pictures", 4, 8, 64, 20)
    scale, shift = _values(device, "channel scale", 8), _values(device, "channel shift", 8)
    normed = functional.batch_norm(pictures, None, None, scale, shift, training=True)
    yield from _with_gradients(normed, pictures, scale, shift)
    frames = _values(device, "frames", 256, 160)
    scale, shift = _values(device, "feature scale", 160), _values(device, "feature shift", 160)
    yield from _with_gradients(functional.layer_norm(frames, (160,), scale, shift), frames, scale, shift)


def _products(device: "torch.device") -> Iterator["Tensor"]:
    from torch.nn import functional

    frames = _values(device, "frames", 256, 160)
    weight, bias = _values(device, "weight", 320, 160), _values(device, "weight bias", 320)
    yield from _with_gradients(functional.linear(frames, weight, bias), frames, weight, bias)


def _reductions(device: "torch.device") -> Iterator["Tensor"]:
    # torch gives a thread no less than 32768 values of a sum: a shorter one would not tell 16 threads from 15.
    long = _values(device, "long", 16 * 32768).detach()
    yield from (long.sum(), long.mean(), long.var(), long.norm())
    wide = long.reshape(512, 1024)
    yield from (wide.sum(dim=0), wide.mean(dim=1))
    spread = _values(device, "spread", 16, 1000)
    # Down to e^-120, through numbers that float32 holds with fewer digits: some settings make them 0.
    yield from _with_gradients((60 * spread).log_softmax(dim=-1).exp(), spread)
    yield from _with_gradients(spread.tanh() * spread.sigmoid(), spread)


def _optimizer(device: "torch.device") -> Iterator["Tensor"]:
    import torch

    weight = _values(device, "optimized", 120, 160)
    optimizer = torch.optim.AdamW([weight], lr=0.01)
    for step in range(2):
        weight.grad = _values(device, f"gradient {step}", 120, 160).detach()
        yield torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    yield weight


def _draws(device: "torch.device") -> Iterator["Tensor"]:
    """Yield draws of torch's generator: new weights and dropout come from it, in bits that depend on the processor."""
    import torch

    torch.manual_seed(0)
    ones = torch.ones(1000, device=device, dtype=torch.float32)
    yield from (torch.rand_like(ones), torch.randn_like(ones), torch.nn.functional.dropout(ones, 0.3))
