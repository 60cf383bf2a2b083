"""Held-out accuracy of each task family and held-out loss of the whole corpus.

An answer counts only if greedy decoding gives exactly the expected tokens and then `<|im_end|>`. That is the
case precisely when every expected token is the likeliest one after those before it, so one pass over prompt
and answer decides it.
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
def correct(model: Nano, tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether the model answers each question exactly."""
    prompts = [e.ids for e in tokenizer.encode_batch([prompt(q) for q, _ in pairs])]
    answers = [e.ids for e in tokenizer.encode_batch([a + corpus.END for _, a in pairs])]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers))
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    for row, (p, a) in zip(ids, zip(prompts, answers)):
        row[: len(p) + len(a)] = torch.tensor(p + a)
    device = next(model.parameters()).device
    likeliest = torch.cat([model(part.to(device)).argmax(-1).cpu() for part in ids.split(64)])
    return [
        likeliest[i, len(p) - 1 : len(p) + len(a) - 1].tolist() == a
        for i, (p, a) in enumerate(zip(prompts, answers))
    ]


def accuracies(model: Nano, tokenizer: Tokenizer, count: int, seed: int) -> dict[str, float]:
    """The share of right answers per family."""
    return {f: sum(correct(model, tokenizer, questions(f, count, seed))) / count for f in FAMILIES}


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
