"""Anthropic's Messages API through its own SDK."""

import asyncio
import json
import urllib.error
import urllib.request

import anthropic
import pydantic
import pytest
from anthropic import types

ASK = [{"role": "user", "content": "Name three colours."}]
# the SDK's newest has no argument for it any more; the same tokens each time, whatever the model's defaults are
GREEDY = {"temperature": 0}
PLAIN = dict(max_tokens=24, messages=ASK, extra_body=GREEDY)
# without white space between its parts and with an end in sight: a small model may go on for ever
COMPACT = {"whitespace_flexible": False}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
SONG = {
    "name": "play_song",
    "input_schema": {
        "type": "object",
        "properties": {"loud": {"type": "boolean"}},
        "required": ["loud"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def claude(cluster) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=cluster["url"], api_key="none", max_retries=0, timeout=120)


def text(message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def read(usage) -> int:
    return usage.input_tokens + usage.cache_read_input_tokens


def test_a_message(claude, model):
    message = claude.messages.create(model=model, **PLAIN)
    assert (message.type, message.role, message.model) == ("message", "assistant", model)
    assert message.id.startswith("msg_")
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.stop_sequence is None
    assert 0 < message.usage.output_tokens <= 24
    assert message._request_id
    # what the types have no name for would stand in `model_extra`
    for part in (message, *message.content, message.usage):
        assert not part.model_extra, part


def test_a_stream_adds_up_to_the_same_message(claude, model):
    whole = claude.messages.create(model=model, **PLAIN)
    with claude.messages.stream(model=model, **PLAIN) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == text(final) == text(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert read(final.usage) == read(whole.usage)

    names = [event.type for event in claude.messages.create(model=model, stream=True, **PLAIN)]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}


def test_many_at_once(cluster, model):
    async def ask():
        url = cluster["url"]
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
            whole = [client.messages.create(model=model, **PLAIN) for _ in range(3)]
            async with client.messages.stream(model=model, **PLAIN) as stream:
                streamed = await stream.get_final_message()
            return [text(message) for message in [streamed, *await asyncio.gather(*whole)]]

    assert len(set(asyncio.run(ask()))) == 1


def test_the_system_prompt_is_read(claude, model):
    def count(**more):
        return claude.messages.count_tokens(model=model, messages=ASK, **more).input_tokens

    system = "You are a pirate. Speak like one."
    blocks = [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}]
    assert count(system=system) == count(system=blocks) != count()
    message = claude.messages.create(model=model, system=system, **PLAIN)
    assert read(message.usage) == count(system=system)


def test_tokens_are_counted_as_they_are_used(claude, model):
    messages = [
        *ASK,
        {"role": "assistant", "content": [{"type": "text", "text": "Red, green, blue."}]},
        {"role": "user", "content": [{"type": "text", "text": "Three"}, {"type": "text", "text": "more."}]},
    ]
    counted = claude.messages.count_tokens(model=model, messages=messages).input_tokens
    message = claude.messages.create(model=model, max_tokens=1, messages=messages)
    assert read(message.usage) == counted
    assert message.usage.output_tokens == 1
    assert message.stop_reason == "max_tokens"
    again = claude.messages.create(model=model, max_tokens=1, messages=messages)
    assert read(again.usage) == counted


def test_a_stop_sequence(claude, model):
    whole = text(claude.messages.create(model=model, **PLAIN))
    stop = whole[len(whole) // 2 :][:3]
    for ask in (claude.messages.create, lambda **a: claude.messages.stream(**a).__enter__().get_final_message()):
        message = ask(model=model, stop_sequences=["no such text", stop], **PLAIN)
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert text(message) == whole[: whole.index(stop)]


def test_a_chat_goes_on_with_what_came(claude, model):
    first = claude.messages.create(model=model, **PLAIN)
    messages = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And one more?"}]
    second = claude.messages.create(model=model, max_tokens=8, messages=messages)
    assert read(second.usage) > read(first.usage)
    assert second.content[0].type == "text"


def test_a_prefilled_answer_is_gone_on_with(claude, model):
    messages = [*ASK, {"role": "assistant", "content": "Red, green and"}]
    message = claude.messages.create(model=model, max_tokens=8, messages=messages, extra_body=GREEDY)
    assert not text(message).startswith("Red, green and")
    # the prompt ends in the assistant's turn: that is all that comes on top
    begun = claude.messages.count_tokens(model=model, messages=ASK).input_tokens
    assert begun < read(message.usage) < begun + 10


def test_an_answer_by_schema(claude, model):
    schema = {
        "x-guidance": COMPACT,
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    for seed in range(3):
        message = claude.messages.create(
            model=model,
            max_tokens=64,
            messages=ASK,
            output_config=config,
            extra_body={"temperature": 1, "seed": seed},
        )
        assert message.stop_reason == "end_turn"
        answer = json.loads(text(message))
        assert answer["colour"] in ("red", "blue") and 0 <= answer["count"] <= 9


def test_what_agents_send_besides_is_taken(cluster, model):
    """As Claude Code sends it: the beta door, a token for a key, marks for caches, thinking, metadata."""
    client = anthropic.Anthropic(base_url=cluster["url"], auth_token="none", max_retries=0, timeout=120)
    message = client.beta.messages.create(
        model=model,
        max_tokens=32_000,
        stop_sequences=["\n", ".", ","],
        betas=["claude-code-20250219", "interleaved-thinking-2025-05-14"],
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=0;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "baton"}]},
            {"role": "user", "content": "Say yes."},
        ],
        thinking={"type": "enabled", "budget_tokens": 31_999},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": "u"},
    )
    assert message.role == "assistant"


