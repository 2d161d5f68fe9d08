import pytest
import torch

from sonosco_mlflow.data.augment import SpecAugment
from sonosco_mlflow.determinism import random_stream

FEATURES = torch.ones(200, 80)


def masks(augmented: torch.Tensor) -> tuple[list[int], list[int]]:
    """The frames and the bands that are wholly masked."""
    masked = augmented == 0
    return masked.all(1).nonzero().flatten().tolist(), masked.all(0).nonzero().flatten().tolist()


def test_it_is_a_function_of_features_and_stream() -> None:
    augment = SpecAugment()
    assert torch.equal(augment(FEATURES, random_stream(1)), augment(FEATURES, random_stream(1)))
    assert not torch.equal(augment(FEATURES, random_stream(1)), augment(FEATURES, random_stream(2)))
    assert torch.equal(FEATURES, torch.ones(200, 80)), "the input is left as it is"


def test_masks_are_whole_spans_within_their_bounds() -> None:
    frames, bands = set(), set()
    for key in range(300):
        augmented = SpecAugment(1, 30, 0.1, 1, 27)(FEATURES, random_stream(key))
        masked_frames, masked_bands = masks(augmented)
        for masked, seen in ((masked_frames, frames), (masked_bands, bands)):
            assert masked == list(range(masked[0], masked[-1] + 1) if masked else [])
            seen.add(len(masked))
        kept = augmented[[i not in masked_frames for i in range(200)]][:, [i not in masked_bands for i in range(80)]]
        assert (kept == 1).all()
    assert frames == set(range(21)), "a mask is bounded by its share of the utterance, and every width occurs"
    assert bands == set(range(28))


@pytest.mark.parametrize("where", ["first", "last"])
def test_masks_reach_both_ends(where: str) -> None:
    position = 0 if where == "first" else -1
    augmented = [SpecAugment(1, 10, 1.0, 0, 0)(FEATURES[:20], random_stream(key))[position, 0] for key in range(200)]
    assert 0 in augmented
    assert 1 in augmented


def test_it_can_be_switched_off_and_survives_short_features() -> None:
    assert torch.equal(SpecAugment(0, 40, 0.2, 0, 27)(FEATURES, random_stream(0)), FEATURES)
    for key in range(20):
        assert SpecAugment(5, 40, 1.0, 5, 27)(torch.ones(1, 2), random_stream(key)).shape == (1, 2)
