import pytest
import torch
from torch import nn

from sonosco_mlflow.models.layers import (
    MaskedBatchNorm,
    Recurrent,
    join_neighbours,
    reversed_within,
    subsampled,
    valid_frames,
)

LENGTHS = torch.tensor([3, 5, 1])


def test_subsampled_lengths_are_those_of_a_strided_convolution() -> None:
    for kernel in (1, 3, 9, 21):
        convolution = nn.Conv1d(1, 1, kernel, stride=2, padding=kernel // 2)
        for length in range(1, 30):
            assert convolution(torch.zeros(1, 1, length)).shape[-1] == subsampled(torch.tensor(length), 2)


def test_sequences_are_reversed_within_their_lengths() -> None:
    sequences = torch.arange(15.0).reshape(3, 5, 1)
    expected = [[2, 1, 0, 3, 4], [9, 8, 7, 6, 5], [10, 11, 12, 13, 14]]
    assert reversed_within(sequences, LENGTHS)[..., 0].tolist() == expected


def test_joined_neighbours_leave_padding_out() -> None:
    sequences = torch.arange(1.0, 11.0).reshape(1, 5, 2)
    joined = join_neighbours(sequences, torch.tensor([3]), 2)
    assert joined.tolist() == [[[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]]]


def test_batch_norm_equals_torch_s_on_the_real_frames() -> None:
    ours, theirs = MaskedBatchNorm(4), nn.BatchNorm1d(4)
    for _ in range(2):
        sequences = torch.randn(3, 5, 4) * 3 + 1
        valid = valid_frames(LENGTHS, 5)
        torch.testing.assert_close(ours(sequences, LENGTHS)[valid], theirs(sequences[valid]), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(sequences, LENGTHS)[valid], theirs(sequences[valid]))


def test_batch_norm_of_pictures_is_by_channel() -> None:
    pictures = torch.randn(3, 5, 6, 2) * torch.tensor([1.0, 9.0])
    normed = MaskedBatchNorm(2)(pictures, LENGTHS)[valid_frames(LENGTHS, 5)]
    torch.testing.assert_close(normed.mean(dim=(0, 1)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.var(dim=(0, 1), correction=0), torch.ones(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_recurrent_layer_equals_packed_sequences(cell: str) -> None:
    layer = Recurrent(cell, 4, 6, "concatenation")
    packed_layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell](4, 6, batch_first=True, bidirectional=True)
    for name, parameter in layer.forwards.named_parameters():
        nn.init.normal_(parameter)
        packed_layer.get_parameter(name).data.copy_(parameter)
        packed_layer.get_parameter(f"{name}_reverse").data.copy_(layer.backwards.get_parameter(name))
    sequences = torch.randn(3, 5, 4)
    packed = nn.utils.rnn.pack_padded_sequence(sequences, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(packed_layer(packed)[0], batch_first=True)
    valid = valid_frames(LENGTHS, 5)
    torch.testing.assert_close(layer(sequences, LENGTHS)[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_merging_of_directions() -> None:
    both = Recurrent("gru", 4, 6, "concatenation")
    summed, forward = Recurrent("gru", 4, 6, "sum"), Recurrent("gru", 4, 6, "forward")
    summed.load_state_dict(both.state_dict())
    forward.forwards.load_state_dict(both.forwards.state_dict())
    sequences = torch.randn(3, 5, 4)
    ahead, back = both(sequences, LENGTHS).chunk(2, dim=-1)
    torch.testing.assert_close(summed(sequences, LENGTHS), ahead + back)
    torch.testing.assert_close(forward(sequences, LENGTHS), ahead)
    assert (both.output_size, summed.output_size, forward.output_size) == (12, 6, 6)
