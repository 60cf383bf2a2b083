"""The tokenizer: byte-level BPE in Qwen's layout, every digit a token of its own, trained on the synthetic corpus."""

from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import corpus
import words

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DOCUMENTS = 40_000
WEIGHTS = {"talk": 5.0, "text": 2.0, "spelling": 1.0, "counting": 1.0, "comparing": 0.5, "sums": 0.5, "reversing": 0.5}


def build(vocabulary: int, seed: int) -> Tokenizer:
    """Trains a tokenizer of exactly `vocabulary` entries: the three special tokens, 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(corpus.SPECIALS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    rng = Random(seed)
    texts = ("".join(t for t, _ in corpus.document(rng, WEIGHTS)) for _ in range(DOCUMENTS))
    # Every word also alone and capitalised, so that none is known only with a space before it.
    spoken = [form for w in words.ALL for form in (w, f" {w}", w.capitalize())] * 4
    plain = (t.replace(s, "") for t in texts for s in [corpus.START])
    tokenizer.train_from_iterator((*[t.replace(corpus.END, "\n").replace(corpus.END_OF_TEXT, "") for t in plain], *spoken), trainer)
    assert tokenizer.get_vocab_size() == vocabulary, "the corpus is too small for this vocabulary"
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """Reads tokenizer.json from the model's folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
