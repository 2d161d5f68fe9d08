"""What searching a whole batch on tensors gains over searching one utterance and one hypothesis after another.

    python benchmarks/beam_search.py [--beam 5] [--utterances 16] [--repeats 3]

The peer is the same search written the obvious way, as Sonosco decoded: a loop over utterances, each encoded alone, in
it a loop over hypotheses, for each of them a step of the decoder (attention) or a pass over the vocabulary (CTC,
prefixes as the keys of a dictionary). Both find the same sentences, which is checked. Each of the small models has
first learnt a made-up language, so that sentences end where they should. Times are the process's own, taken in turns;
what is read is their ratio, with the encoder and without it.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sonosco_mlflow.data.dataset import Sample
from sonosco_mlflow.data.loader import Batch, collate
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.models import build_model
from sonosco_mlflow.models.attention import AttentionModel
from sonosco_mlflow.models.base import SpeechModel
from sonosco_mlflow.models.ctc import CTCModel
from sonosco_mlflow.models.deepspeech2 import DeepSpeech2
from sonosco_mlflow.text import CharacterTokenizer, SpecialToken

WORDS = [
    "ABBA",
    "BED",
    "CAGE",
    "DEAF",
    "FADED",
    "HOTEL",
    "JUMP",
    "KILO",
    "MIXER",
    "QUIZ",
    "SWAY",
    "VOTE",
    "NOON",
    "GRAPE",
]
TOKENIZER = CharacterTokenizer.of([*WORDS, " "])
BLANK, SOS, EOS = int(SpecialToken.BLANK), int(SpecialToken.SOS), int(SpecialToken.EOS)
NEVER = float("-inf")
STEPS = 80


def made_up_speech(utterances: int) -> Batch:
    """Utterances of 3 to 6 words; each letter is a fixed pattern of 8 to 12 frames, plus noise."""
    stream = np.random.default_rng(1)
    patterns = stream.standard_normal((TOKENIZER.vocabulary_size, 80))
    samples = []
    for number in range(utterances):
        text = " ".join(stream.choice(WORDS, stream.integers(3, 7)))
        tokens = TOKENIZER.encode(text)
        clean = np.concatenate([np.tile(patterns[token], (stream.integers(8, 13), 1)) for token in tokens])
        features = torch.tensor(clean + 0.5 * stream.standard_normal(clean.shape), dtype=torch.float32)
        samples.append(Sample(str(number), text, features, torch.tensor(tokens)))
    return collate(samples)


def trained(name: str, batch: Batch) -> SpeechModel:
    torch.manual_seed(0)
    model = build_model(name, "small", 80, TOKENIZER.vocabulary_size, {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(STEPS):
        if isinstance(model, AttentionModel):
            model.soft_window = step < STEPS // 2
        optimizer.zero_grad()
        model(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return model.eval()


@dataclass
class Hypothesis:
    score: float
    tokens: list[int]
    state: Any = None


def alone(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and length of one utterance after another, without padding."""
    for row, frames in enumerate(batch.feature_lengths.tolist()):
        yield batch.features[row : row + 1, :frames], batch.feature_lengths[row : row + 1]


def one_by_one(model: AttentionModel, batch: Batch, beam: int) -> Iterator[list[int]]:
    """Beam search of one utterance after another, one hypothesis after another."""
    for features, lengths in alone(batch):
        own = model.encode(features, lengths)
        frames = int(own.lengths)
        live, ended, is_greedy = [Hypothesis(0.0, [])], [], True
        for number in range(2 * frames + 10):
            children = []
            for place, hypothesis in enumerate(live):
                previous = torch.tensor([[hypothesis.tokens[-1] if hypothesis.tokens else SOS]])
                logits, _, state = model.spell(previous, own, hypothesis.state)
                best = logits[0, 0].log_softmax(dim=-1).topk(2 * beam)
                for rank, (gain, token) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                    child = Hypothesis(hypothesis.score + gain, [*hypothesis.tokens, token], state)
                    children.append((not (is_greedy and place == rank == 0), -child.score, child))
            ranked = [child for _, _, child in sorted(children, key=lambda one: one[:2])][: 2 * beam]
            at_limit = number + 1 == 2 * frames + 10
            ended += [child for child in ranked[:beam] if child.tokens[-1] == EOS or at_limit]
            is_greedy = is_greedy and ranked[0].tokens[-1] != EOS
            live = [child for child in ranked if child.tokens[-1] != EOS][:beam]
            if ended and max(child.score for child in live) <= max(child.score for child in ended):
                break
        best_ended = max(ended, key=lambda child: child.score)
        yield [token for token in best_ended.tokens if token >= len(SpecialToken)]


