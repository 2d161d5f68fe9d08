"""Which search decodes a CTC model."""

from torch import Tensor

from sonosco_mlflow.decoding.greedy import Decoded, ctc_greedy
from sonosco_mlflow.decoding.prefix_beam import ctc_beam
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.decoding.words import WordLanguageModel


def ctc_search(log_probs: Tensor, lengths: Tensor, search: Search) -> list[list[Decoded]]:
    """Return up to ``search.n_best`` hypotheses of each utterance, best first.

    Greedy where nothing else is asked for; with a language model over words by its lexicon; else by prefixes.

    Args:
        log_probs: ``[batch, frames, vocabulary]``.
        lengths: ``[batch]``, frames of each utterance.
        search: the settings.
    """
    if search.is_greedy:
        return [[one] for one in ctc_greedy(log_probs, lengths)]
    if isinstance(search.language_model, WordLanguageModel):
        return search.language_model.decode(log_probs, lengths, search)
    return ctc_beam(log_probs, lengths, search)
