"""Our server through the wire, driven by the official SDK; `cargo xtask bench server` starts both.

usage: official_sdk.py make DIR
       official_sdk.py run URL MODEL --steps N --samples N --adapters N      # the key in TINKER_API_KEY

`make` writes a random model of the small shape of the engine's benchmark: hidden 256, 4 layers, vocabulary 4,096.
`run` prints one JSON object: seconds of single calls, and tokens or samples per second.
"""

import argparse
import json
import pathlib
import random
import statistics
import struct
import time

import numpy as np
import tinker
from tinker import types

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, MLP, VOCAB = 256, 4, 4, 2, 64, 688, 4096
RANK, BATCH, LENGTH = 16, 8, 256
PROMPT, NEW_TOKENS = 16, 32
ADAM = types.AdamParams(learning_rate=1e-4)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}


def make(out):
    """Writes a random model as a Hugging Face directory, in bf16."""
    draw = np.random.default_rng(7)

    def normal(rows, columns):
        return draw.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)

    ones = np.ones(HIDDEN, dtype=np.float32)
    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN) * np.float32(HIDDEN**0.5),
        "model.norm.weight": ones,
        "lm_head.weight": normal(VOCAB, HIDDEN) * np.float32(2),
    }
    linears = {
        "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}input_layernorm.weight"] = ones
        tensors[f"{prefix}post_attention_layernorm.weight"] = ones
        for name, (rows, columns) in linears.items():
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    write_bf16(out / "model.safetensors", tensors)


def write_bf16(path, tensors):
    """A safetensors file: the length of its header, the header, the numbers."""
    header, parts, at = {}, [], 0
    for name, values in tensors.items():
        # Cut off instead of rounded: any random model will do.
        part = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def tokens(n, seed):
    return random.Random(seed).choices(range(VOCAB), k=n)


def datum(seed):
    row = tokens(LENGTH + 1, seed)
    return types.Datum(
        model_input=types.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * LENGTH},
    )


def timed(call):
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def trainer(service, model, seed):
    return service.create_lora_training_client(base_model=model, rank=RANK, seed=seed).result()


def training(service, model, n_steps):
    """Steps that are awaited one by one, and steps whose pass and update travel together."""
    client, data = trainer(service, model, 1), [datum(seed) for seed in range(BATCH)]
    passes, updates = [], []
    for _ in range(10):
        passes.append(timed(lambda: client.forward_backward(data, "cross_entropy").result()))
        updates.append(timed(lambda: client.optim_step(ADAM).result()))

    def steps():
        for _ in range(n_steps):
            futures = client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)
            for future in futures:
                future.result()

    return client, {
        "tokens_per_second": n_steps * BATCH * LENGTH / timed(steps),
        "first_pass": passes[0],
        "tenth_pass": passes[9],
        "optim_step": statistics.median(updates),
    }


def sampling(client, n_samples):
    """Samples of one token: one after another, and all at once."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=1, stop=[])

    def ask(seed):
        return sampler.sample(types.ModelInput.from_ints(tokens(PROMPT, seed)), 1, params)

    single = [timed(lambda: ask(seed).result()) for seed in range(110)]

    def together():
        for future in [ask(1000 + i) for i in range(n_samples)]:
            assert len(future.result().sequences[0].tokens) == 1

    return {
        "first_sample": single[0],
        "tenth_sample": single[9],
        "one_sample": statistics.median(single[10:]),
        "samples_per_second": n_samples / max(timed(together), 1e-9),
    }


def adapters(service, model, n_units):
    """The same work by one adapter and by as many as there are units: training and sampling at once."""
    clients = [trainer(service, model, 100 + seed) for seed in range(n_units)]
    samplers = [client.save_weights_and_get_sampling_client().result() for client in clients]
    params = types.SamplingParams(max_tokens=NEW_TOKENS, stop=[])
    n_tokens = n_units * (LENGTH + PROMPT + NEW_TOKENS)

    def work(n_adapters, seed):
        futures = []
        for unit in range(n_units):
            client, sampler = clients[unit % n_adapters], samplers[unit % n_adapters]
            futures.append(client.forward_backward([datum(seed + unit)], "cross_entropy"))
            futures.append(client.optim_step(ADAM))
            prompt = types.ModelInput.from_ints(tokens(PROMPT, seed + unit))
            futures.append(sampler.sample(prompt, 1, params))
        for future in futures:
            future.result()

    # Prompts that no cache has seen before.
    one, many = [], []
    for i in range(3):
        one.append(timed(lambda: work(1, 20_000 + 2000 * i)))
        many.append(timed(lambda: work(n_units, 21_000 + 2000 * i)))
    return {
        "one_adapter": n_tokens / statistics.median(one),
        "many_adapters": n_tokens / statistics.median(many),
    }


def run(args):
    with tinker.ServiceClient(base_url=args.url) as service:
        client, report = training(service, args.model, args.steps)
        report |= sampling(client, args.samples)
        report |= adapters(service, args.model, args.adapters)
    print(json.dumps(report), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("dir", type=pathlib.Path)
    command = commands.add_parser("run")
    command.add_argument("url")
    command.add_argument("model")
    for name in ("steps", "samples", "adapters"):
        command.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    if args.command == "make":
        make(args.dir)
    else:
        run(args)


main()
