"""Trains, samples and manages through the official Python SDK, and fails where an answer is wrong.

    python sdk_flow.py BASE_URL BASE_MODEL      # the key in TINKER_API_KEY

Prints one line for each step that held, and a JSON object with paths and figures at the end.
"""

import math
import os
import sys
import time

import tinker
from common import cli, close, datum, leave, logprobs_of, step
from tinker import types

BASE_URL, BASE_MODEL = sys.argv[1:3]
ADAM = types.AdamParams(learning_rate=5e-3)
TEXTS = ["the cat sat on the mat", "a dog ran to the big red barn", "we go", "one two three four five six"]
summary = {}


def train(client, data, n_steps):
    """Pipelined steps; the loss of each."""
    futures = []
    for _ in range(n_steps):
        futures.append(client.forward_backward(data, "cross_entropy"))
        optim = client.optim_step(ADAM)
    metrics = optim.result().metrics
    return [future.result().metrics["loss:sum"] for future in futures], metrics


def fails(what, call, *expected):
    """The call fails soon, as an error of the request, with a text that names the culprit."""
    begun = time.monotonic()
    try:
        result = call()
    except (tinker.RequestFailedError, tinker.BadRequestError, tinker.NotFoundError, tinker.UnprocessableEntityError) as error:
        text = str(error)
        assert all(word in text for word in expected), f"{what}: {text!r} lacks one of {expected}"
        assert time.monotonic() - begun < 10, f"{what} took {time.monotonic() - begun:.1f} s to fail"
        return error
    raise AssertionError(f"{what} succeeded: {result!r}")


def training(service):
    client = service.create_lora_training_client(base_model=BASE_MODEL, rank=8, seed=7).result()
    info = client.get_info()
    assert info.model_data.model_name == BASE_MODEL and info.lora_rank == 8, info
    assert client.model_id.split(":train:")[1] == "0", client.model_id
    step("a training client")

    tokenizer = client.get_tokenizer()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    step("the tokenizer, offline")

    data = [datum(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]
    losses, metrics = train(client, data, 20)
    assert all(math.isfinite(loss) for loss in losses), losses
    assert losses[-1] < 0.5 * losses[0], losses
    assert sum(b < a for a, b in zip(losses, losses[1:])) >= 15, losses
    assert metrics and all(math.isfinite(value) for value in metrics.values()), metrics
    summary["losses"], summary["optim_metrics"] = losses, metrics
    step("20 steps with falling loss, and metrics of the optimizer")

    output = client.forward(data, "cross_entropy").result()
    rows = logprobs_of(output)
    assert [len(row) for row in rows] == [d.model_input.length for d in data]
    assert all(value <= 0 for row in rows for value in row)
    loss = output.metrics["loss:sum"]
    assert math.isclose(loss, -sum(map(sum, rows)), rel_tol=1e-5), (loss, rows)
    assert loss < losses[-1], (loss, losses[-1])
    assert logprobs_of(client.forward(data, "cross_entropy").result()) == rows
    step("forward alone: it repeats, and the loss is the sum of its log-probabilities")
    return client, tokenizer, data


def sampling(service, client, tokenizer, data):
    path = client.save_weights_for_sampler("final").result().path
    assert path == f"tinker://{client.model_id}/sampler_weights/final", path
    sampler = service.create_sampling_client(model_path=path).result()
    assert sampler.get_base_model() == BASE_MODEL
    prompt = types.ModelInput.from_ints(tokenizer.encode("the cat", add_special_tokens=False))
    params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=11, stop=[])
    response = sampler.sample(prompt, num_samples=3, sampling_params=params, include_prompt_logprobs=True).result()
    assert len(response.sequences) == 3
    assert len({tuple(s.tokens) for s in response.sequences}) > 1, "samples of one request differ"
    for sequence in response.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == 12, sequence
        assert sequence.stop_reason == "length" and all(value <= 0 for value in sequence.logprobs)
        whole = types.ModelInput.from_ints(prompt.to_ints() + list(sequence.tokens))
        again = sampler.compute_logprobs(whole).result()
        assert again[0] is None and len(again) == whole.length
        assert close(again[prompt.length :], sequence.logprobs), (again, sequence.logprobs)
        assert close(again[1 : prompt.length], response.prompt_logprobs[1:])
    assert response.prompt_logprobs[0] is None and len(response.prompt_logprobs) == prompt.length
    step("samples with log-probabilities that equal recomputed ones")

    repeated = sampler.sample(prompt, num_samples=3, sampling_params=params).result()
    assert [s.tokens for s in repeated.sequences] == [s.tokens for s in response.sequences]
    top = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=4, temperature=0.0), topk_prompt_logprobs=2).result()
    table = top.topk_prompt_logprobs
    assert table[0] is None and all(len(row) == 2 and row[0][1] >= row[1][1] for row in table[1:]), table
    step("seeds repeat samples, and top-k tables are sorted")

    rows = logprobs_of(client.forward(data, "cross_entropy").result())
    for example, row in zip(data, rows):
        tokens = example.model_input.to_ints() + [example.loss_fn_inputs["target_tokens"].data[-1]]
        ours = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
        assert close(ours[1:], row), (ours, row)
    step("the sampler has the weights that were trained")

    live = client.save_weights_and_get_sampling_client()
    live = live.result() if hasattr(live, "result") else live
    assert live.sample(prompt, 1, params).result().sequences[0].tokens == response.sequences[0].tokens
    base = service.create_sampling_client(base_model=BASE_MODEL).result()
    assert not close(base.compute_logprobs(prompt).result()[1:], response.prompt_logprobs[1:])
    step("a sampler without a name, and one of the base model")
    return path


