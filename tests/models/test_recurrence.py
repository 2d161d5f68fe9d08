import pytest
import torch
from torch import Tensor, nn

from sonosco_mlflow.models.recurrence import CLIP, ClippedRNN, run

LAYERS = [nn.LSTM, nn.GRU, nn.RNN, ClippedRNN]


def layer_and_sequences(kind: type[nn.Module]) -> tuple[nn.LSTM | nn.GRU | nn.RNN, Tensor]:
    torch.manual_seed(0)
    layer = kind(3, 5, batch_first=True).double()
    sequences = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    return layer, sequences


def clipped_by_steps(layer: nn.RNN, sequences: Tensor) -> Tensor:
    hidden, outputs = sequences.new_zeros(len(sequences), layer.hidden_size), []
    for frame in sequences.unbind(1):
        total = frame @ layer.weight_ih_l0.T + layer.bias_ih_l0 + hidden @ layer.weight_hh_l0.T + layer.bias_hh_l0
        hidden = total.clamp(0, CLIP)
        outputs.append(hidden)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_torch_s_layer(kind: type[nn.Module]) -> None:
    layer, sequences = layer_and_sequences(kind)
    if kind is ClippedRNN:
        with torch.no_grad():
            layer.weight_ih_l0 *= 40  # so that the ceiling is reached
        expected = clipped_by_steps(layer, sequences)
        assert (expected == CLIP).any()
        assert (expected == 0).any()
    else:
        expected = layer(sequences)[0]
    found = run(layer, sequences)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(found)
    inputs = [sequences, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_gradient_that_is_shared_is_left_as_it_is() -> None:
    """The incoming gradient belongs to others too; the backward pass must not write into it."""
    for kind in (nn.GRU, nn.RNN):
        layer, sequences = layer_and_sequences(kind)
        outputs = run(layer, sequences)
        gradient = torch.randn_like(outputs).transpose(0, 1).contiguous().transpose(0, 1)
        before = gradient.clone()
        outputs.backward(gradient)
        assert torch.equal(gradient, before)
