"""The corpora: one module each, loaded only when it is asked for."""

from sonosco_mlflow.data.corpora.base import CORPORA, Corpus, Progress, bring_corpus

__all__ = ["CORPORA", "Corpus", "Progress", "bring_corpus"]
