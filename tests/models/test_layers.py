import pytest
import torch
from torch import nn

from sonosco_mlflow.models.layers import (
    Dropout,
    LookAhead,
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


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_at_every_place(share: float) -> None:
    torch.manual_seed(0)
    dropout, values = Dropout(share), torch.ones(40_003, requires_grad=True)
    dropped = dropout(values)
    for place in range(4):  # of the four values that share a draw
        assert (dropped[place::4] == 0).float().mean() == pytest.approx(share, abs=0.02)
    # Neighbours of one draw are independent: both are dropped as often as chance has it.
    quads = (dropped[:40_000] == 0).float().reshape(-1, 4)
    for one, other in ((0, 1), (1, 2), (2, 3), (0, 3)):
        assert (quads[:, one] * quads[:, other]).mean() == pytest.approx(share**2, abs=0.02)
    kept = dropped[dropped != 0].detach()
    assert kept.unique().numel() == 1
    assert float(kept[0]) == pytest.approx(1 / (1 - share), rel=1e-4)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())


def test_dropout_scales_by_the_share_that_it_really_keeps() -> None:
    dropout = Dropout(0.2)
    kept = float(dropout(torch.ones(1000)).max())
    assert kept * (1 - dropout.dropped / 2**16) == pytest.approx(1.0, abs=1e-7)


def test_dropout_draws_from_the_global_generator_and_in_training_alone() -> None:
    dropout, values = Dropout(0.3), torch.randn(3, 5, 7)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropout(values))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    before = torch.get_rng_state()
    assert Dropout(0.0)(values) is values
    assert dropout.eval()(values) is values
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_dropout_of_everything_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"dropout is {share}"):
        Dropout(share)


def test_the_future_that_is_read_ends_with_the_utterance() -> None:
    layer, sequences = LookAhead(2, 3), torch.randn(3, 5, 2)
    noisy = torch.where(valid_frames(LENGTHS, 5)[..., None], sequences, 9.0)
    weights = layer.convolution.weight[:, 0, :, 0]
    mixed = layer(noisy, LENGTHS)
    assert mixed.shape == sequences.shape
    for row, length in enumerate(LENGTHS.tolist()):
        for frame in range(length):
            soon = sequences[row, frame : min(length, frame + 4)]
            expected = (weights[:, : len(soon)].T * soon).sum(dim=0)
            torch.testing.assert_close(mixed[row, frame], expected)
