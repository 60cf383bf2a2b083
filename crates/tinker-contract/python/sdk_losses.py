"""Trains with losses and optimizers of the server through the official Python SDK.

    python sdk_losses.py BASE_URL BASE_MODEL      # the key in TINKER_API_KEY

Prints a JSON object: the metrics of each step with PPO uploaded as a traced graph, computed here, and
built in; the losses of a run with Dimuon; and the outputs of GSPO. Empty where there is no PyTorch, which the
SDK needs to trace.
"""

import json
import sys

import tinker
from tinker import types

try:
    import torch
except ImportError:
    print("{}")
    sys.exit()

BASE_URL, BASE_MODEL = sys.argv[1:3]
ADAM = types.AdamParams(learning_rate=5e-3)
DIMUON = types.DimuonParams(learning_rate=0.01, grad_clip_norm=10.0)
SEQUENCES = [[5, 9, 2, 7, 7, 1], [5, 9, 4, 4], [3, 8, 6, 1, 2], [3, 8, 9, 9, 9, 9, 2]]
LOGPROB = -5.5


def datum(tokens, **others):
    n = len(tokens) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [LOGPROB] * n,
            "advantages": [1.0 - 0.5 * i for i in range(n)],
            **{name: [value] * n for name, value in others.items()},
        },
    )


DATA = [datum(tokens) for tokens in SEQUENCES]


def ppo(logprobs, advantages):
    ratio = torch.exp(logprobs - LOGPROB)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/n:sum": torch.ones_like(logprobs).sum()}


def ppo_here(data, logprobs):
    losses = [ppo(l, d.loss_fn_inputs["advantages"].to_torch())[0] for d, l in zip(data, logprobs)]
    return sum(losses), {}


def train(service, run_pass):
    client = service.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=7)
    futures = []
    for _ in range(3):
        futures.append(run_pass(client))
        client.optim_step(ADAM)
    return [future.result().metrics for future in futures]


def dimuon(service):
    client = service.create_lora_training_client(
        base_model=BASE_MODEL, rank=4, seed=7, optimizer=types.DimuonOptimizerConfig()
    )
    futures = []
    for _ in range(4):
        futures.append(client.forward_backward(DATA, "importance_sampling"))
        step = client.optim_step(DIMUON)
    losses = [future.result().metrics["loss:sum"] for future in futures]
    return dict(losses=losses, step=step.result().metrics, family=client.get_info().optimizer_config.type)


def gspo(service):
    client = service.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=7)
    data = [datum(tokens, sequence_ratio_mask=1.0) for tokens in SEQUENCES]
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    result = client.forward_backward(data, "gspo", config).result()
    parts = [output["elementwise_loss"].data for output in result.loss_fn_outputs]
    return dict(loss=result.metrics["loss:sum"], parts=[x for part in parts for x in part])


def main():
    with tinker.ServiceClient(base_url=BASE_URL) as service:
        handle = service.create_custom_loss(ppo, {"logprobs": 1, "advantages": 1}).result()
        result = dict(
            loss_id=handle.loss_id,
            uploaded=train(service, lambda c: c.forward_backward_custom(DATA, handle)),
            here=train(service, lambda c: c.forward_backward_custom(DATA, ppo_here)),
            built_in=train(service, lambda c: c.forward_backward(DATA, "ppo")),
            dimuon=dimuon(service),
            gspo=gspo(service),
        )
        print(json.dumps(result))


main()
