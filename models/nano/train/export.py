"""Writes the model in Hugging Face's layout: bf16 safetensors, config, tokenizer and chat template."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import corpus
from model import Config, Nano

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_json(path: Path, value: dict) -> None:
    """Indented JSON with a last newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write(model: Nano, tokenizer: Tokenizer, out: Path) -> None:
    """Writes every file with which `transformers` and the engine load the model."""
    end, pad = (tokenizer.token_to_id(t) for t in (corpus.END, corpus.END_OF_TEXT))
    weights = {name: w.detach().to(torch.bfloat16).contiguous() for name, w in model.state_dict().items()}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    write_json(out / "config.json", model.config.hugging_face(eos=end, pad=pad))
    write_json(out / "generation_config.json", {"do_sample": True, "eos_token_id": [end, pad], "pad_token_id": pad, "temperature": 1.0})
    write_json(out / "tokenizer_config.json", {
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": corpus.END,
        "model_max_length": model.config.max_position_embeddings,
        "pad_token": corpus.END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def read(folder: Path) -> Nano:
    """The exported model, in f32 with the rounded weights."""
    from safetensors.torch import load_file

    fields = json.loads((folder / "config.json").read_text())
    model = Nano(Config(**{k: fields[k] for k in Config.__dataclass_fields__}))
    model.load_state_dict({k: w.float() for k, w in load_file(str(folder / "model.safetensors")).items()})
    return model.eval()


def agrees_with_transformers(folder: Path) -> float:
    """The largest difference of log-probabilities from Hugging Face's Qwen3 over 64 random tokens."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = read(folder)
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids).log_softmax(-1), reference(ids).logits.log_softmax(-1)
    return float((ours - theirs).abs().max())