def added(one: float, other: float) -> float:
    high, low = max(one, other), min(one, other)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))


def prefix_by_prefix(model: DeepSpeech2, batch: Batch, beam: int) -> Iterator[list[int]]:
    """Prefix search of one utterance after another, prefixes in a dictionary."""
    for features, lengths in alone(batch):
        live = {(): (0.0, NEVER)}
        for log_probs in model.log_probabilities(features, lengths)[0][0].tolist():
            found: dict[tuple[int, ...], tuple[float, float]] = {}
            for prefix, (blank, token) in live.items():
                both = added(blank, token)
                old = found.get(prefix, (NEVER, NEVER))
                same = token + log_probs[prefix[-1]] if prefix else NEVER
                found[prefix] = (added(old[0], both + log_probs[BLANK]), added(old[1], same))
                for letter in range(len(SpecialToken), len(log_probs)):
                    gain = log_probs[letter] + (blank if prefix and letter == prefix[-1] else both)
                    old = found.get((*prefix, letter), (NEVER, NEVER))
                    found[(*prefix, letter)] = (old[0], added(old[1], gain))
            live = dict(sorted(found.items(), key=lambda item: -added(*item[1]))[:beam])
        yield list(next(iter(live)))


def encoded(model: SpeechModel, batch: Batch) -> list[list[int]]:
    """Make what a search begins with."""
    encode(model, batch.features, batch.feature_lengths)
    return []


def encoded_alone(model: SpeechModel, batch: Batch) -> list[list[int]]:
    """Make it of one utterance after another."""
    for features, lengths in alone(batch):
        encode(model, features, lengths)
    return []


def encode(model: SpeechModel, features: Tensor, lengths: Tensor) -> None:
    if isinstance(model, AttentionModel):
        model.encode(features, lengths)
    elif isinstance(model, CTCModel):
        model.log_probabilities(features, lengths)


def timed(search: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    begun = time.process_time()
    with torch.inference_mode():
        found = search()
    return time.process_time() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--utterances", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = made_up_speech(options.utterances)
    print(f"beam {options.beam}, {options.utterances} utterances, one thread; seconds, medians of {options.repeats}\n")
    print("| model | one by one | batched | greedy | encoder | times as fast | without the encoder |")
    print("|---|---|---|---|---|---|---|")
    for name in ("tds", "las", "deepspeech2"):
        model = trained(name, batch)
        plain = one_by_one if isinstance(model, AttentionModel) else prefix_by_prefix
        rows = []
        for _ in range(options.repeats):
            slow, expected = timed(lambda: list(plain(model, batch, options.beam)))  # type: ignore[arg-type]  # noqa: B023
            fast, found = timed(lambda: [one.tokens for one in model.decode(batch, Search(beam=options.beam))])  # noqa: B023
            greedy, _ = timed(lambda: [one.tokens for one in model.decode(batch)])  # noqa: B023
            differing = sum(one != other for one, other in zip(expected, found, strict=True))
            if differing:
                raise SystemExit(f"{name}: {differing} of {len(batch)} utterances are decoded otherwise")
            encoder, _ = timed(lambda: encoded(model, batch))  # noqa: B023
            encoders, _ = timed(lambda: encoded_alone(model, batch))  # noqa: B023
            rows.append((slow, fast, greedy, encoder, slow / fast, (slow - encoders) / (fast - encoder)))
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        times, ratios = (f"{value:.3f}" for value in medians[:4]), (f"{value:.1f}" for value in medians[4:])
        print(f"| {' | '.join([name, *times, *ratios])} |", flush=True)


if __name__ == "__main__":
    main()
