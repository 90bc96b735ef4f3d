"""Responses through the official client, on the real model."""

import json
from typing import Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

RESPONSE, EVENT = TypeAdapter(Response), TypeAdapter(ResponseStreamEvent)
TOOL = {
    "type": "function",
    "name": "paint",
    "description": "Paints a thing.",
    "parameters": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green"]}, "coats": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["color", "coats"],
        "additionalProperties": False,
    },
}


def check(response):
    """What every response has, by the client's own types and nothing left out."""
    Response.model_validate(response.model_dump(), strict=True)
    assert response.object == "response" and response.error is None
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    ids = [item.id for item in response.output]
    assert len(set(ids)) == len(ids) > 0
    return response


@pytest.fixture
def ask(client, model):
    def ask(input="Name a color.", **more):
        more = {"model": model, "input": input, "max_output_tokens": 24, "temperature": 0, **more}
        return client.responses.create(**more)

    return ask


def test_an_answer(ask, model):
    response = check(ask(instructions="Be brief.", metadata={"a": "b"}, top_p=0.5))
    assert response.id.startswith("resp_") and response.model == model
    assert response.status in ("completed", "incomplete")
    assert response.output[-1].type == "message" and response.output_text == response.output[-1].content[0].text
    assert (response.instructions, response.metadata, response.top_p, response.max_output_tokens) == (
        "Be brief.",
        {"a": "b"},
        0.5,
        24,
    )
    assert response.store is True and response.text.format.type == "text"
    assert response.output_text == ask(instructions="Be brief.", top_p=0.5, store=False).output_text


def test_an_answer_as_it_comes_has_the_clients_types(client, model):
    arguments = dict(model=model, input="hi", max_output_tokens=60, tools=[TOOL])
    for choice in ("none", "required"):
        raw = client.responses.with_raw_response.create(**arguments, tool_choice=choice)
        RESPONSE.validate_json(raw.text, strict=True)
        raw = client.responses.with_raw_response.create(**arguments, tool_choice=choice, stream=True)
        lines = [line for line in raw.http_response.iter_lines() if line.startswith("data: ")]
        for line in lines:
            EVENT.validate_json(line.removeprefix("data: "), strict=True)
        assert len(lines) > 5


def test_a_stream_is_the_same_answer(ask, client, model):
    whole = ask()
    events = list(ask(stream=True))
    for event in events:
        EVENT.validate_python(event.model_dump(), strict=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = check(events[-1].response)
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert deltas == last.output_text == whole.output_text
    assert last.usage.output_tokens == whole.usage.output_tokens
    # the client's helper knows only answers that are not cut
    with client.responses.stream(model=model, input="Paint it.", temperature=0, text_format=Paint) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(deltas)


def test_an_answer_that_is_cut_is_incomplete(ask):
    response = check(ask("Count to a thousand.", max_output_tokens=3, extra_body={"ignore_eos": True}))
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete" and response.usage.output_tokens == 3


def test_a_conversation_goes_on_by_id_or_by_items(ask, client):
    first = ask("My name is Anna.")
    by_id = check(ask("What is my name?", previous_response_id=first.id))
    assert by_id.previous_response_id == first.id
    items = [{"role": "user", "content": "My name is Anna."}]
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items += [{"role": "user", "content": [{"type": "input_text", "text": "What is my name?"}]}]
    by_items = check(ask(items))
    assert by_items.output_text == by_id.output_text
    assert by_items.usage.input_tokens == by_id.usage.input_tokens
    third = check(ask("And again?", previous_response_id=by_id.id))
    assert third.usage.input_tokens > by_id.usage.input_tokens
    chat = [{"role": "user", "content": "My name is Anna."}, {"role": "assistant", "content": first.output_text}]
    chat += [{"role": "user", "content": "What is my name?"}]
    completion = client.chat.completions.create(model=first.model, messages=chat, max_tokens=24, temperature=0)
    assert completion.choices[0].message.content == by_id.output_text


def test_responses_are_kept_and_deleted(ask, client):
    made = ask(stream=True)
    made = list(made)[-1].response
    found = client.responses.retrieve(made.id)
    assert found.model_dump() == made.model_dump()
    items = client.responses.input_items.list(made.id)
    assert [item.content[0].text for item in items] == ["Name a color."]
    with pytest.raises(openai.BadRequestError, match="in the background"):
        client.responses.cancel(made.id)
    client.responses.delete(made.id)
    unkept = ask(store=False)
    for response in (made, unkept):
        with pytest.raises(openai.NotFoundError) as error:
            client.responses.retrieve(response.id)
        assert error.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError) as error:
            ask(previous_response_id=response.id)
        assert error.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(made.id)


class Paint(BaseModel):
    model_config = ConfigDict(json_schema_extra={"x-guidance": {"whitespace_flexible": False}})
    color: Literal["red", "green"]
    coats: int = Field(ge=1, le=9)


def test_an_answer_by_schema(client, model):
    for seed in range(2):
        response = client.responses.parse(
            model=model, input="Paint it.", text_format=Paint, temperature=1, extra_body={"seed": seed}
        )
        assert isinstance(response.output_parsed, Paint) and response.status == "completed"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "paint"}])
def test_a_call_that_must_come_and_its_result(ask, choice):
    forced = dict(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=200)
    events = list(ask("Paint it.", stream=True, **forced))
    for event in events:
        EVENT.validate_python(event.model_dump(), strict=True)
    response = check(events[-1].response)
    [call] = response.output
    assert call.type == "function_call" and call.status == "completed"
    arguments = json.loads(call.arguments)
    assert arguments["color"] in ("red", "green") and 1 <= arguments["coats"] <= 9
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Done."}
    after = check(ask([result], previous_response_id=response.id))
    assert after.usage.input_tokens > response.usage.input_tokens


@pytest.mark.parametrize(
    "wrong, param",
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"extra_body": {"max_token": 3}}, "max_token"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 7}}}}, "text.format.schema"),
    ],
)
def test_what_is_wrong_is_named(ask, wrong, param):
    with pytest.raises(openai.BadRequestError) as error:
        ask(**wrong)
    assert error.value.param == param
