"""PyTorch beside our engine: the same weights, shapes and work, in plain PyTorch.

The decoder is written with `torch.nn.functional` directly, without the module overhead of a model
library, with a preallocated KV cache and the fused AdamW, so that PyTorch shows what it can.

usage: torch_engine.py make DIR --weights bf16|f32     writes the model, adapter and tokens
       torch_engine.py train DIR --threads N --repeats N
       torch_engine.py decode DIR --threads N --repeats N
"""

import argparse
import json
import math
import pathlib
import resource
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 256, 4, 4, 2, 688, 4096
HEAD_SIZE = HIDDEN // HEADS
RANK, ALPHA = 16, 32.0
BATCH, LENGTH = 8, 256
PROMPT, NEW_TOKENS = 16, 128
THETA, EPS = 10000.0, 1e-5
LEARNING_RATE, BETAS, ADAM_EPS = 1e-4, (0.9, 0.95), 1e-8
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
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
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def make(out, dtype):
    """Writes a random model as a Hugging Face directory, an adapter with `B` not zero, and tokens.

    `dtype` is that of the file; the computation is float32 either way.
    """
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN) * 2,
    }
    adapter = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN)
        for name, (n_out, n_in) in SHAPES.items():
            weights[f"{prefix}{name}.weight"] = normal(n_out, n_in)
            adapter[f"base_model.model.{prefix}{name}.lora_A.weight"] = normal(RANK, n_in)
            adapter[f"base_model.model.{prefix}{name}.lora_B.weight"] = normal(n_out, RANK) * 0.1
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(weights, out / "model.safetensors")
    save_file(adapter, out / "adapter.safetensors")
    config = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    (out / "tokens.json").write_text(
        json.dumps({"train": tokens.tolist(), "prompt": tokens[0, :PROMPT].tolist()}) + "\n"
    )


class Decoder:
    """The base model, frozen, with the adapter applied unmerged."""

    def __init__(self, path):
        # Cloned, as a loaded tensor is a map of the file, which starts at any byte: in memory of its
        # own it is aligned, and products with it are faster.
        self.base, self.lora = (
            {name: tensor.float().clone() for name, tensor in load_file(path / file).items()}
            for file in ("model.safetensors", "adapter.safetensors")
        )
        angles = torch.outer(
            torch.arange(1024).float(), THETA ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        )
        self.cos = torch.cat([angles.cos()] * 2, -1)
        self.sin = torch.cat([angles.sin()] * 2, -1)

    def trainable(self):
        return [tensor.requires_grad_(True) for tensor in self.lora.values()]

    def linear(self, x, name):
        a = self.lora[f"base_model.model.{name}.lora_A.weight"]
        b = self.lora[f"base_model.model.{name}.lora_B.weight"]
        # The scale on the narrow intermediate, where it costs least.
        return F.linear(x, self.base[f"{name}.weight"]) + F.linear(F.linear(x, a) * (ALPHA / RANK), b)

    def rope(self, x, start):
        cos, sin = (t[start : start + x.shape[2]] for t in (self.cos, self.sin))
        half = HEAD_SIZE // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def norm(self, x, name):
        return F.rms_norm(x, (HIDDEN,), self.base[f"{name}.weight"], EPS)

    def attention(self, x, prefix, cache, start):
        rows, length, _ = x.shape

        def project(name, n_heads):
            y = self.linear(x, f"{prefix}self_attn.{name}")
            return y.view(rows, length, n_heads, HEAD_SIZE).transpose(1, 2)

        q = self.rope(project("q_proj", HEADS), start)
        k = self.rope(project("k_proj", KV_HEADS), start)
        v = project("v_proj", KV_HEADS)
        if cache is not None:
            keys, values = cache
            keys[:, :, start : start + length] = k
            values[:, :, start : start + length] = v
            k, v = keys[:, :, : start + length], values[:, :, : start + length]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=True)
        o = o.transpose(1, 2).reshape(rows, length, HEADS * HEAD_SIZE)
        return self.linear(o, f"{prefix}self_attn.o_proj")

    def mlp(self, x, prefix):
        gate = F.silu(self.linear(x, f"{prefix}mlp.gate_proj"))
        up = self.linear(x, f"{prefix}mlp.up_proj")
        return self.linear(gate * up, f"{prefix}mlp.down_proj")

    def hidden(self, tokens, caches=None, start=0):
        """`[rows, length]` tokens to `[rows, length, hidden]` after the last norm."""
        x = F.embedding(tokens, self.base["model.embed_tokens.weight"])
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            cache = caches[layer] if caches else None
            x = x + self.attention(self.norm(x, f"{prefix}input_layernorm"), prefix, cache, start)
            x = x + self.mlp(self.norm(x, f"{prefix}post_attention_layernorm"), prefix)
        return self.norm(x, "model.norm")

    def logits(self, x):
        return F.linear(x, self.base["lm_head.weight"])


def train(path, n_steps):
    """Seconds of each training step after one to warm up, and the losses."""
    model = Decoder(path)
    tokens = torch.tensor(json.loads((path / "tokens.json").read_text())["train"])
    optimizer = torch.optim.AdamW(
        model.trainable(), lr=LEARNING_RATE, betas=BETAS, eps=ADAM_EPS, weight_decay=0.0, fused=True
    )
    seconds, losses, cpu_start = [], [], 0.0
    for step in range(n_steps + 1):
        if step == 1:
            cpu_start = time.process_time()
        start = time.perf_counter()
        logits = model.logits(model.hidden(tokens[:, :-1]))
        loss = F.cross_entropy(logits.view(-1, VOCAB), tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    cpu_seconds = time.process_time() - cpu_start
    return dict(seconds=seconds[1:], cpu_seconds=cpu_seconds, losses=losses, n_tokens=BATCH * LENGTH)


@torch.inference_mode()
def decode(path, n_passes):
    """Seconds of each pass of greedy decoding after one to warm up, and the tokens."""
    model = Decoder(path)
    prompt = torch.tensor([json.loads((path / "tokens.json").read_text())["prompt"]])
    shape = (1, KV_HEADS, PROMPT + NEW_TOKENS, HEAD_SIZE)
    seconds, cpu_seconds = [], []
    for _ in range(n_passes + 1):
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(LAYERS)]
        x = model.hidden(prompt, caches)[:, -1]
        tokens, logprobs = [], []
        start, cpu_start = time.perf_counter(), time.process_time()
        for step in range(NEW_TOKENS):
            best = model.logits(x).log_softmax(-1).max(-1)
            tokens.append(best.indices.item())
            logprobs.append(best.values.item())
            x = model.hidden(best.indices[:, None], caches, PROMPT + step)[:, -1]
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return dict(
        seconds=seconds[1:],
        cpu_seconds=sum(cpu_seconds[1:]),
        tokens=tokens,
        logprobs=logprobs,
        n_tokens=NEW_TOKENS,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["make", "train", "decode"])
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weights", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.task == "make":
        return make(args.dir, DTYPES[args.weights])
    result = train(args.dir, args.repeats) if args.task == "train" else decode(args.dir, args.repeats)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["name"] = f"PyTorch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} f32"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
