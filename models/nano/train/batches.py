"""Turns documents into training batches: encoded, packed into rows of one length, every token with its weight."""

from random import Random

import torch
from tokenizers import Tokenizer

import corpus

# Rows are mostly short; every eighth batch has long ones, so that late positions are trained as well.
LENGTHS = (256, 256, 256, 512, 256, 256, 256, 1024)
CHUNK = 256


class Packer:
    """An endless stream of encoded documents, packed into rows that begin with a document."""

    def __init__(self, tokenizer: Tokenizer, seed: int, held_out: bool = False):
        self.tokenizer, self.rng, self.held_out = tokenizer, Random(seed), held_out
        self.ready: list[tuple[list[int], list[float]]] = []

    def refill(self, weights: dict[str, float]) -> None:
        """Encodes the next documents together, which is many times faster than one by one."""
        documents = [corpus.document(self.rng, weights, self.held_out) for _ in range(CHUNK)]
        pieces = self.tokenizer.encode_batch([text for d in documents for text, _ in d])
        at = 0
        for document in documents:
            ids, shares = [], []
            for _, weight in document:
                ids += pieces[at].ids
                shares += [weight] * len(pieces[at].ids)
                at += 1
            self.ready.append((ids, shares))

    def row(self, length: int, weights: dict[str, float]) -> tuple[list[int], list[float]]:
        """`length` tokens of consecutive documents, the last one cut."""
        ids: list[int] = []
        shares: list[float] = []
        while len(ids) < length:
            if not self.ready:
                self.refill(weights)
            document, its = self.ready.pop()
            ids += document
            shares += its
        return ids[:length], shares[:length]

    def batch(self, rows: int, length: int, weights: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets and target weights, each [rows, length]."""
        packed = [self.row(length + 1, weights) for _ in range(rows)]
        ids = torch.tensor([ids for ids, _ in packed])
        shares = torch.tensor([shares for _, shares in packed])
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), shares[:, 1:].contiguous()
