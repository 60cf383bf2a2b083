"""Makes `tinker/nano` from nothing: `python build.py --out models/nano [--steps N]`.

Tokenizer, data, training, export, evaluation, and the measured figures in the card, in this order. Needs
torch, safetensors, tokenizers and transformers; uses a GPU if there is one.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch

import evaluate
import export
import tokenizer as tokens
import train
from model import Config, Nano
from tasks import FAMILIES

QUESTIONS = 400
SEED_QUESTIONS = 2
TOLERANCE = 1e-3


def measure(folder: Path, record: dict) -> dict:
    """Held-out figures of the exported weights, with how they were trained."""
    model, tokenizer = export.read(folder), tokens.load(folder)
    accuracy = evaluate.accuracies(model, tokenizer, QUESTIONS, SEED_QUESTIONS, by_text=True)
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": {f: round(evaluate.standard_error(a, QUESTIONS), 4) for f, a in accuracy.items()},
        "questions_per_family": QUESTIONS,
        "question_seed": SEED_QUESTIONS,
        "held_out_nll_nats_per_token": round(evaluate.held_out_nll(model, tokenizer, train.BASE_SHARES, SEED_QUESTIONS), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": (folder / "model.safetensors").stat().st_size,
        "training": record,
    }


def table(figures: dict) -> str:
    """The figures as the card shows them."""
    rows = ["| task family | held-out accuracy |", "| --- | --- |"]
    rows += [f"| {f} | {100 * figures['accuracy'][f]:.0f} % ± {100 * figures['accuracy_standard_error'][f]:.0f} |" for f in FAMILIES]
    t = figures["training"]
    return "\n".join([
        *rows, "",
        f"{figures['questions_per_family']} greedy answers per family, right only if the text is exact; ± is one standard error. "
        f"Held-out loss of the whole corpus: {figures['held_out_nll_nats_per_token']:.3f} nats per answer token. "
        f"{figures['parameters']:,} parameters, {figures['weight_bytes']:,} bytes of bf16 weights. "
        f"Trained for {t['steps']:,} steps of 4,096 tokens with seed {t['seed']} in {t['seconds'] / 60:.0f} minutes on "
        f"{t['hardware']}; the weights are those after step {t['kept']['step']:,}.",
    ])


def update_card(card: Path, figures: dict) -> None:
    """Puts the figures between the card's two markers."""
    text = card.read_text(encoding="utf-8")
    block = f"<!-- figures: begin -->\n{table(figures)}\n<!-- figures: end -->"
    card.write_text(re.sub(r"<!-- figures: begin -->.*<!-- figures: end -->", lambda _: block, text, flags=re.S), encoding="utf-8")


def hardware() -> str:
    """What the training runs on, in words."""
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU threads"


def export_and_measure(work: Path, out: Path, record: dict) -> None:
    """Exports the trained weights to `out`, checks them and writes evaluation.json and the card's figures."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokens.load(work)
    model = Nano(Config(vocab_size=tokenizer.get_vocab_size()))
    model.load_state_dict(torch.load(work / "weights.pt"))
    shutil.copyfile(work / "tokenizer.json", out / "tokenizer.json")
    export.write(model, tokenizer, out)
    difference = export.agrees_with_transformers(out)
    if difference > TOLERANCE:
        raise SystemExit(f"exported log-probabilities differ from transformers by {difference}, more than {TOLERANCE}")
    figures = measure(out, record)
    export.write_json(out / "evaluation.json", figures)
    if (out / "README.md").exists():
        update_card(out / "README.md", figures)
    print(table(figures))


def main() -> None:
    """Reads the arguments and makes the model."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="folder of the model; a card README.md in it gets the figures")
    arguments.add_argument("--steps", type=int, default=train.STEPS)
    arguments.add_argument("--seed", type=int, default=train.SEED)
    arguments.add_argument("--work", type=Path, help="folder for intermediate weights; temporary if not given")
    arguments.add_argument("--trained", action="store_true", help="only export and measure what --work holds")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if not args.trained:
            tokens.build(Config.vocab_size, args.seed).save(str(work / "tokenizer.json"))
            record = train.Run(work, args.steps, args.seed).train() | {"seed": args.seed, "hardware": hardware()}
            (work / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        export_and_measure(work, args.out, json.loads((work / "training.json").read_text()))


if __name__ == "__main__":
    main()
