"""What training code counts on and cannot see go wrong, checked through the official Python SDK.

    python sdk_promises.py BASE_URL BASE_MODEL      # the key in TINKER_API_KEY

Each function below is one promise. Prints a JSON object: for each promise the empty text, or how it was broken.
"""

import json
import math
import struct
import sys
import time
import traceback
import urllib.request

import tinker
from common import close, datum, logprobs_of
from tinker import types

BASE_URL, BASE_MODEL = sys.argv[1:3]
CE = "cross_entropy"
ADAM = types.AdamParams(learning_rate=1e-2)
A = [5, 9, 2, 7, 7, 1, 30, 31]
B = [60, 61, 62, 63]
# Long and short, so that a mean over sequences and one over tokens both show.
MIXED = [A, B, [100, 101]]


def trainer(service, rank=4, seed=7, **options):
    return service.create_lora_training_client(base_model=BASE_MODEL, rank=rank, seed=seed, **options)


def train(client, tokens, n_steps, adam=ADAM):
    for _ in range(n_steps):
        client.forward_backward([datum(tokens)], CE)
        last = client.optim_step(adam)
    return last.result()


def scores(client):
    """The log-probabilities that the training weights give to A and B."""
    return logprobs_of(client.forward([datum(A), datum(B)], CE).result())


def said(sampler):
    """The log-probabilities that a sampler gives to A and B, and what it draws after A."""
    params = types.SamplingParams(max_tokens=8, seed=3, stop=[])
    rows = [sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result() for tokens in (A, B)]
    drawn = sampler.sample(types.ModelInput.from_ints(A), 2, params).result()
    return rows, [(list(s.tokens), list(s.logprobs)) for s in drawn.sequences]


def flat(rows):
    return [x for row in rows for x in row]


def a_sampler_snapshot_stays_what_it_was_while_training_goes_on(service):
    client = trainer(service)
    train(client, A, 5)
    trained = scores(client)
    path = client.save_weights_for_sampler("early").result().path
    named = service.create_sampling_client(model_path=path)
    unnamed = client.save_weights_and_get_sampling_client()
    before = said(named)
    assert said(unnamed) == before, "two samplers of the same weights differ"

    train(client, B, 10)

    assert not close(flat(scores(client)), flat(trained), 1e-2), "the steps changed nothing"
    assert said(named) == before, "the named sampler follows the training run"
    assert said(unnamed) == before, "the sampler without a name follows the training run"
    assert said(service.create_sampling_client(model_path=path)) == before, "a new sampler of the same path differs"


def sampling_an_old_checkpoint_leaves_training_weights_alone(service):
    client, undisturbed = trainer(service), trainer(service)
    for run in (client, undisturbed):
        train(run, A, 5)
    old = service.create_sampling_client(model_path=client.save_weights_for_sampler("old").result().path)
    # The same gradient waits for its step in both runs.
    for run in (client, undisturbed):
        train(run, B, 5)
        run.forward_backward([datum(B)], CE).result()
    before = scores(client)
    sampled = said(old)

    assert scores(client) == before, "sampling put other weights into the training run"
    for run in (client, undisturbed):
        run.optim_step(ADAM).result()
    assert scores(client) == scores(undisturbed), "sampling changed the gradient or the optimizer"
    assert said(old) == sampled, "the old checkpoint changed"


def exports_name_every_target_module(service):
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    for choice, expected in [
        (dict(), attention | mlp | {"lm_head"}),
        (dict(train_unembed=False), attention | mlp),
        (dict(train_mlp=False, train_unembed=False), attention),
        (dict(train_attn=False, train_unembed=False), mlp),
    ]:
        client = trainer(service, **choice)
        path = client.save_weights_external("out").result().path
        rest = service.create_rest_client()
        urls = rest.get_external_weights_urls(path).result().urls
        with urllib.request.urlopen(urls["adapter_config.json"]) as answer:
            config = json.load(answer)
        with urllib.request.urlopen(urls["adapter_model.safetensors"]) as answer:
            (n_bytes,) = struct.unpack("<Q", answer.read(8))
            names = [name for name in json.loads(answer.read(n_bytes)) if name != "__metadata__"]
        held = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}
        assert held == expected, (choice, held)
        assert set(config["target_modules"]) == held, (choice, config["target_modules"], held)
        assert config["r"] == 4 and config["peft_type"] == "LORA", config


