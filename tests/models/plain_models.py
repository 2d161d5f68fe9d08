"""The three models written down as their papers have them: one utterance at a time, one step at a time, no padding.

Slow, and without any of the means by which the models are fast: no batches, no masks, no fused layers. They take the
models' weights, so that results and gradients can be compared.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sonosco_mlflow.text import SpecialToken

Weights = Callable[[str], Tensor]
"""A model's weights by their names below some part of it: ``model.encoder.get_parameter``."""

EPSILON = 1e-5


def linear(weights: Weights, name: str, values: Tensor, *, bias: bool = True) -> Tensor:
    product = values @ weights(f"{name}.weight").T
    return product + weights(f"{name}.bias") if bias else product


def layer_norm(weights: Weights, name: str, values: Tensor) -> Tensor:
    """Over the last dimension."""
    mean = values.mean(dim=-1, keepdim=True)
    variance = ((values - mean) ** 2).mean(dim=-1, keepdim=True)
    return weights(f"{name}.weight") * (values - mean) / (variance + EPSILON).sqrt() + weights(f"{name}.bias")


def convolve(pictures: Tensor, kernel: Tensor, bias: Tensor | None, strides: tuple[int, int]) -> Tensor:
    """Convolve ``[channels, time, bands]`` by one window after another, half a kernel of zeros around it."""
    _, _, time, bands = kernel.shape
    padded = functional.pad(pictures, (bands // 2, bands // 2, time // 2, time // 2))
    windows = padded.unfold(1, time, strides[0]).unfold(2, bands, strides[1])
    mixed = torch.einsum("ctbij,ocij->otb", windows, kernel)
    return mixed if bias is None else mixed + bias[:, None, None]


# ---------------------------------------------------------------------- cells


def lstm_cell(weights: Weights, suffix: str, value: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    hidden, cell = state
    gates = (
        weights(f"weight_ih_{suffix}") @ value
        + weights(f"bias_ih_{suffix}")
        + weights(f"weight_hh_{suffix}") @ hidden
        + weights(f"bias_hh_{suffix}")
    )
    entry, forget, new, out = gates.chunk(4)
    cell = forget.sigmoid() * cell + entry.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


def gru_cell(weights: Weights, value: Tensor, hidden: Tensor) -> Tensor:
    from_value = (weights("weight_ih_l0") @ value + weights("bias_ih_l0")).chunk(3)
    from_hidden = (weights("weight_hh_l0") @ hidden + weights("bias_hh_l0")).chunk(3)
    reset, update = ((a + b).sigmoid() for a, b in zip(from_value[:2], from_hidden[:2], strict=True))
    new = (from_value[2] + reset * from_hidden[2]).tanh()
    return (1 - update) * new + update * hidden


def simple_cell(weights: Weights, value: Tensor, hidden: Tensor) -> Tensor:
    return (
        weights("weight_ih_l0") @ value
        + weights("bias_ih_l0")
        + weights("weight_hh_l0") @ hidden
        + weights("bias_hh_l0")
    )


def recurrent(cell: str, weights: Weights, frames: Tensor) -> Tensor:
    """Read ``[time, features]`` in one direction."""
    size = weights("weight_hh_l0").shape[1]
    hidden = frames.new_zeros(size)
    state = (hidden, hidden)
    outputs = []
    for frame in frames:
        if cell == "lstm":
            state = lstm_cell(weights, "l0", frame, state)
            hidden = state[0]
        elif cell == "gru":
            hidden = gru_cell(weights, frame, hidden)
        else:
            total = simple_cell(weights, frame, hidden)
            hidden = total.tanh() if cell == "rnn" else total.clamp(0, 20)
        outputs.append(hidden)
    return torch.stack(outputs)


def one_direction(cell: str, weights: Weights, name: str, frames: Tensor) -> Tensor:
    return recurrent(cell, lambda inner: weights(f"{name}.{inner}"), frames)


def both_directions(cell: str, weights: Weights, name: str, frames: Tensor) -> tuple[Tensor, Tensor]:
    ahead = one_direction(cell, weights, f"{name}.forwards", frames)
    return ahead, one_direction(cell, weights, f"{name}.backwards", frames.flip(0)).flip(0)


# ---------------------------------------------------------------------- attention and losses


def window(step: int, steps: int, frames: int, sigma: float) -> Tensor:
    """Equation 8 of the TDS paper, for one step."""
    scores = [-((frame - step * frames / steps) ** 2) / (2 * sigma**2) for frame in range(frames)]
    return torch.tensor(scores, dtype=torch.float64)


def smoothed_cross_entropy(logits: Sequence[Tensor], targets: Sequence[int], smoothing: float) -> Tensor:
    losses = []
    for step, target in zip(logits, targets, strict=True):
        log_probs = step - step.exp().sum().log()
        losses.append(-(1 - smoothing) * log_probs[target] - smoothing * log_probs.mean())
    return torch.stack(losses).mean()


def ctc(log_probs: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the log-likelihood of ``tokens`` by the forward variables of Graves et al. 2006, section 4.1."""
    blank = int(SpecialToken.BLANK)
    labels = [blank]
    for token in tokens:
        labels += [token, blank]
    impossible = log_probs.new_tensor(-1e30)
    alphas = [log_probs[0, labels[0]], log_probs[0, labels[1]]] + [impossible] * (len(labels) - 2)
    for frame in log_probs[1:]:
        new = []
        for place, label in enumerate(labels):
            ways = [alphas[place]]
            if place > 0:
                ways.append(alphas[place - 1])
            if place > 1 and label not in (blank, labels[place - 2]):
                ways.append(alphas[place - 2])
            new.append(torch.stack(ways).logsumexp(0) + frame[label])
        alphas = new
    return torch.stack(alphas[-2:]).logsumexp(0)


def joint_loss(weights: Weights, settings: dict, loss: Tensor, values: Tensor, tokens: Sequence[int]) -> Tensor:
    """Equation 13 of Watanabe et al. 2017, each likelihood divided by the number of tokens that it is of."""
    if not settings["ctc_weight"]:
        return loss
    heard = ctc(linear(weights, "ctc_output", values).log_softmax(-1), tokens)
    return (1 - settings["ctc_weight"]) * loss - settings["ctc_weight"] * heard / len(tokens)


# ---------------------------------------------------------------------- TDS


def tds_encoder(weights: Weights, settings: dict, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[frames, size]`` of ``[time, mel]``."""
    bands = frames.shape[1]

    def mix(name: str, frames: Tensor, stride: int) -> Tensor:
        pictures = frames.reshape(len(frames), -1, bands).permute(1, 0, 2)
        kernel, bias = weights(f"{name}.convolution.weight"), weights(f"{name}.convolution.bias")
        return convolve(pictures, kernel, bias, (stride, 1)).clamp_min(0).permute(1, 0, 2).flatten(1)

    for group, (depth, stride) in enumerate(zip(settings["blocks"], settings["strides"], strict=True)):
        opening = f"encoder.subsamplings.{group}"
        frames = layer_norm(weights, f"{opening}.norm", mix(f"{opening}.time", frames, stride))
        for block in range(depth):
            name = f"encoder.groups.{group}.{block}"
            frames = layer_norm(weights, f"{name}.time_norm", frames + mix(f"{name}.time", frames, 1))
            inner = linear(weights, f"{name}.depth.0", frames).clamp_min(0)
            frames = layer_norm(weights, f"{name}.depth_norm", frames + linear(weights, f"{name}.depth.3", inner))
    output = linear(weights, "encoder.output", frames)
    return output[:, : output.shape[1] // 2], output[:, output.shape[1] // 2 :]


def tds(weights: Weights, settings: dict, frames: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, logits and alignment of one utterance in training, with the soft window."""
    keys, values = tds_encoder(weights, settings, frames)
    steps = len(tokens) + 1
    hidden = frames.new_zeros(keys.shape[1])
    logits, alignment = [], []
    for step, token in enumerate([int(SpecialToken.SOS), *tokens]):
        hidden = gru_cell(lambda name: weights(f"recurrent.{name}"), weights("embedding.weight")[token], hidden)
        scores = keys @ hidden / keys.shape[1] ** 0.5 + window(step, steps, len(keys), settings["soft_window_sigma"])
        attended = scores.softmax(0)
        logits.append(linear(weights, "output", torch.cat([attended @ values, hidden])))
        alignment.append(attended)
    loss = smoothed_cross_entropy(logits, [*tokens, int(SpecialToken.EOS)], settings["label_smoothing"])
    loss = joint_loss(weights, settings, loss, values, tokens)
    return loss, torch.stack(logits), torch.stack(alignment)


# ---------------------------------------------------------------------- Listen, Attend and Spell


def listener(weights: Weights, settings: dict, frames: Tensor) -> Tensor:
    """Return ``[frames, features]`` of ``[time, mel]``."""
    for level, count in enumerate(settings["joined_frames"]):
        missing = -len(frames) % count
        frames = torch.cat([frames, frames.new_zeros(missing, frames.shape[1])])
        frames = torch.stack([torch.cat(list(some)) for some in frames.split(count)])
        read = torch.cat(both_directions("lstm", weights, f"listener.layers.{level}", frames), dim=1)
        frames = layer_norm(weights, f"listener.norms.{level}", read)
    return frames


def las(
    weights: Weights, settings: dict, frames: Tensor, tokens: Sequence[int], sampling: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, logits and alignment of one utterance in training, with the soft window.

    With scheduled sampling the draws are those of a batch of this utterance alone: first for all steps whether a token
    is replaced, then each token that is.
    """
    heard = listener(weights, settings, frames)
    attention = settings["attention"]

    def project(name: str, values: Tensor) -> Tensor:
        if attention != "mlp":
            return linear(weights, name, values)
        return linear(weights, f"{name}.2", linear(weights, f"{name}.0", values).tanh())

    keys = project("keys", heard)
    levels = range(settings["speller_layers"])
    zeros = frames.new_zeros(settings["speller_size"])
    states = [(zeros, zeros) for _ in levels]
    context, attended = frames.new_zeros(heard.shape[1]), frames.new_zeros(len(heard))
    shown = [int(SpecialToken.SOS), *tokens]
    replaced = (torch.rand(1, len(shown)) < sampling)[0] if sampling else torch.zeros(len(shown), dtype=torch.bool)
    logits: list[Tensor] = []
    alignment = []
    for step, token in enumerate(shown):
        if step and replaced[step]:
            token = int(torch.multinomial(logits[-1].detach().softmax(0)[None], 1))
        value = weights("embedding.weight")[token]
        if settings["input_feeding"]:
            value = torch.cat([value, context])
        for level in levels:
            states[level] = lstm_cell(lambda name: weights(f"speller.{name}"), f"l{level}", value, states[level])
            value = states[level][0]
        query = project("queries", value)
        scores = []
        places = location_features(weights, attended) if attention == "location" else None
        for frame, key in enumerate(keys):
            if attention in ("dot", "mlp"):
                scores.append(query @ key / len(key) ** 0.5)
                continue
            inner = query + key
            if places is not None:
                inner = inner + weights("energy.locations.weight") @ places[frame]
            scores.append(weights("energy.score.weight")[0] @ inner.tanh())
        bias = window(step, len(shown), len(heard), settings["soft_window_sigma"])
        attended = (torch.stack(scores) + bias).softmax(0)
        context = attended @ heard
        inner = linear(weights, "output.0", torch.cat([value, context])).tanh()
        logits.append(linear(weights, "output.3", inner))
        alignment.append(attended)
    loss = smoothed_cross_entropy(logits, [*tokens, int(SpecialToken.EOS)], settings["label_smoothing"])
    loss = joint_loss(weights, settings, loss, heard, tokens)
    return loss, torch.stack(logits), torch.stack(alignment)


def location_features(weights: Weights, attended: Tensor) -> list[Tensor]:
    """Equation 8 of Chorowski et al.: the last weights, seen by each filter around each frame."""
    filters = weights("energy.convolution.weight")[:, 0]
    reach = filters.shape[1] // 2
    features = []
    for frame in range(len(attended)):
        total = torch.zeros(len(filters), dtype=attended.dtype)
        for place in range(-reach, reach + 1):
            if 0 <= frame + place < len(attended):
                total = total + filters[:, place + reach] * attended[frame + place]
        features.append(total)
    return features


# ---------------------------------------------------------------------- DeepSpeech2


def batch_norm(weights: Weights, name: str, utterances: list[Tensor]) -> list[Tensor]:
    """Normalise the last dimension by the statistics of all frames of all utterances together."""
    together = torch.cat([utterance.flatten(0, -2) for utterance in utterances])
    mean = together.mean(dim=0)
    variance = ((together - mean) ** 2).mean(dim=0)
    scale, shift = weights(f"{name}.scale"), weights(f"{name}.shift")
    return [scale * (utterance - mean) / (variance + EPSILON).sqrt() + shift for utterance in utterances]


def deepspeech2(
    weights: Weights, settings: dict, utterances: list[Tensor], tokens: Sequence[Sequence[int]]
) -> tuple[Tensor, list[Tensor]]:
    """Return loss and log-probabilities of utterances ``[time, mel]``, which batch norm sees together."""
    pictures = [utterance[None] for utterance in utterances]
    strides = zip(settings["time_strides"], settings["band_strides"], strict=True)
    for level, stride in enumerate(strides):
        name = f"convolutions.{level}"
        kernel = weights(f"{name}.convolution.weight")
        mixed = [convolve(picture, kernel, None, stride).permute(1, 2, 0) for picture in pictures]
        normed = batch_norm(weights, f"{name}.norm", mixed)
        pictures = [picture.clamp(0, 20).permute(2, 0, 1) for picture in normed]
    frames = [picture.permute(1, 2, 0).flatten(1) for picture in pictures]
    for level in range(settings["recurrent_layers"]):
        name, cell = f"recurrents.{level}", settings["cell"]
        normed = batch_norm(weights, f"norms.{level}", frames)
        if settings["bidirectional"]:
            frames = [sum(both_directions(cell, weights, name, one)) for one in normed]
        else:
            frames = [one_direction(cell, weights, f"{name}.forwards", one) for one in normed]
    if settings["look_ahead"]:
        frames = [look_ahead(weights("look_ahead.convolution.weight")[:, 0, :, 0], one) for one in frames]
    frames = batch_norm(weights, f"norms.{settings['recurrent_layers']}", frames)
    log_probs = [linear(weights, "output", one).log_softmax(-1) for one in frames]
    losses = [-ctc(one, some) / len(some) for one, some in zip(log_probs, tokens, strict=True)]
    return torch.stack(losses).mean(), log_probs


def look_ahead(kernel: Tensor, frames: Tensor) -> Tensor:
    """Equation 11 of the DeepSpeech2 paper."""
    rows = []
    for place in range(len(frames)):
        soon = frames[place : place + kernel.shape[1]]
        rows.append((kernel[:, : len(soon)].T * soon).sum(dim=0))
    return torch.stack(rows)
