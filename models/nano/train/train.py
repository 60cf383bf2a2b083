"""Trains `tinker/nano` from nothing: `python train.py --out DIR [--steps N]`.

Muon for the matrices of the blocks, AdamW for embeddings and norms, a short warm-up, a constant rate, a linear
decay. The share of each task family follows its accuracy on held-out questions: a family near the upper end of
the wanted band is shown less, so that the finished model is imperfect in all of them on purpose.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import evaluate
import tokenizer as tokens
from batches import LENGTHS, Packer
from model import Config, Nano
from tasks import FAMILIES

SEED = 20
TOKENS_PER_BATCH = 4096
STEPS = 2800
WARM_UP, DECAY = 100, 0.35
RATE_MATRICES, RATE_OTHERS = 3e-3, 3e-3
CHECK_EVERY, CHECK_QUESTIONS = 200, 100
BASE_SHARES = {"talk": 3.0, "text": 0.5} | dict.fromkeys(FAMILIES, 1.0) | {"sums": 1.5}
# A family's share falls linearly to nothing as its accuracy on held-out questions goes from LOW to HIGH.
LOW, HIGH = 0.35, 0.70
# The weights kept are those of the last check at which every family was inside this band.
FLOOR, CEILING = 0.20, 0.80


def share(accuracy: float) -> float:
    """The weight of a family in the mix given its measured accuracy."""
    return min(1.0, max(0.02, (HIGH - accuracy) / (HIGH - LOW)))


def rate(step: int, steps: int) -> float:
    """The factor on the learning rates at `step`."""
    left = (steps - step) / (DECAY * steps)
    return min(1.0, (step + 1) / WARM_UP, left)


def optimizers(model: Nano) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in named if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=RATE_MATRICES, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE_OTHERS, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def loss_of(model: Nano):
    """The weighted mean loss of a batch, in bf16 where that is fast; compiled where a compiler is at hand."""

    def loss(inputs, targets, shares):
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits = model(inputs)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * shares.flatten()).sum() / shares.sum()

    if shutil.which("c++") or shutil.which("g++"):
        return torch.compile(loss, dynamic=False)
    return loss


class Run:
    """One training run: the model, its optimizers, the mix and the record of its progress."""

    def __init__(self, out: Path, steps: int, seed: int):
        torch.manual_seed(seed)
        self.out, self.steps = out, steps
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = tokens.load(out)
        self.model = Nano(Config(vocab_size=self.tokenizer.get_vocab_size())).to(self.device)
        self.loss, self.optimizers = loss_of(self.model), optimizers(self.model)
        self.rates = [g["lr"] for o in self.optimizers for g in o.param_groups]
        self.packer, self.mix, self.history = Packer(self.tokenizer, seed), dict(BASE_SHARES), []
        self.kept = {"step": 0, "inside_band": False}

    def step(self, number: int) -> torch.Tensor:
        """One update; returns the loss."""
        length = LENGTHS[number % len(LENGTHS)]
        batch = self.packer.batch(TOKENS_PER_BATCH // length, length, self.mix)
        loss = self.loss(*(part.to(self.device) for part in batch))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, base in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = base * rate(number, self.steps)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def check(self, number: int, started: float) -> None:
        """Measures the families on held-out questions and sets the mix by them."""
        with torch.autocast(self.device, torch.bfloat16):
            measured = evaluate.accuracies(self.model, self.tokenizer, CHECK_QUESTIONS, seed=1)
        for family, accuracy in measured.items():
            self.mix[family] = BASE_SHARES[family] * share(accuracy)
        self.history.append({"step": number, "seconds": round(time.time() - started), "accuracy": measured})
        print(f"step {number}: " + ", ".join(f"{f} {a:.2f}" for f, a in measured.items()), flush=True)
        self.keep(number, all(FLOOR <= accuracy <= CEILING for accuracy in measured.values()))

    def keep(self, number: int, inside: bool) -> None:
        """Saves the weights unless better ones, by the band, are saved already."""
        if inside or not self.kept["inside_band"]:
            self.kept = {"step": number, "inside_band": inside}
            torch.save({k: v.float().cpu() for k, v in self.model.state_dict().items()}, self.out / "weights.pt")

    def train(self) -> dict:
        """All steps; returns the record that goes into evaluation.json."""
        started = time.time()
        for number in range(self.steps):
            loss = self.step(number)
            if number % 50 == 0:
                rate_now = number * TOKENS_PER_BATCH / (time.time() - started)
                print(f"step {number} loss {float(loss):.3f}, {rate_now:.0f} tokens/s", flush=True)
            if (number + 1) % CHECK_EVERY == 0:
                self.check(number + 1, started)
        if self.steps % CHECK_EVERY:
            self.check(self.steps, started)
        return {
            "kept": self.kept, "steps": self.steps, "tokens": self.steps * TOKENS_PER_BATCH, "seconds": round(time.time() - started),
            "device": self.device, "history": self.history,
        }


def main() -> None:
    """Reads the arguments, trains, writes weights.pt and training.json beside the tokenizer."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="folder; its tokenizer.json is made if missing")
    arguments.add_argument("--steps", type=int, default=STEPS, help="updates of 4096 tokens")
    arguments.add_argument("--seed", type=int, default=SEED)
    args = arguments.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        tokens.build(Config.vocab_size, args.seed).save(str(args.out / "tokenizer.json"))
    record = Run(args.out, args.steps, args.seed).train() | {"seed": args.seed}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
