"""Trains with losses of its own through the official Python SDK.

    python sdk_custom_loss.py BASE_URL BASE_MODEL [--stand-in]   # the key in TINKER_API_KEY

Prints a JSON object: which PyTorch it was, and for each loss the metrics of each step and the path of the
checkpoint. Without PyTorch, or with --stand-in, the SDK gets `stand_in/torch.py` in its place.
"""

import importlib.util
import json
import pathlib
import sys

if "--stand-in" in sys.argv or importlib.util.find_spec("torch") is None:
    sys.path.insert(0, str(pathlib.Path(__file__).parent / "stand_in"))

import tinker
import torch
from tinker import types

BASE_URL, BASE_MODEL = sys.argv[1:3]
ADAM = types.AdamParams(learning_rate=5e-3)
CHECKPOINT = "theirs" if torch.__version__ != "stand-in" else "stand-in"
# Pairs: the first of each is preferred.
SEQUENCES = [[5, 9, 2, 7, 7, 1], [5, 9, 4, 4], [3, 8, 6, 1, 2], [3, 8, 9, 9, 9, 9, 2]]


def datum(tokens):
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:]},
    )


def squares(data, logprobs):
    loss = sum((l * l).sum() for l in logprobs)
    return loss, {"n_data": float(len(data))}


def preferences(data, logprobs):
    sums = torch.stack([l.sum() for l in logprobs])
    margins = 0.5 * (sums[0::2] - sums[1::2])
    return -torch.nn.functional.logsigmoid(margins).mean(), {"margin": margins.mean().item()}


def train(service, loss):
    client = service.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=7)
    data = [datum(tokens) for tokens in SEQUENCES]
    futures = []
    for _ in range(3):
        futures.append(client.forward_backward_custom(data, loss))
        client.optim_step(ADAM)
    path = client.save_state(CHECKPOINT).result().path
    return {"steps": [future.result().metrics for future in futures], "path": path}


def main():
    with tinker.ServiceClient(base_url=BASE_URL) as service:
        losses = {"squares": squares, "preferences": preferences}
        trained = {name: train(service, loss) for name, loss in losses.items()}
        print(json.dumps({"torch": torch.__version__, **trained}))


main()
