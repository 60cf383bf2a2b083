"""PyTorch beside our engine: the same weights, shapes and work, in plain PyTorch.

The decoder is written with `torch.nn.functional` directly, without the module overhead of a model
library, with a preallocated KV cache and the fused AdamW, so that PyTorch shows what it can.

usage: torch_engine.py make DIR --shape small|large --weights bf16|f32
       torch_engine.py train DIR --compute f32|bf16 --threads N --repeats N [--device cuda]
       torch_engine.py decode DIR --sequences N --compute f32|bf16 --threads N --repeats N [--device cuda]

`make` writes the model, adapter and tokens that both programs read.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import resource
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HEAD_SIZE = 64
RANK, ALPHA = 16, 32.0
PROMPT, PROMPTS = 16, 8
THETA, EPS = 10000.0, 1e-5
LEARNING_RATE, BETAS, ADAM_EPS = 1e-4, (0.9, 0.95), 1e-8
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclasses.dataclass
class Shape:
    """Sizes of a model, of the batch it trains on and of what it decodes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    batch: int
    length: int
    new_tokens: int

    def linears(self):
        q, kv = self.heads * HEAD_SIZE, self.kv_heads * HEAD_SIZE
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def config(self, dtype):
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_SIZE,
            "max_position_embeddings": 1024,
            "rms_norm_eps": EPS,
            "rope_theta": THETA,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


SHAPES = {
    "small": Shape(256, 4, 4, 2, 688, 4096, batch=8, length=256, new_tokens=128),
    "large": Shape(1024, 8, 16, 8, 2752, 32000, batch=2, length=512, new_tokens=32),
}


def make(out, shape, dtype):
    """Writes a random model as a Hugging Face directory, an adapter with `B` not zero, and tokens.

    `dtype` is that of the file, not of the computation.
    """
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)

    def normal(*size):
        return torch.randn(size, generator=generator) / math.sqrt(size[-1])

    weights = {
        "model.embed_tokens.weight": torch.randn(shape.vocab, shape.hidden, generator=generator),
        "model.norm.weight": torch.ones(shape.hidden),
        "lm_head.weight": normal(shape.vocab, shape.hidden) * 2,
    }
    adapter = {}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden)
        for name, (n_out, n_in) in shape.linears().items():
            weights[f"{prefix}{name}.weight"] = normal(n_out, n_in)
            adapter[f"base_model.model.{prefix}{name}.lora_A.weight"] = normal(RANK, n_in)
            adapter[f"base_model.model.{prefix}{name}.lora_B.weight"] = normal(n_out, RANK) * 0.1
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(weights, out / "model.safetensors")
    save_file(adapter, out / "adapter.safetensors")
    (out / "config.json").write_text(json.dumps(shape.config(dtype), indent=2) + "\n")
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.length + 1), generator=generator)
    prompts = torch.randint(0, shape.vocab, (PROMPTS, PROMPT), generator=generator)
    work = {
        "shape": dataclasses.asdict(shape),
        "train": tokens.tolist(),
        "prompts": prompts.tolist(),
        "new_tokens": shape.new_tokens,
    }
    (out / "tokens.json").write_text(json.dumps(work) + "\n")