def test_tool_choice_without_tools_and_tools_that_are_not_the_clients(claude, model):
    with pytest.raises(anthropic.BadRequestError, match="tool_choice needs tools"):
        claude.messages.create(model=model, tool_choice={"type": "any"}, **PLAIN)
    search = {"type": "web_search_20250305", "name": "web_search"}
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\].type"):
        claude.messages.create(model=model, tools=[search], **PLAIN)


def test_tools_in_auto_are_refused_for_a_model_that_calls_none(claude, model):
    """This model's template shows no tools and its format is not known."""
    for ask in (claude.messages.create, claude.messages.count_tokens):
        more = PLAIN if ask == claude.messages.create else dict(messages=ASK)
        with pytest.raises(anthropic.BadRequestError, match="tool"):
            ask(model=model, tools=[WEATHER], **more)
        assert ask(model=model, tools=[WEATHER], tool_choice={"type": "none"}, **more)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_comes_if_it_must_and_goes_on(claude, model, choice):
    """This model calls none of its own accord: it is made to. Streamed it is the same call."""
    choice = {**choice, "disable_parallel_tool_use": True}
    asked = dict(model=model, max_tokens=100, messages=ASK, tools=[WEATHER, SONG], tool_choice=choice)
    for seed in range(2):
        extra = {"temperature": 1, "seed": seed}
        message = claude.messages.create(**asked, extra_body=extra)
        with claude.messages.stream(**asked, extra_body=extra) as stream:
            streamed = stream.get_final_message()
        for answer in (message, streamed):
            assert answer.stop_reason == "tool_use"
            (call,) = answer.content
            assert (call.type, call.name in ("get_weather", "play_song")) == ("tool_use", True)
            if call.name == "get_weather":
                assert set(call.input) == {"city", "unit"} and len(call.input["city"]) <= 12
            else:
                assert choice["type"] == "any" and call.input["loud"] in (True, False)
        assert message.content[0].name == streamed.content[0].name
        assert message.content[0].input == streamed.content[0].input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
    messages = [*ASK, {"role": "assistant", "content": streamed.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(model=model, max_tokens=8, messages=messages)
    assert read(after.usage) > read(message.usage)


def test_a_call_that_is_cut_has_no_input(claude, model):
    choice = {"type": "tool", "name": "get_weather"}
    for max_tokens in (6, 12):
        message = claude.messages.create(
            model=model, max_tokens=max_tokens, messages=ASK, tools=[WEATHER], tool_choice=choice
        )
        assert message.stop_reason == "max_tokens"
        # what is not yet a call is text
        assert all(block.type == "text" or block.input == {} for block in message.content)


def test_errors_are_the_sdks_own(claude, model):
    with pytest.raises(anthropic.NotFoundError) as wrong_model:
        claude.messages.create(model="no-such-model", **PLAIN)
    assert wrong_model.value.type == "not_found_error"
    assert wrong_model.value.request_id
    with pytest.raises(anthropic.BadRequestError) as typo:
        claude.messages.create(model=model, max_tokens=1, messages=ASK, extra_body={"max_token": 3})
    assert typo.value.type == "invalid_request_error"
    assert "do you mean max_tokens?" in typo.value.api_message
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]"):
        claude.messages.create(model=model, max_tokens=1, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(model=model, max_tokens=1, messages=[{"role": "user", "content": "a b " * 4000}])
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        with claude.messages.stream(model=model, max_tokens=1, messages=ASK, extra_body={"temperature": 9}) as stream:
            stream.until_done()


def test_answers_and_events_are_what_the_types_say(cluster, model):
    """The SDK takes nearly anything; its types do not."""

    def known(value, path):
        if isinstance(value, pydantic.BaseModel):
            assert not value.model_extra, f"{path}: {value.model_extra}"
            for name in type(value).model_fields:
                known(getattr(value, name), f"{path}.{name}")
        for i, item in enumerate(value if isinstance(value, list) else []):
            known(item, f"{path}[{i}]")

    def check(kind, value):
        known(pydantic.TypeAdapter(kind).validate_python(value, strict=True), kind)

    def post(path, body):
        request = urllib.request.Request(cluster["url"] + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()

    body = {"model": model, "max_tokens": 8, "messages": ASK}
    check(types.Message, json.loads(post("/v1/messages", body)))
    events = post("/v1/messages", {**body, "stream": True}).split("\n\n")
    events = [event.split("\ndata: ") for event in events if event.startswith("event: ")]
    assert events[1] == ["event: ping", '{"type":"ping"}']
    for name, data in [*events[:1], *events[2:]]:
        assert json.loads(data)["type"] == name.removeprefix("event: ")
        check(types.RawMessageStreamEvent, json.loads(data))
    count = {"model": model, "messages": ASK}
    check(types.MessageTokensCount, json.loads(post("/v1/messages/count_tokens", count)))
    for wrong in ({**body, "model": "other"}, {**body, "messages": []}, {}):
        error = json.loads(post("/v1/messages", wrong))
        check(types.shared.ErrorResponse, error)
        assert error["request_id"]
