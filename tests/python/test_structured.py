"""Structured output through the official client: whatever this small model would say, what it says is valid."""

import json
import re

import openai
import pytest

ASK = [{"role": "user", "content": "Invent a person. Answer in JSON."}]

# Without white space between its parts, so that an answer has a bound: a small model may go on with that for ever.
COMPACT = {"whitespace_flexible": False}

PERSON = {
    "x-guidance": COMPACT,
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "languages": {"type": "array", "items": {"enum": ["Rust", "Python", "C"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}


def check_person(text):
    person = json.loads(text)
    assert list(person) == ["name", "age", "languages"], "in the schema's order"
    assert len(person["name"]) <= 20
    assert 0 <= person["age"] <= 120
    assert 1 <= len(person["languages"]) <= 3
    assert set(person["languages"]) <= {"Rust", "Python", "C"}


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_by_schema(client, model, temperature):
    for seed in range(3):
        answer = client.chat.completions.create(
            model=model,
            messages=ASK,
            max_tokens=300,
            temperature=temperature,
            seed=seed,
            response_format=schema_format(PERSON),
        )
        assert answer.choices[0].finish_reason == "stop"
        check_person(answer.choices[0].message.content)


def test_a_stream_by_schema_is_the_same_text(client, model):
    arguments = dict(
        model=model, messages=ASK, max_tokens=300, temperature=1, seed=7, response_format=schema_format(PERSON)
    )
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **arguments)]
    assert "".join(pieces) == whole
    check_person(whole)


def test_a_json_object(client, model):
    answer = client.chat.completions.create(
        model=model, messages=ASK, max_tokens=400, temperature=0, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_parse_gives_a_model(client, model):
    """The way of the client's users: a class in, an object out."""
    pydantic = pytest.importorskip("pydantic")

    class Weather(pydantic.BaseModel):
        model_config = {"json_schema_extra": {"x-guidance": COMPACT}}
        city: str = pydantic.Field(max_length=20)
        degrees: int = pydantic.Field(ge=-90, le=60)

    answer = client.chat.completions.parse(
        model=model, messages=ASK, max_tokens=300, temperature=0, response_format=Weather
    )
    weather = answer.choices[0].message.parsed
    assert isinstance(weather, Weather)


@pytest.mark.parametrize(
    "wanted, pattern",
    [
        ({"regex": "[A-Z][a-z]{2,8} [0-9]{3}"}, "[A-Z][a-z]{2,8} [0-9]{3}"),
        ({"choice": ["positive", "negative", "no idea"]}, "positive|negative|no idea"),
        ({"grammar": 'start: "yes" | "no" " "? WHY\nWHY: /because [a-z ]{1,20}/'}, "yes|no ?because [a-z ]{1,20}"),
    ],
)
def test_what_vllm_has_besides(client, model, wanted, pattern):
    ask = lambda extra: client.chat.completions.create(
        model=model, messages=ASK, max_tokens=60, temperature=1, seed=1, n=3, extra_body=extra
    )
    ((kind, value),) = wanted.items()
    texts = []
    for extra in ({"structured_outputs": wanted}, {f"guided_{kind}": value}):
        answer = ask(extra)
        texts.append([choice.message.content for choice in answer.choices])
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert re.fullmatch(pattern, choice.message.content), choice.message.content
    assert texts[0] == texts[1]


def test_completions_too(client, model):
    answer = client.completions.create(
        model=model,
        prompt=["The capital of France is", "One and one is"],
        max_tokens=20,
        temperature=0,
        extra_body={"structured_outputs": {"choice": ["Paris", "two"]}},
    )
    assert len(answer.choices) == 2
    assert all(choice.text in ("Paris", "two") for choice in answer.choices)


def test_log_probabilities_are_of_what_is_allowed(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=ASK,
        max_tokens=10,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"structured_outputs": {"choice": ["no"]}},
    )
    (choice,) = answer.choices
    assert choice.message.content == "no"
    assert abs(choice.logprobs.content[0].logprob) < 5
    assert choice.logprobs.content[0].top_logprobs[0].token in "no"


@pytest.mark.parametrize(
    "extra, param",
    [
        ({"response_format": schema_format({"type": "strnig"})}, "response_format.json_schema.schema"),
        ({"guided_regex": "(unclosed"}, "guided_regex"),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_cannot_be_compiled_is_a_bad_request(client, model, extra, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=model, messages=ASK, max_tokens=8, extra_body=extra)
    assert error.value.param == param, error.value
