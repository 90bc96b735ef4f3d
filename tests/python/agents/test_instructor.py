"""instructor: the modes of OpenAI's chats and responses, and of Anthropic's messages."""

from collections.abc import Iterable
from typing import Literal

import anthropic
import instructor
import openai
import pytest
from instructor import Mode
from instructor.core import InstructorRetryException
from shapes import QUESTION, Defaults, Song, Songs, Weather, function, schema_format

ASK = [{"role": "user", "content": QUESTION}]
HELD = [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA]
FENCED = r'```json\n\{"loud": (true|false)\}\n```'


@pytest.fixture(scope="module")
def ask(model) -> dict:
    return dict(model=model, messages=ASK, temperature=0, max_tokens=300, max_retries=0)


@pytest.fixture(scope="module")
def of_chats(base_url):
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
    return lambda mode: instructor.from_openai(client, mode=mode)


@pytest.fixture(scope="module")
def of_messages(cluster):
    client = anthropic.Anthropic(base_url=cluster["url"], api_key="none", max_retries=0, timeout=120)
    return lambda mode: instructor.from_anthropic(client, mode=mode)


@pytest.mark.parametrize("mode", HELD)
def test_an_object(of_chats, ask, mode):
    client = of_chats(mode)
    weather, completion = client.create_with_completion(response_model=Weather, **ask)
    assert isinstance(weather, Weather)
    assert completion.usage.completion_tokens > 0
    partial = list(client.create_partial(response_model=Weather, **ask))
    assert len(partial) > 1
    Weather.model_validate(partial[-1].model_dump())


@pytest.mark.parametrize("mode", HELD)
def test_a_simple_type(of_chats, ask, mode):
    assert of_chats(mode).create(response_model=Literal["red", "blue"], **ask) in ("red", "blue")


def test_an_object_later(base_url, ask, later):
    async def create():
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120) as client:
            return await instructor.from_openai(client, mode=Mode.TOOLS).create(response_model=Weather, **ask)

    assert isinstance(later(create()), Weather)


@pytest.mark.parametrize("mode", HELD)
def test_a_list(of_chats, ask, mode):
    """Of its own schema for lists nothing is required, and a small model writes other things: here it has bounds."""
    if mode == Mode.JSON_SCHEMA:
        bounds = {"response_format": schema_format(Songs)}
    else:
        bounded = function(Songs)
        bounded["function"]["name"] = "IterableSong"
        bounds = {"tools": [bounded]}
    songs = list(of_chats(mode).create_iterable(response_model=Song, extra_body=bounds, **ask))
    assert 1 <= len(songs) <= 3 and all(isinstance(song, Song) for song in songs)
    assert of_chats(mode).create(response_model=list[Song], extra_body=bounds, **ask) == songs


def test_json(of_chats, ask, braces):
    more = {"allowed_token_ids": braces}
    assert of_chats(Mode.JSON).create(response_model=Defaults, extra_body=more, **ask).model_dump() == {"loud": True}


def test_json_in_markdown(of_chats, ask):
    more = {"structured_outputs": {"regex": FENCED}}
    assert isinstance(of_chats(Mode.MD_JSON).create(response_model=Song, extra_body=more, **ask), Song)


def test_what_the_model_must_decide_is_refused(of_chats, ask):
    """It calls nothing of its own accord."""
    with pytest.raises(InstructorRetryException, match="tool_choice"):
        of_chats(Mode.PARALLEL_TOOLS).create(response_model=Iterable[Weather | Song], **ask)


def test_a_tool_of_responses(of_chats, ask):
    client = of_chats(Mode.RESPONSES_TOOLS)
    weather = client.create(response_model=Weather, **ask)
    assert isinstance(weather, Weather)
    partial = list(client.create_partial(response_model=Weather, **ask))
    Weather.model_validate(partial[-1].model_dump())


@pytest.fixture(scope="module")
def ask_messages(model) -> dict:
    """The SDK has no argument for the temperature any more."""
    return dict(model=model, messages=ASK, max_tokens=300, max_retries=0, extra_body={"temperature": 0})


@pytest.mark.parametrize("mode", [Mode.ANTHROPIC_TOOLS, Mode.ANTHROPIC_REASONING_TOOLS])
def test_a_tool_of_messages(of_messages, ask_messages, mode):
    client = of_messages(mode)
    weather, message = client.create_with_completion(response_model=Weather, **ask_messages)
    assert isinstance(weather, Weather)
    assert message.stop_reason == "tool_use"
    partial = list(client.create_partial(response_model=Weather, **ask_messages))
    Weather.model_validate(partial[-1].model_dump())


def test_json_of_messages(of_messages, ask_messages):
    held = {"format": {"type": "json_schema", "schema": Weather.model_json_schema()}}
    ask = {**ask_messages, "extra_body": {"temperature": 0, "output_config": held}}
    assert isinstance(of_messages(Mode.ANTHROPIC_JSON).create(response_model=Weather, **ask), Weather)
