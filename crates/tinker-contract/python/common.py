"""What the scripts here have in common, which drive a server through other people's clients."""

import json
import os
import subprocess
import sys

from tinker import types


def step(name):
    """Says that a step held."""
    print(f"ok: {name}", flush=True)


def leave(summary):
    """Ends the program with what is read of it."""
    print(json.dumps(summary), flush=True)
    # The SDK's threads may abort the interpreter while it winds down; everything was checked by now.
    os._exit(0)


def datum(tokens, weight=1.0):
    """Next-token prediction over `tokens`, each with the same weight."""
    targets = tokens[1:]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": [weight] * len(targets)},
    )


def logprobs_of(output):
    """The log-probabilities of a pass, a list for each datum."""
    return [list(row["logprobs"].data) for row in output.loss_fn_outputs]


def close(a, b, tolerance=1e-4):
    """Whether two lists have the same numbers, about."""
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b))


def cli(*arguments, folder=None):
    """What the SDK's own command line prints."""
    command = [sys.executable, "-m", "tinker.cli", "-f", "json", *arguments]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
        # On a busy machine about 1 in 50 of the SDK's processes aborts as it leaves, after its answer.
        if done.returncode >= 0:
            break
    assert done.returncode == 0, (arguments, done.returncode, done.stdout, done.stderr)
    return json.loads(done.stdout) if done.stdout.strip() else None
