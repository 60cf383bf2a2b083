"""Talks to the server through the official `openai` and `anthropic` clients.

    python compatible_clients.py BASE_URL MODEL     # the key in TINKER_API_KEY

The model is taught by the official SDK to call a tool: it would not do so by itself.

Prints one line for each step that held, and an empty JSON object at the end.
"""

import json
import os
import sys

import anthropic
import openai
import tinker
from common import leave, step
from tinker import types

BASE_URL, MODEL = sys.argv[1:3]
KEY = os.environ["TINKER_API_KEY"]
STEPS = 100
QUESTION = [{"role": "user", "content": "What is 2 plus 3?"}]


CALL = {"name": "add", "arguments": {"a": 2, "b": 3}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}


def tool_caller():
    """The path of weights that answer whatever they are asked with a call of `add`."""
    service = tinker.ServiceClient(base_url=BASE_URL)
    client = service.create_lora_training_client(base_model=MODEL, rank=16, seed=1).result()
    tokenizer = client.get_tokenizer()

    def encoded(text):
        return tokenizer.encode(text, add_special_tokens=False)

    reply = encoded(f"I add.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call><|im_end|>")
    questions = ["What is 2 plus 3?", "Tell me a story."]
    data = []
    for system in ["Be brief.", "# Tools\n\nYou may call one or more functions. " * 8]:
        for question in questions:
            text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            prompt = encoded(text)
            tokens, weights = prompt + reply, [0.0] * len(prompt) + [1.0] * len(reply)
            inputs = {"target_tokens": tokens[1:], "weights": weights[1:]}
            data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    for _ in range(STEPS):
        loss = client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=0.005)).result()
    loss = loss.result().metrics["loss:sum"] / len(data) / len(reply)
    assert loss < 0.05, loss
    return client.save_weights_for_sampler("caller").result().path


def with_openai(caller):
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

    ask = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "seed": 3, "n": 3, "logprobs": True}
    several = client.chat.completions.create(**ask)
    assert [choice.index for choice in several.choices] == [0, 1, 2] and several.choices[0].message.content == text
    pieces = {i: "" for i in range(3)}
    rows = {i: [] for i in range(3)}
    for chunk in client.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            rows[choice.index] += choice.logprobs.content if choice.logprobs else []
    for choice in several.choices:
        assert pieces[choice.index] == choice.message.content, (pieces, choice)
        assert rows[choice.index] == choice.logprobs.content, (rows, choice)
    step("several answers at once with log-probabilities, whole and streamed")

    stop = text[len(text) // 2 :][:3]
    stopped = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, seed=3, stop=[stop, "@@"])
    assert stopped.choices[0].message.content == text[: text.index(stop)], (stop, text, stopped)
    assert stopped.choices[0].finish_reason == "stop"
    step("a stop ends a chat completion")

    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
    ask = {"model": caller, "messages": QUESTION, "max_tokens": 80, "temperature": 0.0, "tools": [tool]}
    called = client.chat.completions.create(**ask).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content == "I add.", called
    [call] = called.message.tool_calls
    assert call.id and call.function.name == "add" and json.loads(call.function.arguments) == CALL["arguments"], call
    with client.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and streamed.message.content == "I add.", streamed
    [again] = streamed.message.tool_calls
    assert (again.function.name, again.function.arguments) == ("add", call.function.arguments), again
    answered = [*QUESTION, called.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    longer = client.chat.completions.create(**{**ask, "messages": answered})
    assert longer.usage.prompt_tokens > whole.usage.prompt_tokens + 50, longer.usage
    step("a tool is called, whole and streamed, and its result goes back")

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


def with_anthropic(caller):
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

    stop = text[len(text) // 2 :][:2]
    stopped = client.messages.create(**ask, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop), stopped
    step("a stop sequence ends a message and is named")

    tool = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
    ask_tool = {**ask, "model": caller, "max_tokens": 80, "tools": [tool]}
    called = client.messages.create(**ask_tool)
    assert called.stop_reason == "tool_use" and [b.type for b in called.content] == ["text", "tool_use"], called
    assert (called.content[1].name, called.content[1].input) == ("add", CALL["arguments"]), called
    with client.messages.stream(**ask_tool) as stream:
        streamed = stream.get_final_message()
    assert streamed.stop_reason == "tool_use" and streamed.content[1].input == CALL["arguments"], streamed
    result = {"type": "tool_result", "tool_use_id": called.content[1].id, "content": "5"}
    turns = [*QUESTION, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    longer = client.messages.create(**{**ask_tool, "messages": turns})
    assert longer.usage.input_tokens > called.usage.input_tokens, (longer, called)
    step("a tool is used, whole and streamed, and its result goes back")

    try:
        client.messages.create(**{**ask, "model": "nobody/nothing"})
        raise AssertionError("an unknown model was sampled")
    except anthropic.NotFoundError as error:
        assert "nobody/nothing" in str(error), error
    step("an unknown model")


caller = tool_caller()
with_openai(caller)
with_anthropic(caller)
leave({})
