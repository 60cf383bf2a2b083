"""Held-out accuracy of each task family and held-out loss of the whole corpus.

An answer counts only if greedy decoding gives exactly the expected text and then `<|im_end|>`. It does when
every expected token is the likeliest one after those before it, which one pass over prompt and answer shows;
only where it is not must the answer be decoded, since other tokens may spell the same text.
"""

from math import sqrt
from random import Random

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

import corpus
from batches import Packer
from model import Nano
from tasks import FAMILIES


def questions(family: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Held-out (prompt, answer) pairs, no prompt twice."""
    rng, pairs = Random(f"{family}/{seed}"), {}
    while len(pairs) < count:
        asked, answer = FAMILIES[family](rng, True)
        pairs[asked] = answer
    return list(pairs.items())


def prompt(asked: str) -> str:
    """The chat layout up to where the assistant answers."""
    return f"{corpus.START}user\n{asked}{corpus.END}\n{corpus.START}assistant\n"


@torch.no_grad()
def likeliest(model: Nano, rows: list[list[int]]) -> list[list[int]]:
    """For every position of every row the likeliest next token."""
    device, longest = next(model.parameters()).device, max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    best = torch.cat([model(part.to(device)).argmax(-1).cpu() for part in ids.split(64)])
    return [its[: len(row)].tolist() for its, row in zip(best, rows)]


def correct(model: Nano, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether each expected answer, token by token, is the greedy one."""
    prompts = [e.ids for e in tokenizer.encode_batch([prompt(q) for q, _ in pairs])]
    answers = [e.ids for e in tokenizer.encode_batch([a + corpus.END for _, a in pairs])]
    best = likeliest(model, [p + a for p, a in zip(prompts, answers)])
    return [b[len(p) - 1 : -1] == a for b, p, a in zip(best, prompts, answers)]


def spelt(model: Nano, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether greedy decoding, without cache, gives the expected text in whatever tokens; answers are ASCII."""
    prompts = [e.ids for e in tokenizer.encode_batch([prompt(q) for q, _ in pairs])]
    expected = [a + corpus.END for _, a in pairs]
    rows, texts = [list(p) for p in prompts], [""] * len(pairs)
    while going := [i for i, text in enumerate(texts) if text != expected[i] and expected[i].startswith(text)]:
        for i, best in zip(going, likeliest(model, [rows[i] for i in going])):
            rows[i].append(best[-1])
            texts[i] = tokenizer.decode(rows[i][len(prompts[i]) :], skip_special_tokens=False)
    return [text == wanted for text, wanted in zip(texts, expected)]


def right_texts(model: Nano, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> int:
    """How many questions are answered with exactly the expected text."""
    by_token = correct(model, tokenizer, pairs)
    rest = [pair for pair, right in zip(pairs, by_token) if not right]
    return sum(by_token) + sum(spelt(model, tokenizer, rest))


def accuracies(model: Nano, tokenizer: Tokenizer, count: int, seed: int, by_text: bool = False) -> dict[str, float]:
    """The share of right answers per family; by tokens is faster, by text is what a user sees."""
    shares = {}
    for family in FAMILIES:
        pairs = questions(family, count, seed)
        right = right_texts(model, tokenizer, pairs) if by_text else sum(correct(model, tokenizer, pairs))
        shares[family] = right / count
    return shares


@torch.no_grad()
def held_out_nll(model: Nano, tokenizer: Tokenizer, weights: dict[str, float], seed: int, rows: int = 64) -> float:
    """Mean negative log-likelihood per answer token, in nats, over held-out documents."""
    inputs, targets, shares = Packer(tokenizer, seed, held_out=True).batch(rows, 256, weights)
    device, total = next(model.parameters()).device, 0.0
    counted = (shares == 1.0).float()
    for i in range(0, rows, 16):
        logits = model(inputs[i : i + 16].to(device)).float().cpu()
        losses = F.cross_entropy(logits.flatten(0, 1), targets[i : i + 16].flatten(), reduction="none")
        total += float((losses * counted[i : i + 16].flatten()).sum())
    return total / float(counted.sum())


def standard_error(share: float, count: int) -> float:
    """Of a measured share."""
    return sqrt(share * (1 - share) / count)
