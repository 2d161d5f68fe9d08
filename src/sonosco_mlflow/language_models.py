"""Language models of a recipe: made from its training transcripts, and brought to where a search needs them."""

from pathlib import Path

from sonosco_mlflow.config import Config
from sonosco_mlflow.data.manifest import Manifest
from sonosco_mlflow.data.stages import DataFolder
from sonosco_mlflow.decoding.arpa import NGrams, write_arpa
from sonosco_mlflow.decoding.kneser_ney import train_ngrams
from sonosco_mlflow.decoding.search import Search
from sonosco_mlflow.decoding.symbols import digest_comment, token_symbols
from sonosco_mlflow.recipe import build_search
from sonosco_mlflow.sections import LanguageModelUnit
from sonosco_mlflow.text import SpecialToken, Tokenizer
from sonosco_mlflow.tracking.language_model import require_language_model
from sonosco_mlflow.tracking.segments import Segment
from sonosco_mlflow.vocabulary import read_tokenizer


def train_language_model(folder: DataFolder, unit: LanguageModelUnit, order: int, path: Path) -> NGrams:
    """Write the n-grams of the training transcripts, and of nothing else, as an ARPA file.

    Args:
        folder: the data; its manifests and vocabulary must be there.
        unit: of the vocabulary's tokens, or of words between blanks.
        order: length of the longest n-grams.
        path: the file.

    Raises:
        UserError: there is no data, or no n-gram of that length.
    """
    manifest = Manifest.read(folder.manifest("train"))
    texts = [utterance.text for utterance in manifest]
    comments = [f"{unit}, order {order}, of the training manifest {manifest.digest}"]
    if unit == "words":
        words = sorted({word for text in texts for word in text.split()})
        numbers = {word: number for number, word in enumerate(words)}
        ngrams = train_ngrams([[numbers[word] for word in text.split()] for text in texts], words, order)
    else:
        tokenizer = read_tokenizer(folder.vocabulary)
        sentences = [[token - len(SpecialToken) for token in tokenizer.encode(text)] for text in texts]
        ngrams = train_ngrams(sentences, token_symbols(tokenizer), order)
        comments.append(digest_comment(tokenizer))
    ngrams = NGrams(ngrams.words, ngrams.orders, tuple(comments))
    write_arpa(ngrams, path)
    return ngrams


def search_of(
    config: Config, tokenizer: Tokenizer, project: Path, scratch: Path, segment: Segment | None = None, n_best: int = 1
) -> Search:
    """Return the search of a recipe, with its language model.

    Args:
        config: the recipe.
        tokenizer: of the model.
        project: folder that paths of the recipe start from.
        scratch: folder for a language model that a run has kept.
        segment: the part of a run that goes on, or is asked again: what it names, it has kept.
        n_best: hypotheses that are wanted of each utterance.

    Raises:
        UserError: the language model is missing, broken, or over other tokens.
    """
    name = config.decoding.language_model
    if name is None:
        return build_search(config.decoding, tokenizer, None, n_best)
    if segment is not None and segment.settings().get("decoding", {}).get("language_model") == name:
        file = require_language_model(segment, scratch / "language_model.arpa")
    else:
        file = project / name
    return build_search(config.decoding, tokenizer, file, n_best)
