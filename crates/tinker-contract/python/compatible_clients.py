"""Talks to the server through the official `openai` and `anthropic` clients.

    python compatible_clients.py BASE_URL MODEL     # the key in TINKER_API_KEY

Prints one line for each step that held, and an empty JSON object at the end.
"""

import json
import os
import sys

import anthropic
import openai

BASE_URL, MODEL = sys.argv[1:3]
KEY = os.environ["TINKER_API_KEY"]
QUESTION = [{"role": "user", "content": "What is 2 plus 3?"}]


def step(name):
    print(f"ok: {name}", flush=True)


def with_openai():
    client = openai.OpenAI(base_url=f"{BASE_URL}/oai/api/v1", api_key=KEY, max_retries=0)
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    step("models")

    whole = client.completions.create(model=MODEL, prompt="one two", max_tokens=8, n=2, logprobs=2, seed=3)
    assert [choice.index for choice in whole.choices] == [0, 1], whole
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8 and len(logprobs.top_logprobs[0]) == 2
    assert all(value <= 0 for value in logprobs.token_logprobs)
    assert whole.usage.completion_tokens == 16, whole.usage
    chunks = client.completions.create(model=MODEL, prompt="one two", max_tokens=8, seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    step("text completions, whole and streamed")

    whole = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=12, seed=3, logprobs=True, top_logprobs=2
    )
    text = whole.choices[0].message.content
    rows = whole.choices[0].logprobs.content
    assert len(rows) == whole.usage.completion_tokens and len(rows[0].top_logprobs) == 2, whole
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=12, seed=3, stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == text and chunks[-1].usage == whole.usage, (streamed, text, chunks[-1])
    step("chat completions, whole and streamed")

    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with_tool = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4, tools=[tool])
    assert with_tool.usage.prompt_tokens > whole.usage.prompt_tokens + 50, with_tool.usage
    step("tools")

    refused = [
        ({"model": "nobody/nothing"}, openai.NotFoundError, "nobody/nothing"),
        ({"model": MODEL, "logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias"),
        ({"model": MODEL, "temperature": -1.0, "stream": True}, openai.BadRequestError, "temperature -1"),
    ]
    for ask, error, word in refused:
        try:
            client.chat.completions.create(messages=QUESTION, **ask)
            raise AssertionError(f"{ask} was sampled")
        except error as found:
            assert word in str(found), found
    step("refusals")


def with_anthropic():
    client = anthropic.Anthropic(base_url=f"{BASE_URL}/anthropic/api", api_key=KEY, max_retries=0)
    ask = {"model": MODEL, "max_tokens": 12, "messages": QUESTION, "system": "Be brief."}
    # The client has no argument for it any more.
    ask["extra_body"] = {"temperature": 0.0}
    whole = client.messages.create(**ask)
    assert whole.role == "assistant" and whole.content[0].type == "text", whole
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION, system="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens, (counted, whole.usage)
    step("a message and the number of its tokens")

    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text, (text, whole)
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    step("a streamed message")

    try:
        client.messages.create(**{**ask, "model": "nobody/nothing"})
        raise AssertionError("an unknown model was sampled")
    except anthropic.NotFoundError as error:
        assert "nobody/nothing" in str(error), error
    step("an unknown model")


with_openai()
with_anthropic()
print(json.dumps({}), flush=True)