def scoring(service, tokenizer):
    """Everything that a sample tells about its prompt."""
    sampler = service.create_sampling_client(base_model=BASE_MODEL).result()
    tokens = tokenizer.encode("the cat sat on the mat and the dog sat on the log by the red barn", add_special_tokens=False)
    prompt, n = types.ModelInput.from_ints(tokens), len(tokens)
    assert n >= 18, "too short for the prefix cache"

    def ask(max_tokens=1, **more):
        params = types.SamplingParams(max_tokens=max_tokens, seed=3, stop=[])
        return sampler.sample(prompt, 1, params, **more).result()

    whole = ask(include_prompt_logprobs=True, topk_prompt_logprobs=3)
    table = whole.topk_prompt_logprobs
    wanted = [[tokens[i + 1], table[i + 1][0][0], -1] for i in range(n - 1)]
    flat = [token for row in wanted for token in row]
    dense = types.TensorData(data=flat, dtype="int64", shape=[n - 1, 3])
    scored = ask(target_prompt_logprobs=dense).target_prompt_logprobs
    assert list(scored.shape) == [n - 1, 3], scored.shape
    expected = [x for i in range(1, n) for x in (whole.prompt_logprobs[i], table[i][0][1], 0.0)]
    assert list(scored.data) == expected, (scored.data, expected)
    rows = [0] * (n - 1) + [1]
    last = types.TensorData(data=[tokens[-1]], dtype="int64", shape=[n - 1, 1], sparse_crow_indices=rows, sparse_col_indices=[0])
    answer = ask(target_prompt_logprobs=last)
    assert list(answer.target_prompt_logprobs.data) == [whole.prompt_logprobs[-1]], answer.target_prompt_logprobs
    assert answer.prompt_cache_hit_tokens == n - 2, answer.prompt_cache_hit_tokens
    step("chosen tokens of a prompt are scored, dense and sparse")

    drawn = ask(prompt_alt_tokens_k=4).prompt_alt_tokens
    assert list(drawn.tokens.shape) == list(drawn.logprobs.shape) == [n - 1, 4]
    again = ask(prompt_alt_tokens_k=4).prompt_alt_tokens
    assert list(drawn.tokens.data) == list(again.tokens.data), "a seed repeats them"
    known = [dict(row) for row in ask(topk_prompt_logprobs=100).topk_prompt_logprobs[1:]]
    pairs = [(i // 4, t, x) for i, (t, x) in enumerate(zip(drawn.tokens.data, drawn.logprobs.data))]
    found = [known[row][token] == x for row, token, x in pairs if token in known[row]]
    assert all(found) and len(found) > n, (len(found), len(pairs))
    step("alternatives are drawn at every position of a prompt")

    end = ask(include_prompt_logprobs=True, prompt_logprobs_last_n=3, topk_prompt_logprobs=3)
    assert end.prompt_logprobs == [None] * (n - 3) + whole.prompt_logprobs[-3:], end.prompt_logprobs
    assert end.topk_prompt_logprobs == [None] * (n - 3) + table[-3:], end.topk_prompt_logprobs
    # The token before the first that is scored goes through the model again.
    assert end.prompt_cache_hit_tokens == n - 4, end.prompt_cache_hit_tokens
    assert sampler.compute_logprobs(prompt, prompt_logprobs_last_n=3).result() == end.prompt_logprobs
    again = ask()
    assert again.prompt_cache_hit_tokens == n - 1 and again.sequences[0].tokens == whole.sequences[0].tokens
    step("the end of a prompt alone is scored, and the rest taken from the cache")


def stopping(service, tokenizer):
    sampler = service.create_sampling_client(base_model=BASE_MODEL).result()
    prompt = types.ModelInput.from_ints(tokenizer.encode("the dog", add_special_tokens=False))

    def ask(stop):
        params = types.SamplingParams(max_tokens=40, seed=5, stop=stop)
        return sampler.sample(prompt, 1, params).result().sequences[0]

    free = ask([]).tokens
    pieces = [tokenizer.decode([token]) for token in free]
    texts = [tokenizer.decode(free[: i + 1]) for i in range(len(free))]
    plain = [piece.isascii() and piece.isprintable() and len(piece) < 10 for piece in pieces]
    # Text that begins within one token and ends within the next.
    at = next(i for i in range(4, len(free) - 1) if plain[i] and plain[i + 1])
    stop = pieces[at][-1] + pieces[at + 1][0]
    first = next(i for i, text in enumerate(texts) if stop in text)
    stopped = ask([stop])
    assert (stopped.tokens, stopped.stop_reason) == (free[: first + 1], "stop"), (stop, stopped, free)
    assert ask("nowhere to be found").tokens == free
    step("a stop string that spans two tokens ends a sample")


def following(service, client, tokenizer, data):
    prompt = types.ModelInput.from_ints(tokenizer.encode("a dog", add_special_tokens=False))
    first = client.save_weights_and_get_sampling_client(kind="inflight")
    fixed = client.save_weights_and_get_sampling_client(kind="snapshot")
    old = first.compute_logprobs(prompt).result()
    assert fixed.compute_logprobs(prompt).result() == old
    state = client.save_state("before-following").result().path
    train(client, data, 1)
    second = client.save_weights_and_get_sampling_client(kind="inflight")
    new = second.compute_logprobs(prompt).result()
    assert new != old and first.compute_logprobs(prompt).result() == new
    assert fixed.compute_logprobs(prompt).result() == old
    client.load_state_with_optimizer(state).result()
    step("inflight samplers follow the run, and a snapshot does not")


def restoring(service, client, data):
    state = client.save_state("step-20", ttl_seconds=7200, user_metadata={"note": "mine"}).result().path
    assert state == f"tinker://{client.model_id}/weights/step-20", state
    before = logprobs_of(client.forward(data, "cross_entropy").result())
    uninterrupted, _ = train(client, data, 3)
    after = logprobs_of(client.forward(data, "cross_entropy").result())

    full = service.create_training_client_from_state_with_optimizer(state).result()
    assert full.model_id != client.model_id
    assert logprobs_of(full.forward(data, "cross_entropy").result()) == before
    resumed, _ = train(full, data, 3)
    assert resumed == uninterrupted, (resumed, uninterrupted)
    assert logprobs_of(full.forward(data, "cross_entropy").result()) == after
    summary["twins"] = [c.save_state("twin").result().path for c in (client, full)]
    step("training from state with optimizer continues bit for bit")

    weights = service.create_training_client_from_state(state).result()
    assert logprobs_of(weights.forward(data, "cross_entropy").result()) == before
    restarted, _ = train(weights, data, 3)
    assert restarted[0] == uninterrupted[0] and restarted[2] != uninterrupted[2], restarted
    step("training from weights alone starts a new optimizer")
    return state


def managing(client, state, sampler):
    rest = tinker.ServiceClient(base_url=BASE_URL).create_rest_client()
    runs = rest.list_training_runs(limit=50).result()
    ids = [run.training_run_id for run in runs.training_runs]
    assert client.model_id in ids and runs.cursor.total_count == len(ids) == 3, runs
    run = rest.get_training_run(client.model_id).result()
    assert run.base_model == BASE_MODEL and run.is_lora and run.lora_rank == 8 and not run.corrupted
    assert run.last_checkpoint.tinker_path == summary["twins"][0], run
    assert run.last_sampler_checkpoint.tinker_path == sampler, run
    found = {c.tinker_path: c for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert {state, sampler, summary["twins"][0]} <= set(found), found
    assert found[state].user_metadata == {"note": "mine"} and found[state].expires_at, found[state]
    assert found[state].size_bytes > found[sampler].size_bytes > 0
    everything = [c.tinker_path for c in rest.list_user_checkpoints(limit=100).result().checkpoints]
    assert set(found) | {summary["twins"][1]} <= set(everything), everything
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert info.base_model == BASE_MODEL and info.is_lora and info.lora_rank == 8, info
    models = rest.get_server_capabilities().result().supported_models
    assert BASE_MODEL in [model.model_name for model in models], models
    step("runs, checkpoints, weights and models are listed")

    rest.delete_checkpoint_from_tinker_path(sampler).result()
    left = [c.tinker_path for c in rest.list_checkpoints(client.model_id).result().checkpoints]
    assert sampler not in left and state in left, left
    step("a checkpoint is deleted")
    return ids, left


def command_line(client, ids, checkpoints):
    runs = cli("run", "list", "--limit", "0")["runs"]
    assert [run["training_run_id"] for run in runs] == ids, runs
    assert cli("run", "info", client.model_id)["training_run_id"] == client.model_id
    listed = cli("checkpoint", "list", "--run-id", client.model_id)["checkpoints"]
    assert [c["tinker_path"] for c in listed] == checkpoints, listed
    assert cli("checkpoint", "info", checkpoints[0])["tinker_path"] == checkpoints[0]
    names = [model["model_name"] for model in cli("model", "list")["models"]]
    assert BASE_MODEL in names, names
    step("the SDK's own command line lists the same")


def refusals(service, client, data, state):
    tokens = [1, 2, 10**6]
    fails("a token out of range", lambda: client.forward_backward([datum(tokens)], "cross_entropy").result(), "1000000")
    fails("an unknown loss", lambda: client.forward_backward(data, "mystery").result(), "mystery")
    fails(
        "an unknown model",
        lambda: service.create_lora_training_client(base_model="no/such-model").result(),
        "no/such-model",
    )
    sampler = state.replace("/weights/", "/sampler_weights/")
    fails("a sampler of a training checkpoint", lambda: service.create_sampling_client(model_path=state).result(), sampler)
    missing = state.replace("step-20", "nowhere")
    fails("an unknown checkpoint", lambda: service.create_training_client_from_state(missing).result(), "nowhere")
    fails("a name that is taken", lambda: client.save_state("step-20").result(), "step-20")
    assert client.save_state("step-20", overwrite=True).result().path == state
    # Refusals leave the run usable, in order.
    losses, _ = train(client, data, 1)
    assert math.isfinite(losses[0])
    step("bad input fails soon and names the culprit")


def main():
    assert os.environ.get("HF_HUB_OFFLINE") == "1", "the flow must not need the network"
    os.environ["TINKER_BASE_URL"] = BASE_URL
    with tinker.ServiceClient(base_url=BASE_URL, user_metadata={"test": "flow"}) as service:
        client, tokenizer, data = training(service)
        sampler = sampling(service, client, tokenizer, data)
        scoring(service, tokenizer)
        stopping(service, tokenizer)
        following(service, client, tokenizer, data)
        state = restoring(service, client, data)
        ids, checkpoints = managing(client, state, sampler)
        command_line(client, ids, checkpoints)
        refusals(service, client, data, state)
    step("the session is finished")
    leave(summary)


main()