def prompt_logprobs_have_one_entry_per_token(service):
    client = trainer(service)
    train(client, A, 3)
    sampler = client.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=2, seed=1, stop=[])
    for n in range(1, len(A) + 1):
        prompt = types.ModelInput.from_ints(A[:n])
        alone = sampler.compute_logprobs(prompt).result()
        sampled = sampler.sample(prompt, 1, params, include_prompt_logprobs=True).result().prompt_logprobs
        for logprobs in (alone, sampled):
            assert len(logprobs) == n, (n, logprobs)
            assert logprobs[0] is None and all(x is not None and x <= 0 for x in logprobs[1:]), logprobs
        if n > 1:
            # The entry of a token is its own, not that of a neighbour.
            trained = client.forward([datum(A[:n])], CE).result().loss_fn_outputs[0]["logprobs"].data
            assert close(alone[1:], trained, 1e-4), (alone, trained)


def an_unknown_base_model_is_refused(service):
    for what, call in [
        ("training", lambda name: service.create_lora_training_client(base_model=name, rank=4).result()),
        ("sampling", lambda name: service.create_sampling_client(base_model=name).result()),
    ]:
        begun = time.monotonic()
        try:
            call("nobody/no-such-model")
        except tinker.APIStatusError as error:
            assert error.status_code in (400, 404, 422), (what, error)
            assert "nobody/no-such-model" in str(error), (what, error)
        except tinker.RequestFailedError as error:
            assert "nobody/no-such-model" in str(error), (what, error)
        else:
            raise AssertionError(f"{what}: any name is taken")
        assert time.monotonic() - begun < 10, f"{what}: the refusal is repeated as if it could pass"


def gradient_clipping_clips(service):
    """With a large epsilon the update depends on the size of the gradient: clipping to a tenth of the norm is
    scaling by a tenth."""

    def stepped(weight, clip):
        client = trainer(service)
        # B starts at zero, so the first step gives A a gradient.
        train(client, A, 2)
        client.forward_backward([datum(A, weight)], CE)
        adam = types.AdamParams(learning_rate=1e-2, eps=1.0, grad_clip_norm=clip)
        return client.optim_step(adam).result().metrics, flat(scores(client))

    free, unclipped = stepped(1.0, 0.0)
    norm = free["unclipped_grad_l2:mean"]
    assert norm > 0, free
    clipped_metrics, clipped = stepped(1.0, norm / 10)
    _, scaled = stepped(0.1, 0.0)
    _, loose = stepped(1.0, norm * 2)

    assert close([clipped_metrics["unclipped_grad_l2:mean"]], [norm], 1e-4 * norm), clipped_metrics
    assert not close(unclipped, scaled, 1e-3), "the case shows nothing: a tenth of the gradient does the same"
    assert close(clipped, scaled, 1e-5), (clipped, scaled)
    assert loose == unclipped, "a norm below the limit was scaled"


def losses_are_sums(service):
    client = trainer(service)
    train(client, A, 2)

    def passed(data):
        output = client.forward_backward(data, CE).result()
        norm = client.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["unclipped_grad_l2:mean"]
        return output.metrics["loss:sum"], norm, flat(row["logprobs"].data for row in output.loss_fn_outputs)

    mixed = [datum(tokens) for tokens in MIXED]
    loss, norm, logprobs = passed(mixed)
    assert len(logprobs) == sum(len(tokens) - 1 for tokens in MIXED)
    assert math.isclose(loss, -sum(logprobs), rel_tol=1e-5), (loss, -sum(logprobs))
    parts = [passed([one]) for one in mixed]
    assert math.isclose(loss, sum(part[0] for part in parts), rel_tol=1e-5), (loss, parts)
    twice = passed(mixed + mixed)
    assert math.isclose(twice[0], 2 * loss, rel_tol=1e-5), (twice[0], loss)
    assert math.isclose(twice[1], 2 * norm, rel_tol=1e-3), "the gradient is divided by the number of sequences"
    tenth = passed([datum(tokens, 0.1) for tokens in MIXED])
    assert math.isclose(tenth[0], loss / 10, rel_tol=1e-4), "the loss is divided by the sum of the weights"
    assert math.isclose(tenth[1], norm / 10, rel_tol=1e-3), "the gradient is divided by the sum of the weights"


PROMISES = [
    a_sampler_snapshot_stays_what_it_was_while_training_goes_on,
    sampling_an_old_checkpoint_leaves_training_weights_alone,
    exports_name_every_target_module,
    prompt_logprobs_have_one_entry_per_token,
    an_unknown_base_model_is_refused,
    gradient_clipping_clips,
    losses_are_sums,
]


def main():
    verdicts = {}
    with tinker.ServiceClient(base_url=BASE_URL) as service:
        for promise in PROMISES:
            try:
                promise(service)
                verdicts[promise.__name__] = ""
            except Exception:
                verdicts[promise.__name__] = traceback.format_exc()
    print(json.dumps(verdicts))


main()
