"""litellm: chats by OpenAI's route and by vLLM's, messages by Anthropic's; completions and responses."""

import json

import litellm
import pytest
from shapes import QUESTION, Defaults, Song, Weather, function

litellm.suppress_debug_info = True
litellm.telemetry = False

ROUTES = {"openai": "/v1", "hosted_vllm": "/v1", "anthropic": ""}
CHATS = ["openai", "hosted_vllm"]
TOOLS = [function(Weather), function(Song)]
ASK = [{"role": "user", "content": QUESTION}]


@pytest.fixture(params=ROUTES)
def route(request, cluster, model):
    return told(request.param, cluster, model)


@pytest.fixture(params=["openai", "anthropic"])
def bounded_route(request, cluster, model):
    """Those that leave `additionalProperties: false` in the schemas of tools: without, a small model adds properties for ever."""
    return told(request.param, cluster, model)


@pytest.fixture(params=CHATS)
def chat_route(request, cluster, model):
    return told(request.param, cluster, model)


def told(name, cluster, model) -> dict:
    where = dict(model=f"{name}/{model}", api_base=cluster["url"] + ROUTES[name], api_key="none")
    return dict(**where, max_retries=0, num_retries=0, timeout=120, temperature=0)


def test_an_answer(route, later):
    ask = dict(route, messages=ASK, max_tokens=12)
    answer = litellm.completion(**ask)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert later(litellm.acompletion(**ask)).choices[0].message.content == choice.message.content


def test_a_stream_is_the_same_answer(route, later):
    ask = dict(route, messages=ASK, max_tokens=12)
    whole = litellm.completion(**ask)
    more = dict(stream=True, stream_options={"include_usage": True})
    chunks = list(litellm.completion(**ask, **more))
    built = litellm.stream_chunk_builder(chunks, messages=ASK)
    assert built.choices[0].message.content == whole.choices[0].message.content
    (finish,) = {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason}
    assert finish == whole.choices[0].finish_reason
    assert built.usage.completion_tokens == whole.usage.completion_tokens
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens

    async def read():
        stream = await litellm.acompletion(**ask, **more)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert later(read()) == whole.choices[0].message.content


def check(call):
    {"Weather": Weather, "Song": Song}[call.function.name].model_validate_json(call.function.arguments)
    assert call.id


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Song"}}])
def test_calls(bounded_route, choice):
    # Anthropic's route leaves `x-guidance` out of schemas: there is room for white space
    ask = dict(bounded_route, messages=ASK, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=400)
    answer = litellm.completion(**ask)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert not answer.choices[0].message.content
    (call,) = answer.choices[0].message.tool_calls
    check(call)
    assert choice == "required" or call.function.name == "Song"
    built = litellm.stream_chunk_builder(list(litellm.completion(stream=True, **ask)), messages=ASK)
    (streamed,) = built.choices[0].message.tool_calls
    assert streamed.function.name == call.function.name
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)

    result = {"role": "tool", "tool_call_id": call.id, "content": "Done."}
    messages = [*ASK, answer.choices[0].message.model_dump(exclude_none=True), result]
    after = litellm.completion(**dict(ask, messages=messages, tool_choice="none", max_tokens=8))
    assert after.choices[0].message.content


def test_an_answer_by_schema(route):
    answer = litellm.completion(**route, messages=ASK, max_tokens=400, response_format=Weather)
    assert answer.choices[0].finish_reason == "stop"
    Weather.model_validate_json(answer.choices[0].message.content)


def test_a_json_object(chat_route, braces):
    more = dict(response_format={"type": "json_object"}, extra_body={"allowed_token_ids": braces})
    answer = litellm.completion(**chat_route, messages=ASK, max_tokens=8, **more)
    assert Defaults.model_validate_json(answer.choices[0].message.content) == Defaults()


def test_errors_come_through(route):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**dict(route, temperature=9), messages=ASK, max_tokens=8)
    with pytest.raises(litellm.NotFoundError, match="no-such-model"):
        other = route["model"].split("/")[0] + "/no-such-model"
        litellm.completion(**dict(route, model=other), messages=ASK, max_tokens=8)


def test_a_text_is_completed(cluster, model):
    ask = dict(told("openai", cluster, model), model=f"text-completion-openai/{model}")
    answer = litellm.text_completion(**ask, prompt="The capital of France is", max_tokens=4)
    assert answer.choices[0].text and answer.usage.completion_tokens <= 4


def test_messages(cluster, model, later):
    async def ask():
        more = dict(messages=ASK, max_tokens=8)
        return await litellm.anthropic_messages(**told("anthropic", cluster, model), **more)

    answer = later(ask())
    assert answer["type"] == "message" and answer["content"][0]["text"]


def test_responses(cluster, model):
    ask = dict(told("openai", cluster, model), input=QUESTION, max_output_tokens=16)
    answer = litellm.responses(**ask)
    assert answer.output_text and answer.usage.output_tokens <= 16
    events = list(litellm.responses(**ask, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == answer.output_text