class Decoder:
    """The base model, frozen, with the adapter applied unmerged.

    With `dtype` bf16 weights, activations and products are bf16; the adapter, its gradient and its
    moments stay float32 as in mixed precision, and so does the loss.
    """

    def __init__(self, path, shape, dtype):
        self.shape, self.dtype = shape, dtype
        device = torch.get_default_device()
        # Cloned, as a loaded tensor is a map of the file, which starts at any byte: in memory of its
        # own it is aligned, and products with it are faster.
        self.base, self.lora = (
            {name: tensor.to(device, to).clone() for name, tensor in load_file(path / file).items()}
            for file, to in (("model.safetensors", dtype), ("adapter.safetensors", torch.float32))
        )
        angles = torch.outer(
            torch.arange(1024).float(), THETA ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        )
        self.cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
        self.sin = torch.cat([angles.sin()] * 2, -1).to(dtype)
        self.factors = None

    def freeze(self):
        """Casts the adapter once; decoding does not change it."""
        self.factors = {name: tensor.to(self.dtype) for name, tensor in self.lora.items()}

    def factor(self, name):
        return self.factors[name] if self.factors else self.lora[name].to(self.dtype)

    def trainable(self):
        return [tensor.requires_grad_(True) for tensor in self.lora.values()]

    def linear(self, x, name):
        a = self.factor(f"base_model.model.{name}.lora_A.weight")
        b = self.factor(f"base_model.model.{name}.lora_B.weight")
        # The scale on the narrow intermediate, where it costs least.
        return F.linear(x, self.base[f"{name}.weight"]) + F.linear(F.linear(x, a) * (ALPHA / RANK), b)

    def rope(self, x, start):
        cos, sin = (t[start : start + x.shape[2]] for t in (self.cos, self.sin))
        half = HEAD_SIZE // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def norm(self, x, name):
        return F.rms_norm(x, (self.shape.hidden,), self.base[f"{name}.weight"], EPS)

    def attention(self, x, prefix, cache, start):
        rows, length, _ = x.shape

        def project(name, n_heads):
            y = self.linear(x, f"{prefix}self_attn.{name}")
            return y.view(rows, length, n_heads, HEAD_SIZE).transpose(1, 2)

        q = self.rope(project("q_proj", self.shape.heads), start)
        k = self.rope(project("k_proj", self.shape.kv_heads), start)
        v = project("v_proj", self.shape.kv_heads)
        if cache is not None:
            keys, values = cache
            keys[:, :, start : start + length] = k
            values[:, :, start : start + length] = v
            k, v = keys[:, :, : start + length], values[:, :, : start + length]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=True)
        o = o.transpose(1, 2).reshape(rows, length, self.shape.heads * HEAD_SIZE)
        return self.linear(o, f"{prefix}self_attn.o_proj")

    def mlp(self, x, prefix):
        gate = F.silu(self.linear(x, f"{prefix}mlp.gate_proj"))
        up = self.linear(x, f"{prefix}mlp.up_proj")
        return self.linear(gate * up, f"{prefix}mlp.down_proj")

    def hidden(self, tokens, caches=None, start=0):
        """`[rows, length]` tokens to `[rows, length, hidden]` after the last norm."""
        x = F.embedding(tokens, self.base["model.embed_tokens.weight"])
        for layer in range(self.shape.layers):
            prefix = f"model.layers.{layer}."
            cache = caches[layer] if caches else None
            x = x + self.attention(self.norm(x, f"{prefix}input_layernorm"), prefix, cache, start)
            x = x + self.mlp(self.norm(x, f"{prefix}post_attention_layernorm"), prefix)
        return self.norm(x, "model.norm")

    def logits(self, x):
        return F.linear(x, self.base["lm_head.weight"]).float()


def read_work(path):
    work = json.loads((path / "tokens.json").read_text())
    return Shape(**work["shape"]), work


def train(path, dtype, n_steps):
    """Seconds of each training step after one to warm up, and the losses."""
    shape, work = read_work(path)
    model = Decoder(path, shape, dtype)
    tokens = torch.tensor(work["train"])
    optimizer = torch.optim.AdamW(
        model.trainable(), lr=LEARNING_RATE, betas=BETAS, eps=ADAM_EPS, weight_decay=0.0, fused=True
    )
    seconds, losses, cpu_start = [], [], 0.0
    for step in range(n_steps + 1):
        if step == 1:
            cpu_start = time.process_time()
        start = time.perf_counter()
        logits = model.logits(model.hidden(tokens[:, :-1]))
        loss = F.cross_entropy(logits.view(-1, shape.vocab), tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    cpu_seconds = time.process_time() - cpu_start
    n_tokens = shape.batch * shape.length
    return dict(seconds=seconds[1:], cpu_seconds=cpu_seconds, losses=losses, n_tokens=n_tokens)


@torch.inference_mode()
def decode(path, dtype, n_sequences, n_passes):
    """Seconds of each pass of greedy decoding after one to warm up, and the tokens of all rows."""
    shape, work = read_work(path)
    model = Decoder(path, shape, dtype)
    model.freeze()
    prompt = torch.tensor(work["prompts"][:n_sequences])
    size = (n_sequences, shape.kv_heads, PROMPT + shape.new_tokens, HEAD_SIZE)
    seconds, cpu_seconds = [], []
    for _ in range(n_passes + 1):
        caches = [
            tuple(torch.zeros(size, dtype=dtype) for _ in range(2)) for _ in range(shape.layers)
        ]
        x = model.hidden(prompt, caches)[:, -1]
        tokens, logprobs = [], []
        start, cpu_start = time.perf_counter(), time.process_time()
        for step in range(shape.new_tokens):
            best = model.logits(x).log_softmax(-1).max(-1)
            tokens.append(best.indices.tolist())
            logprobs.append(best.values.tolist())
            x = model.hidden(best.indices[:, None], caches, PROMPT + step)[:, -1]
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return dict(
        seconds=seconds[1:],
        cpu_seconds=sum(cpu_seconds[1:]),
        tokens=[token for row in zip(*tokens) for token in row],
        logprobs=[logprob for row in zip(*logprobs) for logprob in row],
        n_tokens=n_sequences * shape.new_tokens,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["make", "train", "decode"])
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--weights", choices=DTYPES, default="bf16")
    parser.add_argument("--compute", choices=DTYPES, default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    dtype = DTYPES[args.compute]
    if args.task == "make":
        return make(args.dir, SHAPES[args.shape], DTYPES[args.weights])
    if args.task == "train":
        result = train(args.dir, dtype, args.repeats)
    else:
        result = decode(args.dir, dtype, args.sequences, args.repeats)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_gpu = args.device == "cuda"
    capability = "cuda" if on_gpu else torch.backends.cpu.get_cpu_capability()
    result["name"] = f"PyTorch {torch.__version__} {capability} {args.compute}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
