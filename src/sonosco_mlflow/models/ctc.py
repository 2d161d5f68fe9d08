"""What every CTC model shares: loss and decoding. Such a model says what it hears in each frame, and no more."""

import warnings
from abc import abstractmethod

import torch
from torch import Tensor

from sonosco_mlflow.data.loader import Batch
from sonosco_mlflow.decoding.ctc import ctc_search
from sonosco_mlflow.decoding.greedy import ctc_greedy, ctc_log_likelihood
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.models.base import Hypothesis, ModelOutput, SpeechModel


def ctc_loss(log_probs: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
    """Return the mean over utterances of each one's negative log-likelihood per token, summed over alignments.

    An utterance with too few frames for its tokens counts as 0 and gives no gradient; a warning names it.

    Args:
        log_probs: ``[batch, frames, vocabulary]``.
        lengths: ``[batch]``, frames of each utterance.
        batch: what was said in it.
    """
    _warn_of_impossible(lengths.cpu(), batch)
    likelihoods = ctc_log_likelihood(log_probs, lengths, batch.tokens, batch.token_lengths, impossible_as_zero=True)
    return -(likelihoods / batch.token_lengths.cpu().clamp_min(1)).mean().to(log_probs.device)


def _warn_of_impossible(lengths: Tensor, batch: Batch) -> None:
    tokens, counts = batch.tokens.cpu(), batch.token_lengths.cpu()
    # Between two equal tokens a blank has to be heard.
    repeated = (tokens[:, 1:] == tokens[:, :-1]) & (torch.arange(tokens.shape[1])[1:] < counts[:, None])
    for place in (counts + repeated.sum(1) > lengths).nonzero().flatten().tolist():
        # Python says the same of the same utterance once.
        warnings.warn(
            f"{batch.ids[place]}: too few frames for its text, so CTC learns nothing of it; is it the right text? "
            "`sonosco manifest filter --max-rate` takes such rows out",
            stacklevel=3,
        )


class CTCModel(SpeechModel):
    """A model with connectionist temporal classification (Graves et al. 2006) over :meth:`log_probabilities`."""

    @abstractmethod
    def log_probabilities(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities ``[batch, frames, vocabulary]`` and the valid frames of each utterance.

        Args:
            features: ``[batch, time, mel]``, anything beyond an utterance's length.
            lengths: ``[batch]`` int64.
        """

    def forward(self, batch: Batch) -> ModelOutput:
        """Return CTC loss and log-probabilities of ``batch``."""
        log_probs, lengths = self.log_probabilities(batch.features, batch.feature_lengths)
        return ModelOutput(ctc_loss(log_probs, lengths, batch), log_probs, lengths)

    @torch.no_grad()
    def search(self, batch: Batch, search: Search) -> list[list[Hypothesis]]:
        """Return the best hypotheses of each utterance, and its posteriors."""
        search.refuse_attention_settings(type(self).__name__)
        log_probs, lengths = self.log_probabilities(batch.features, batch.feature_lengths)
        posteriors = log_probs.exp().cpu()
        return [
            [Hypothesis(one.tokens, one.score, rows[:frames], one.total) for one in hypotheses]
            for hypotheses, rows, frames in zip(
                ctc_search(log_probs, lengths, search), posteriors, lengths.tolist(), strict=True
            )
        ]

    def teacher_forced(self, output: ModelOutput) -> list[list[int]]:
        """Return the tokens on the best path; CTC reads no reference, so :meth:`decode` gives the same."""
        return [one.tokens for one in ctc_greedy(output.logits, output.lengths)]
