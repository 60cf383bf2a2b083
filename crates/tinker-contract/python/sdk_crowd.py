"""Queues requests on many sampling clients of the official SDK at once; `crowd` (src/bin) does so with ours.

    python sdk_crowd.py BASE_URL MODEL SAMPLERS EACH    # the key in TINKER_API_KEY

Prints one JSON object: what went wrong, and seconds from the moment when all samplers were there to the last result of
the middle sampler and of the slowest. Each sampler of the SDK has connections of its own, so that thousands of them open
more files than many systems allow a process.
"""

import asyncio
import sys
import time
import warnings

import tinker
from tinker import types

from common import leave

# Samplers that share a session.
PER_SESSION = 200
# Tokens of a prompt, and to draw.
PROMPT = 16
DRAWN = 4


async def gather(base_url, model, n_samplers):
    samplers = []
    for number in range(n_samplers):
        if number % PER_SESSION == 0:
            service = tinker.ServiceClient(base_url=base_url)
        samplers.append(await service.create_sampling_client_async(base_model=model))
    return samplers


async def ask(sampler, first):
    prompt = types.ModelInput.from_ints([(first + i) % 200 for i in range(PROMPT)])
    params = types.SamplingParams(max_tokens=DRAWN, stop=[])
    sampled = await sampler.sample_async(prompt=prompt, num_samples=1, sampling_params=params)
    n_tokens = len(sampled.sequences[0].tokens)
    if n_tokens != DRAWN:
        raise ValueError(f"a continuation of {n_tokens} tokens")


async def main(base_url, model, n_samplers, n_each):
    samplers = await gather(base_url, model, n_samplers)
    begun = time.monotonic()

    async def use(number, sampler):
        asked = [ask(sampler, number * n_each + i) for i in range(n_each)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        return time.monotonic() - begun, [repr(error) for error in outcomes if isinstance(error, BaseException)]

    ends = await asyncio.gather(*(use(*pair) for pair in enumerate(samplers)))
    times = sorted(seconds for seconds, _ in ends)
    errors = [error for _, some in ends for error in some]
    leave(
        {
            "n_errors": len(errors),
            "errors": errors[:5],
            "median": times[len(times) // 2],
            "longest": times[-1],
        }
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    base_url, model, n_samplers, n_each = sys.argv[1:]
    asyncio.run(main(base_url, model, int(n_samplers), int(n_each)))
