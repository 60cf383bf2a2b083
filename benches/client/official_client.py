"""The official SDK on the tasks of `bench_client`; `cargo xtask bench client` runs both.

`official_client.py sample|forward_backward URL N` prints one JSON object.
"""

import argparse
import json
import resource
import time

import tinker
from tinker import types

PROMPT = 64
DATUM = 1024


def sample(service, n):
    """Queues n samples at once and awaits them in order."""
    sampler = service.create_sampling_client(base_model="tinker/nano").result()
    params = types.SamplingParams(max_tokens=64)
    start, cpu_start = time.perf_counter(), time.process_time()
    futures = []
    for i in range(n):
        prompt = types.ModelInput.from_ints(list(range(i, i + PROMPT)))
        futures.append(sampler.sample(prompt, num_samples=1, sampling_params=params))
    n_tokens = 0
    for future in futures:
        for sequence in future.result().sequences:
            n_tokens += len(sequence.tokens)
            assert len(sequence.logprobs) == len(sequence.tokens)
    return measured(start, cpu_start, n_tokens)


def forward_backward(service, n):
    """One pass of n data, from plain token lists to the last byte sent."""
    trainer = service.create_lora_training_client(base_model="tinker/nano", rank=32).result()
    inputs = [list(range(i, i + DATUM)) for i in range(n)]
    targets = [list(range(i + 1, i + 1 + DATUM)) for i in range(n)]
    weights = [[1.0] * DATUM for _ in range(n)]
    start, cpu_start = time.perf_counter(), time.process_time()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens),
            loss_fn_inputs={"target_tokens": target, "weights": weight},
        )
        for tokens, target, weight in zip(inputs, targets, weights)
    ]
    output = trainer.forward_backward(data, "cross_entropy").result()
    assert "loss:sum" in output.metrics
    return measured(start, cpu_start, n * DATUM)


def measured(start, cpu_start, n_tokens):
    return dict(
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
        n_tokens=n_tokens,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["sample", "forward_backward"])
    parser.add_argument("url")
    parser.add_argument("n", type=int)
    args = parser.parse_args()
    service = tinker.ServiceClient(base_url=args.url, api_key="tml-benchmark")
    report = (sample if args.task == "sample" else forward_backward)(service, args.n)
    report["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["name"] = f"tinker {tinker.__version__}"
    print(json.dumps(report))


if __name__ == "__main__":
    main()
