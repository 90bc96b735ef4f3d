"""langchain-openai: `ChatOpenAI` over chats and over responses."""

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from shapes import HISTORY, QUESTION, Defaults, Song, Weather


@pytest.fixture(scope="module")
def chat(base_url, model):
    def make(**more) -> ChatOpenAI:
        told = dict(base_url=base_url, api_key="none", max_retries=0, timeout=120)
        return ChatOpenAI(**told, **{"model": model, "temperature": 0, "max_tokens": 200, **more})

    return make


def test_an_answer(chat, model):
    answer = chat(max_tokens=12).invoke(HISTORY)
    assert isinstance(answer.content, str) and answer.content
    assert answer.response_metadata["model_name"] == model
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    used = answer.usage_metadata
    assert 0 < used["output_tokens"] <= 12
    assert used["total_tokens"] == used["input_tokens"] + used["output_tokens"]
    assert used["input_token_details"]["cache_read"] >= 0


def test_streams_and_batches_are_the_same_answer(chat, later):
    small = chat(max_tokens=12)
    whole = small.invoke(QUESTION)
    chunks = list(small.stream(QUESTION, stream_usage=True))
    assert len(chunks) > 2
    total = sum(chunks[1:], start=chunks[0])
    assert isinstance(total, AIMessageChunk)
    assert total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert [answer.content for answer in small.batch([QUESTION, QUESTION])] == [whole.content] * 2

    async def ask():
        pieces = [chunk.content async for chunk in small.astream(QUESTION)]
        return ["".join(pieces), (await small.ainvoke(QUESTION)).content]

    assert later(ask()) == [whole.content] * 2


def test_stop_and_seed_and_log_probabilities(chat):
    ask = chat(max_tokens=8, temperature=1, seed=3)
    whole = ask.invoke(QUESTION).content
    assert ask.invoke(QUESTION).content == whole
    assert ask.invoke(QUESTION, stop=[whole[2:4]]).content == whole[: whole.index(whole[2:4])]
    told = ask.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in told) == whole
    assert all(len(entry["top_logprobs"]) >= 2 for entry in told)


def check(call):
    {"Weather": Weather, "Song": Song}[call["name"]].model_validate(call["args"])
    assert call["id"]


@pytest.mark.parametrize("choice, strict", [("Weather", None), ("Song", True), ("any", True), ("required", None), (True, None)])
def test_calls(chat, choice, strict):
    tools = [Weather] if choice is True else [Weather, Song]
    bound = chat().bind_tools(tools, tool_choice=choice, strict=strict, parallel_tool_calls=False)
    answer = bound.invoke(QUESTION)
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert not answer.content and not answer.invalid_tool_calls
    (call,) = answer.tool_calls
    check(call)
    assert call["name"] == choice or choice in ("any", "required", True)

    chunks = list(bound.stream(QUESTION))
    total = sum(chunks[1:], start=chunks[0])
    assert [(made["name"], made["args"]) for made in total.tool_calls] == [(call["name"], call["args"])]
    assert not total.content


def test_a_result_is_sent_back(chat):
    call = chat().bind_tools([Weather], tool_choice="Weather").invoke(QUESTION)
    messages = [HumanMessage(QUESTION), call, ToolMessage("Sunny.", tool_call_id=call.tool_calls[0]["id"])]
    answer = chat(max_tokens=8).bind_tools([Weather], tool_choice="none").invoke(messages)
    assert answer.content and not answer.tool_calls


@pytest.mark.parametrize("method, strict", [("json_schema", True), ("function_calling", None)])
def test_structured_output(chat, later, method, strict):
    bound = chat().with_structured_output(Weather, method=method, strict=strict)
    weather = bound.invoke(QUESTION)
    assert isinstance(weather, Weather)
    assert list(bound.stream(QUESTION))[-1] == weather
    assert later(bound.ainvoke(QUESTION)) == weather
    told = chat().with_structured_output(Weather, method=method, strict=strict, include_raw=True).invoke(QUESTION)
    assert told["parsed"] == weather and told["parsing_error"] is None and told["raw"].usage_metadata


def test_structured_output_by_a_plain_schema(chat):
    schema = {**Weather.model_json_schema(), "title": "Weather"}
    Weather.model_validate(chat().with_structured_output(schema, method="json_schema").invoke(QUESTION))


def test_json_mode(chat, braces):
    bound = chat(max_tokens=8, extra_body={"allowed_token_ids": braces})
    assert bound.with_structured_output(Defaults, method="json_mode").invoke("Answer in JSON.") == Defaults()
    assert bound.with_structured_output(None, method="json_mode").invoke("Answer in JSON.") == {}


def test_errors_come_through(chat):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(temperature=9).invoke(QUESTION)
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        chat(model="no-such-model").invoke(QUESTION)
    # the model calls nothing of its own accord, and its template shows it no tools
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        chat().bind_tools([Weather]).invoke(QUESTION)


def test_responses(chat, model):
    small = chat(max_tokens=16, use_responses_api=True)
    answer = small.invoke(HISTORY)
    assert answer.text and answer.usage_metadata["output_tokens"] <= 16
    assert answer.response_metadata["model_name"] == model
    assert answer.id.startswith("resp_")
    chunks = list(small.stream(HISTORY))
    total = sum(chunks[1:], start=chunks[0])
    assert total.text == answer.text
    assert total.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]


@pytest.mark.parametrize("choice", ["Weather", "any"])
def test_calls_of_responses(chat, choice):
    bound = chat(use_responses_api=True).bind_tools([Weather], tool_choice=choice, parallel_tool_calls=False)
    answer = bound.invoke(QUESTION)
    (call,) = answer.tool_calls
    check(call)
    chunks = list(bound.stream(QUESTION))
    (streamed,) = sum(chunks[1:], start=chunks[0]).tool_calls
    assert streamed["args"] == call["args"]
    messages = [HumanMessage(QUESTION), answer, ToolMessage("Sunny.", tool_call_id=call["id"])]
    assert chat(use_responses_api=True, max_tokens=16).invoke(messages).text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_of_responses(chat, method):
    bound = chat(use_responses_api=True).with_structured_output(Weather, method=method)
    assert isinstance(bound.invoke(QUESTION), Weather)
    assert isinstance(list(bound.stream(QUESTION))[-1], Weather)


def test_responses_are_gone_on_with(chat):
    small = chat(max_tokens=16, use_responses_api=True)
    first = small.invoke(QUESTION)
    second = small.invoke("And in Rome?", previous_response_id=first.response_metadata["id"])
    assert second.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]
