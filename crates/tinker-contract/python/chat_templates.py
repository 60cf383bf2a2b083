"""Makes small tokenizers with chat templates and renders conversations with `transformers`.

    python chat_templates.py DIR

Writes a tokenizer for each family to DIR/FAMILY and prints a JSON object: for each family the
conversations with their token ids as a prompt and as a whole, null where the template refuses. The templates
were written for this test from what the families' formats are; none is a published file.
"""

import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# System text before the first question, roles in turn, text trimmed: Gemma 3. Gemma 2 refuses a system message.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}SYSTEM
{%- else %}
    {%- set start = '' %}{% set turns = messages %}
{%- endif %}
{% for turn in turns %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles have to alternate') }}
    {%- endif %}
    {%- set who = 'model' if turn['role'] == 'assistant' else turn['role'] %}
    {{- '<start_of_turn>' + who + '\\n' + (start if loop.first else '') }}
    {%- if turn['content'] is string %}{{ turn['content'] | trim }}{% endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA_3 = GEMMA.replace(
    "SYSTEM",
    "{% set start = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}",
)
GEMMA_2 = GEMMA.replace("SYSTEM", "{{ raise_exception('no system message') }}")

# No beginning token, and the end of text after a conversation that is whole.
PHI_3 = """{% for m in messages %}
{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# System text before the last question, which rewrites the history with every turn.
MISTRAL = """{% if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- set asked = turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}
        {%- if system is defined and turn == asked[-1] %}
            {{- '[INST] ' + system + '\\n\\n' + turn.content + '[/INST]' }}
        {%- else %}{{ '[INST] ' + turn.content + '[/INST]' }}{% endif %}
    {%- elif turn.role == 'assistant' %}{{ ' ' + turn.content | trim + eos_token }}
    {%- else %}{{ raise_exception('a role that this model does not know: ' + turn.role) }}{% endif %}
{%- endfor %}"""

# Brackets that are ordinary text, and a beginning token before every question.
LLAMA_2 = """{% set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- set ns.system = '<<SYS>>\\n' + m.content.strip() + '\\n<</SYS>>\\n\\n' %}
    {%- elif m.role == 'user' %}
        {{- bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' }}
        {%- set ns.system = '' %}
    {%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

# ChatML with a system message of its own where there is none, as SmolLM2 and Qwen2.5 have it.
CHATML = """{% for m in messages %}
    {%- if loop.first and m['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou answer kindly.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Reasoning of the last turn only, in a frame that is there even if nothing is in it.
REASONING = """{% set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n' + (m.reasoning_content or '').strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

BYTES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PIECES = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"]
TEXT = [
    "You are a helpful assistant. The user asks and the assistant answers kindly.",
    "Hi Hello Bye Goodbye. What is it? <<SYS>>\n<</SYS>>\n\n [INST] [/INST] model user assistant system\n",
]

CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "  What is it?\n"), ("assistant", " It is\n a cat. ")],
    [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
    [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Goodbye")],
    [
        ("system", "Be kind."),
        ("user", "Hi é 漢"),
        ("assistant", "Hello"),
        ("user", "Bye"),
        ("assistant", "Goodbye\n\n1. one\n2. two"),
    ],
    [("user", "Hi"), ("user", "Hello?")],
]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return train(tokenizer, BYTES, alphabet, 320)


def sentence_pieces():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    alphabet = sorted(set("".join(TEXT).replace(" ", "▁")))
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = train(tokenizer, PIECES, alphabet, 120)
    # Bytes are part of the vocabulary, and no markers.
    state = json.loads(tokenizer.to_str())
    for token in fallback:
        state["model"]["vocab"][token] = len(state["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(state))


def train(tokenizer, special, alphabet, size):
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


FAMILIES = {
    "gemma2": (sentence_pieces, GEMMA_2, "<s>", "</s>"),
    "gemma3": (sentence_pieces, GEMMA_3, "<s>", "</s>"),
    "phi3": (byte_level, PHI_3, None, "<|endoftext|>"),
    "mistral": (sentence_pieces, MISTRAL, "<s>", "</s>"),
    "llama2": (sentence_pieces, LLAMA_2, "<s>", "</s>"),
    "chatml": (byte_level, CHATML, None, "<|im_end|>"),
    "reasoning": (byte_level, REASONING, None, "<|im_end|>"),
}


def ids(tokenizer, messages, prompted):
    try:
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompted, tokenize=True, return_dict=True
        )
        return list(found["input_ids"])
    except Exception as error:  # What `raise_exception` raises is no public type.
        if "TemplateError" not in type(error).__name__:
            raise
        return None


def family(name):
    make, template, bos, eos = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(pathlib.Path(sys.argv[1]) / name)
    cases = []
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        cases.append(
            {
                "messages": messages,
                "prompt": ids(tokenizer, messages, True),
                "whole": ids(tokenizer, messages, False),
            }
        )
    return cases


print(json.dumps({name: family(name) for name in FAMILIES}))
