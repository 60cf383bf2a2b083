"""Trains with losses of its own through the official Python SDK.

    python sdk_custom_loss.py BASE_URL BASE_MODEL      # the key in TINKER_API_KEY

Prints a JSON object: for each loss the metrics of each step and the path of the checkpoint. Empty where
there is no PyTorch, which the SDK needs for this.
"""

import json
import sys

import tinker
from tinker import types

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("{}")
    sys.exit()

BASE_URL, BASE_MODEL = sys.argv[1:3]
ADAM = types.AdamParams(learning_rate=5e-3)
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
    return -F.logsigmoid(margins).mean(), {"margin": margins.mean().item()}


def train(service, loss):
    client = service.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=7)
    data = [datum(tokens) for tokens in SEQUENCES]
    futures = []
    for _ in range(3):
        futures.append(client.forward_backward_custom(data, loss))
        client.optim_step(ADAM)
    path = client.save_state("theirs").result().path
    return {"steps": [future.result().metrics for future in futures], "path": path}


def main():
    with tinker.ServiceClient(base_url=BASE_URL) as service:
        losses = {"squares": squares, "preferences": preferences}
        print(json.dumps({name: train(service, loss) for name, loss in losses.items()}))


main()
