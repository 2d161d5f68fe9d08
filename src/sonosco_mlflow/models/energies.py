"""Attention energies: how well a decoder step and an encoder frame fit, of all steps at once or one by one.

=============== =========================================================================================
``dot``         inner product of a linear layer each (``phi, psi`` of Chan et al. 2016, equation 9)
``mlp``         inner product of an MLP each, as that paper has it
``additive``    ``v . tanh(W s + V h + b)`` (Bahdanau et al. 2015; equation 5 of Chorowski et al. 2015)
``location``    the same plus ``U f``, ``f`` being the last step's weights behind a convolution (Chorowski et
                al. 2015, arXiv 1506.07503, equations 8 and 9): where speech was read decides where to read on
=============== =========================================================================================

Inner products are divided by the square root of their size, which the papers do not do.
"""

from collections.abc import Callable

from torch import Tensor, nn

from sonosco_mlflow.models.stepwise import RepeatedProduct

Scorer = Callable[[Tensor, Tensor], Tensor]
"""Scores ``[batch, rows, frames]`` of one step's queries ``[batch, rows, size]`` and the last step's weights."""


ENERGIES = ("dot", "mlp", "additive", "location")


def inner_product(queries: Tensor, keys: Tensor) -> Tensor:
    """Return scaled inner products ``[batch, steps, frames]``."""
    scores: Tensor = queries @ keys.mT / keys.shape[-1] ** 0.5
    return scores


class Energy(nn.Module):
    """Scores of queries and keys, both already brought to the attention's size."""

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return ``[batch, steps, frames]`` of ``[batch, steps, size]`` and ``[batch, frames, size]``."""
        raise NotImplementedError

    def in_steps(self, keys: Tensor) -> Scorer:
        """Return what scores one step after another against the same keys."""
        return lambda query, _: self(query, keys)


class InnerProduct(Energy):
    """Scaled inner product."""

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return ``[batch, steps, frames]`` of ``[batch, steps, size]`` and ``[batch, frames, size]``."""
        return inner_product(queries, keys)

    def in_steps(self, keys: Tensor) -> Scorer:
        """Return what scores one step after another against the same keys."""
        product = RepeatedProduct(keys)
        return lambda query, _: product(query) / keys.shape[-1] ** 0.5


class Additive(Energy):
    """``v . tanh(query + key)``; a bias stands in the layer that makes the queries. It holds steps x frames x size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.score = nn.Linear(size, 1, bias=False)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return ``[batch, steps, frames]`` of ``[batch, steps, size]`` and ``[batch, frames, size]``."""
        return self._scores(queries[:, :, None] + keys[:, None])

    def _scores(self, sums: Tensor) -> Tensor:
        scores: Tensor = self.score(sums.tanh())
        return scores[..., 0]


class LocationAware(Additive):
    """``v . tanh(query + key + U (F * last weights))``; its steps are made one by one.

    Args:
        size: of queries and keys.
        filters: convolutions ``F`` over the last step's weights.
        width: encoder frames that they span, odd.
    """

    def __init__(self, size: int, filters: int, width: int) -> None:
        super().__init__(size)
        self.convolution = nn.Conv1d(1, filters, width, padding=width // 2, bias=False)
        self.locations = nn.Linear(filters, size, bias=False)

    def in_steps(self, keys: Tensor) -> Scorer:
        """Return what scores one step after another against the same keys."""

        def scorer(query: Tensor, last_weights: Tensor) -> Tensor:
            features = self.convolution(last_weights.flatten(0, 1)[:, None]).mT
            locations = self.locations(features).unflatten(0, last_weights.shape[:2])
            return self._scores(query[:, :, None] + keys[:, None] + locations)

        return scorer


def projection(inputs: int, size: int, *, hidden: bool) -> nn.Module:
    """Return ``phi`` or ``psi``: a linear layer, or an MLP with one hidden layer."""
    if not hidden:
        return nn.Linear(inputs, size)
    return nn.Sequential(nn.Linear(inputs, size), nn.Tanh(), nn.Linear(size, size))


def build_energy(name: str, size: int, filters: int, width: int) -> Energy:
    """Return the energy of one of :data:`ENERGIES`; ``filters`` and ``width`` are those of location-aware attention."""
    match name:
        case "additive":
            return Additive(size)
        case "location":
            return LocationAware(size, filters, width)
        case _:
            return InnerProduct()
