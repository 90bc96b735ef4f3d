"""pydantic-ai: agents over chats, responses and messages."""

import asyncio
from typing import Literal

import anthropic
import openai
import pytest
from pydantic_ai import Agent, ModelHTTPError, ModelSettings, NativeOutput, PromptedOutput, ToolOutput, UsageLimits
from pydantic_ai.capabilities import PrepareOutputTools, PrepareTools
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from shapes import QUESTION, Defaults, Song, Weather

DOORS = ["chat", "responses", "messages"]
ONCE = UsageLimits(request_limit=1)


@pytest.fixture
def run(cluster, model):
    """Runs what `ask` makes of a model, in a loop of its own with clients of its own."""

    def make(door, ask):
        async def body():
            once = dict(api_key="none", max_retries=0, timeout=120)
            if door == "messages":
                async with anthropic.AsyncAnthropic(base_url=cluster["url"], **once) as client:
                    # what Anthropic's own models can is told by their names
                    profile = ModelProfile(supports_json_schema_output=True)
                    return await ask(AnthropicModel(model, provider=AnthropicProvider(anthropic_client=client), profile=profile))
            async with openai.AsyncOpenAI(base_url=cluster["url"] + "/v1", **once) as client:
                kind = OpenAIChatModel if door == "chat" else OpenAIResponsesModel
                return await ask(kind(model, provider=OpenAIProvider(openai_client=client)))

        return asyncio.run(body())

    return make


def agent(model, max_tokens=300, **more) -> Agent:
    settings = ModelSettings(temperature=0, max_tokens=max_tokens, parallel_tool_calls=False)
    return Agent(model, model_settings=settings, retries=0, **more)


@pytest.mark.parametrize("door", DOORS)
def test_a_text(run, door):
    async def ask(model):
        small = agent(model, max_tokens=16, instructions="Be brief.")
        first = await small.run(QUESTION, usage_limits=ONCE)
        async with small.run_stream(QUESTION, usage_limits=ONCE) as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
        then = await small.run("And in Rome?", message_history=first.all_messages(), usage_limits=ONCE)
        return first, pieces, then

    first, pieces, then = run(door, ask)
    assert first.output and len(pieces) > 1
    assert "".join(pieces) == first.output
    assert 0 < first.usage.output_tokens <= 16
    assert then.output and then.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("output", [ToolOutput(Weather), ToolOutput(Song, strict=True), NativeOutput(Weather)])
def test_an_object(run, door, output):
    async def ask(model):
        one = agent(model, output_type=output)
        async with one.run_stream(QUESTION, usage_limits=ONCE) as stream:
            return (await one.run(QUESTION, usage_limits=ONCE)).output, await stream.get_output()

    whole, streamed = run(door, ask)
    assert isinstance(whole, (Weather, Song)) and streamed == whole


@pytest.mark.parametrize("door", DOORS)
def test_one_of_two_objects(run, door):
    async def ask(model):
        return await agent(model, output_type=[Weather, Song]).run(QUESTION, usage_limits=ONCE)

    assert isinstance(run(door, ask).output, (Weather, Song))


def test_an_object_that_is_only_asked_for(run, braces):
    async def ask(model):
        held = ModelSettings(extra_body={"allowed_token_ids": braces})
        small = agent(model, max_tokens=8, output_type=PromptedOutput(Defaults))
        return await small.run(QUESTION, model_settings=held, usage_limits=ONCE)

    assert run("chat", ask).output == Defaults()


@pytest.mark.parametrize("door", DOORS)
def test_a_tool_is_called_and_its_result_sent_back(run, door):
    """First only the tool may be called, then only the answer: this model does what it must."""

    cities = []

    async def first_only(context, tools):
        return [] if cities else tools

    async def then_only(context, tools):
        return tools if cities else []

    def weather(city: Literal["Paris", "Rome"]) -> str:
        cities.append(city)
        return "Sunny, 21 degrees."

    async def ask(model):
        steps = [PrepareTools(first_only), PrepareOutputTools(then_only)]
        two = agent(model, output_type=Song, tools=[weather], capabilities=steps)
        return await two.run(QUESTION, usage_limits=UsageLimits(request_limit=2))

    result = run(door, ask)
    assert isinstance(result.output, Song)
    assert cities and set(cities) <= {"Paris", "Rome"}


@pytest.mark.parametrize("door", DOORS)
def test_errors_come_through(run, door):
    async def ask(model):
        return await agent(model).run(QUESTION, model_settings=ModelSettings(temperature=9))

    with pytest.raises(ModelHTTPError, match="temperature") as error:
        run(door, ask)
    assert error.value.status_code == 400
