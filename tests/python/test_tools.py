"""Tools through the official client. This small model calls none of its own accord, and its template shows it none: it is made to."""

import json

import openai
import pytest

ASK = [{"role": "user", "content": "What is the weather in Paris tomorrow? Then play a song."}]

# Answers are without white space between their parts and with an end in sight: a small model may go on for ever.
COMPACT = {"whitespace_flexible": False}

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}

SONG = {
    "type": "object",
    "properties": {"loud": {"type": "boolean"}},
    "required": ["loud"],
    "additionalProperties": False,
}


def tool(name, parameters, **more):
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters, **more}}


TOOLS = [tool("get_weather", WEATHER), tool("play_song", SONG)]


def named(name):
    return {"type": "function", "function": {"name": name}}


def check(call):
    """The call is to one of the tools, with arguments by its schema."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert list(arguments) == ["city", "days", "unit"]
        assert len(arguments["city"]) <= 12
        assert 1 <= arguments["days"] <= 14
        assert arguments["unit"] in ("celsius", "fahrenheit")
    else:
        assert call.function.name == "play_song"
        assert set(arguments) == {"loud"} and arguments["loud"] in (True, False)


def assembled(stream):
    """Finish reasons and calls of a stream, by choice, put together as clients do."""
    finish, calls = {}, {}
    for chunk in stream:
        for choice in chunk.choices:
            assert not choice.delta.content
            known = calls.setdefault(choice.index, [])
            for delta in choice.delta.tool_calls or []:
                if delta.index == len(known):
                    assert delta.id and delta.type == "function"
                    known.append([delta.function.name, ""])
                known[delta.index][1] += delta.function.arguments or ""
            if choice.finish_reason:
                assert choice.index not in finish
                finish[choice.index] = choice.finish_reason
    return finish, calls


@pytest.mark.parametrize(
    "choice, name", [("required", None), (named("get_weather"), "get_weather"), (named("play_song"), "play_song")]
)
def test_a_call_comes_if_it_must(client, model, choice, name):
    for seed, temperature in enumerate([0, 1, 1]):
        answer = client.chat.completions.create(
            model=model,
            messages=ASK,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=200,
            temperature=temperature,
            seed=seed,
        )
        (told,) = answer.choices
        assert told.finish_reason == "tool_calls"
        assert not told.message.content
        (call,) = told.message.tool_calls
        assert call.id and call.type == "function"
        check(call)
        assert name in (None, call.function.name)


def test_choices_and_streams_are_the_same_calls(client, model):
    ask = dict(model=model, messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    ask |= dict(max_tokens=200, temperature=1, seed=5, n=3, logprobs=True, top_logprobs=1)
    whole = client.chat.completions.create(**ask)
    finish, calls = assembled(client.chat.completions.create(stream=True, **ask))
    assert len(whole.choices) == 3
    for choice in whole.choices:
        (call,) = choice.message.tool_calls
        check(call)
        assert calls[choice.index] == [[call.function.name, call.function.arguments]]
        assert finish[choice.index] == choice.finish_reason == "tool_calls"
        assert "".join(entry.token for entry in choice.logprobs.content).startswith("{")


def test_several_calls_at_once(client, model):
    """As many as the model likes, one at least. Ends of calls are not what a small model likes, so the last may be cut short."""
    answer = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=150, temperature=1, seed=2
    )
    (choice,) = answer.choices
    calls = choice.message.tool_calls
    assert calls and len({call.id for call in calls}) == len(calls)
    for call in calls if choice.finish_reason == "tool_calls" else calls[:-1]:
        check(call)


def test_a_schema_for_the_answer_is_no_obstacle(client, model):
    """Some clients send one always. There is no answer, so it holds of none."""
    ask = dict(model=model, messages=ASK, tools=TOOLS, tool_choice=named("get_weather"), max_tokens=200, temperature=0)
    answer = client.chat.completions.create(**ask, response_format=PERSON)
    check(answer.choices[0].message.tool_calls[0])


def test_a_call_that_is_cut_short_says_so(client, model):
    answer = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, tool_choice=named("get_weather"), max_tokens=12, temperature=0
    )
    assert answer.choices[0].finish_reason == "length"


def test_results_are_sent_back(client, model):
    first = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, tool_choice=named("get_weather"), max_tokens=200, temperature=0
    )
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny, 21 degrees."}
    messages = [*ASK, message, result]
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=16, temperature=0
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls
    again = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, tool_choice=named("play_song"), max_tokens=60, temperature=0
    )
    check(again.choices[0].message.tool_calls[0])


def test_the_helper_of_the_client_parses_arguments(client, model):
    pydantic = pytest.importorskip("pydantic")

    class Light(pydantic.BaseModel):
        model_config = {"json_schema_extra": {"x-guidance": COMPACT}, "extra": "forbid"}
        on: bool

    answer = client.chat.completions.parse(
        model=model,
        messages=ASK,
        tools=[openai.pydantic_function_tool(Light)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Light)


PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": {"type": "object"}}}
WRONG = tool("go", {"type": "object", "properties": {"x": {"type": "strnig"}}}, strict=True)


@pytest.mark.parametrize(
    "extra, param",
    [
        # The template of this model shows no tools: it can only be made to call.
        ({"tools": TOOLS}, "tools"),
        ({"tools": TOOLS, "tool_choice": named("fly")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "extra_body": {"guided_regex": "a+"}}, "tool_choice"),
        ({"tools": [*TOOLS, WRONG], "tool_choice": "required"}, "tools[2].function.parameters"),
    ],
)
def test_what_cannot_be_held_is_a_bad_request(client, model, extra, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=model, messages=ASK, max_tokens=8, **extra)
    assert error.value.param == param, error.value
