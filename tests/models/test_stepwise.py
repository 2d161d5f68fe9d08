import torch
from torch import Tensor, nn

from sonosco_mlflow.models.stepwise import LSTMSteps, RepeatedProduct, repeated


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_repeated_products_have_the_gradients_of_plain_ones() -> None:
    rows = double(3, 4, 5)
    for matrix in (double(6, 5), double(3, 6, 5)):
        results = []
        for product in (RepeatedProduct(matrix), lambda row, matrix=matrix: row @ matrix.mT):
            # Each step depends on the one before, as in a decoder.
            carried, total = torch.zeros(3, 1, 6, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for row in rows.split(1, dim=1):
                carried = product(row * (1 + carried[..., :5])).tanh()
                total = total + carried.square().sum()
            results.append((total, *torch.autograd.grad(total, [rows, matrix], retain_graph=True)))
            again = torch.autograd.grad(total, [rows, matrix])
            assert all(torch.equal(one, other) for one, other in zip(results[-1][1:], again, strict=True))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_steps_that_the_loss_does_not_reach_add_nothing() -> None:
    matrix, rows = double(6, 5), double(3, 2, 5)
    product = RepeatedProduct(matrix)
    first, _ = (product(row) for row in rows.split(1, dim=1))
    first.sum().backward()
    assert matrix.grad is not None
    torch.testing.assert_close(matrix.grad, rows[:, 0].sum(dim=0).expand(6, 5))


def test_a_frozen_matrix_gets_no_gradient() -> None:
    rows = double(3, 1, 5)
    RepeatedProduct(torch.ones(6, 5, dtype=torch.float64))(rows).sum().backward()
    torch.testing.assert_close(rows.grad, torch.full((3, 1, 5), 6.0, dtype=torch.float64))


def test_lstm_steps_equal_the_layer() -> None:
    for levels in (1, 3):
        layer = nn.LSTM(7, 4, num_layers=levels, batch_first=True).double()
        embedded, fed = double(2, 5, 4), double(2, 5, 3)
        expected, (hidden, cells) = layer(torch.cat([embedded, fed], dim=-1))
        steps = LSTMSteps(layer, 4)
        of_tokens = steps.of_tokens(embedded)
        state = (torch.zeros(2, levels, 4, dtype=torch.float64),) * 2
        outputs = []
        for step in range(5):
            state = steps(of_tokens[:, step : step + 1], fed[:, step : step + 1], *state)
            outputs.append(state[0][:, -1:])
        found = torch.cat(outputs, dim=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(state[0].transpose(0, 1), hidden, rtol=0, atol=1e-10)
        torch.testing.assert_close(state[1].transpose(0, 1), cells, rtol=0, atol=1e-10)
        inputs, weights = [embedded, fed, *layer.parameters()], torch.randn_like(found)
        for one, other in zip(
            torch.autograd.grad((found * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_repeated_layers_equal_the_layers() -> None:
    for module in (nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5))):
        module, results = module.double(), []
        rows = torch.ones(2, 1, 5, dtype=torch.float64, requires_grad=True)
        for layer in (repeated(module), module):
            once = layer(rows)
            total = layer(once + rows).square().sum()
            results.append((total, *torch.autograd.grad(total, [rows, *module.parameters()])))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
