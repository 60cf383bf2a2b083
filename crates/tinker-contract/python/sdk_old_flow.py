"""Trains, saves, loads and samples through an older official Python SDK, and fails where an answer is wrong.

    python sdk_old_flow.py BASE_URL BASE_MODEL      # the key in TINKER_API_KEY

Prints one line for each step that held, and a JSON object with the SDK's version and its losses at the end. Uses
nothing that a version since 0.15 lacks.
"""

import math
import os
import sys
from importlib.metadata import version

import tinker
from common import close, datum, leave, logprobs_of, step
from tinker import types

BASE_URL, BASE_MODEL = sys.argv[1:3]
ADAM = types.AdamParams(learning_rate=5e-3)
TEXTS = ["the cat sat on the mat", "a dog ran to the big red barn", "we go"]


def done(value):
    """What a call gives, whether this version returns it or a future of it."""
    return value.result() if hasattr(value, "result") else value


def train(client, data, n_steps):
    losses = []
    for _ in range(n_steps):
        loss = client.forward_backward(data, "cross_entropy")
        optim = client.optim_step(ADAM)
        losses.append(loss.result().metrics["loss:sum"])
        optim.result()
    return losses


def training(service):
    names = [model.model_name for model in service.get_server_capabilities().supported_models]
    assert BASE_MODEL in names, names
    client = done(service.create_lora_training_client(base_model=BASE_MODEL, rank=8, seed=7))
    info = client.get_info()
    assert info.model_data.model_name == BASE_MODEL, info
    tokenizer = client.get_tokenizer()
    data = [datum(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]
    losses = train(client, data, 12)
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < 0.7 * losses[0], losses
    rows = logprobs_of(client.forward(data, "cross_entropy").result())
    assert [len(row) for row in rows] == [d.model_input.length for d in data], rows
    assert -sum(map(sum, rows)) < losses[-1], (rows, losses)
    step("a training client, and steps with falling loss")
    return client, tokenizer, data, losses


def saving(service, client, data):
    state = client.save_state("mid").result().path
    before = logprobs_of(client.forward(data, "cross_entropy").result())
    uninterrupted = train(client, data, 2)
    full = done(service.create_training_client_from_state_with_optimizer(state))
    assert logprobs_of(full.forward(data, "cross_entropy").result()) == before
    assert train(full, data, 2) == uninterrupted
    weights = done(service.create_training_client_from_state(state))
    assert logprobs_of(weights.forward(data, "cross_entropy").result()) == before
    client.load_state_with_optimizer(state).result()
    assert train(client, data, 2) == uninterrupted
    step("state is saved and loaded, with and without the optimizer")


def sampling(service, client, tokenizer, data):
    path = client.save_weights_for_sampler("final").result().path
    sampler = done(service.create_sampling_client(model_path=path))
    prompt = types.ModelInput.from_ints(tokenizer.encode("the cat", add_special_tokens=False))
    params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=11, stop=[])
    response = sampler.sample(prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
    assert len(response.sequences) == 2 and response.prompt_logprobs[0] is None
    assert len(response.topk_prompt_logprobs) == len(response.prompt_logprobs) == prompt.length
    for sequence in response.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == 12, sequence
        whole = types.ModelInput.from_ints(prompt.to_ints() + list(sequence.tokens))
        again = sampler.compute_logprobs(whole).result()
        assert again[0] is None and close(again[prompt.length :], sequence.logprobs), (again, sequence)
    repeated = sampler.sample(prompt, 2, params).result()
    assert [s.tokens for s in repeated.sequences] == [s.tokens for s in response.sequences]
    step("samples with log-probabilities that equal recomputed ones")

    rows = logprobs_of(client.forward(data, "cross_entropy").result())
    for example, row in zip(data, rows):
        tokens = example.model_input.to_ints() + [example.loss_fn_inputs["target_tokens"].data[-1]]
        assert close(sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:], row)
    live = done(client.save_weights_and_get_sampling_client("live"))
    assert live.sample(prompt, 1, params).result().sequences[0].tokens == response.sequences[0].tokens
    base = done(service.create_sampling_client(base_model=BASE_MODEL))
    assert not close(base.compute_logprobs(prompt).result()[1:], response.prompt_logprobs[1:])
    step("samplers of a checkpoint, of the run as it is, and of the base model")
    return path


def managing(service, client, sampler):
    rest = service.create_rest_client()
    ids = [run.training_run_id for run in rest.list_training_runs(limit=50).result().training_runs]
    assert client.model_id in ids, ids
    found = {c.tinker_path for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert sampler in found, found
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    assert sampler not in {c.tinker_path for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    step("runs and checkpoints are listed, and one is deleted")


def refusal(client, data):
    try:
        result = client.forward_backward([datum([1, 2, 10**6])], "cross_entropy").result()
    except tinker.TinkerError as error:
        assert "1000000" in str(error), error
    else:
        raise AssertionError(f"a token out of range was taken: {result!r}")
    assert math.isfinite(train(client, data, 1)[0])
    step("bad input names the culprit and leaves the run usable")


def main():
    assert os.environ.get("HF_HUB_OFFLINE") == "1", "the flow must not need the network"
    service = tinker.ServiceClient(base_url=BASE_URL, user_metadata={"test": "old flow"})
    client, tokenizer, data, losses = training(service)
    saving(service, client, data)
    sampler = sampling(service, client, tokenizer, data)
    managing(service, client, sampler)
    refusal(client, data)
    leave({"version": version("tinker"), "losses": losses})


main()
