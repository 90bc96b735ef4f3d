"""Answers and events of every endpoint, by the published types: Open Responses' for responses, the official clients' for the rest.

Types are checked strictly. What an answer has beyond its type is listed here by name, so that nothing comes in unseen.
"""

import enum
import json
import typing
import urllib.error
import urllib.request

import anthropic.types
import openai.types
import openai.types.chat
import openai.types.responses
import openai.types.shared
import pydantic
import pytest

MESSAGES = [{"role": "user", "content": "Name a color."}]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
}
FUNCTION = {"name": "paint", "description": "Paints a thing.", "parameters": SCHEMA}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}

# why answers of chats and completions have more than OpenAI's
VLLM = {
    "choices.stop_reason": "vLLM's: which stop ended the text",
}
# of responses, what OpenAI's have and the specification of Open Responses does not
OPENAI = {
    "response.user": "OpenAI's: repeated of the request",
    "name": "OpenAI's: the function's name, when its arguments are whole",
    "response.usage.input_tokens_details.cache_write_tokens": "OpenAI's newest",
}


def unknown(value, raw, path=""):
    """Paths in `raw` that the type of `value` has no field for."""
    if isinstance(value, pydantic.RootModel):
        return unknown(value.root, raw, path)
    if isinstance(value, pydantic.BaseModel):
        fields = {field.alias or name: name for name, field in type(value).model_fields.items()}
        own = {f"{path}{name}" for name in raw if name not in fields}
        inner = (unknown(getattr(value, fields[name]), raw[name], f"{path}{name}.") for name in raw if name in fields)
        return own.union(*inner)
    if isinstance(value, list):
        return set().union(*(unknown(one, other, path) for one, other in zip(value, raw, strict=True)))
    return set()


def check(kind, raw, known=()):
    """`raw` is of this type, and has nothing more but what is known."""
    value = pydantic.TypeAdapter(kind).validate_json(json.dumps(raw), strict=True)
    assert unknown(value, raw) <= set(known), json.dumps(raw)
    return value


@pytest.fixture
def ask(cluster):
    """Makes a request; gives its status and its JSON, or its events."""

    def ask(method, path, body=None):
        request = urllib.request.Request(cluster["url"] + path, method=method)
        request.add_header("anthropic-version", "2023-06-01")
        if body is not None:
            request.add_header("content-type", "application/json")
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, kind, text = answer.status, answer.headers["content-type"], answer.read().decode()
        except urllib.error.HTTPError as answer:
            status, kind, text = answer.code, answer.headers["content-type"], answer.read().decode()
        if not kind.startswith("text/event-stream"):
            return status, json.loads(text)
        data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        return status, [json.loads(one) for one in data if one != "[DONE]"]

    return ask


@pytest.fixture
def made(ask, model):
    """The same of a request that goes well; greedy, and short."""

    def made(path, limit="max_tokens", **body):
        status, answer = ask("POST", path, {"model": model, limit: 12, "temperature": 0, **body})
        assert status == 200, answer
        return answer

    return made


CHATS = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 2, "n": 2},
    "calls": {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required", "max_tokens": 60},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
}


@pytest.mark.parametrize("more", CHATS.values(), ids=CHATS)
def test_chats(made, more):
    path = "/v1/chat/completions"
    check(openai.types.chat.ChatCompletion, made(path, messages=MESSAGES, **more), VLLM)
    streamed = {**more, "stream": True, "stream_options": {"include_usage": True}}
    for event in made(path, messages=MESSAGES, **streamed):
        check(openai.types.chat.ChatCompletionChunk, event, VLLM)


# With echo the first token has no log-probability: null, as OpenAI has it, though the type has none there.
@pytest.mark.parametrize("more", [{}, {"logprobs": 2}], ids=["plain", "logprobs"])
def test_completions(made, more):
    check(openai.types.Completion, made("/v1/completions", prompt="One, two", **more), VLLM)
    events = made("/v1/completions", prompt="One, two", stream=True, **more)
    # the type has one for whole answers and streams, and in streams the reason comes last
    for event in events:
        for choice in event["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        check(openai.types.Completion, event, VLLM)


def test_models(ask, model):
    _, listed = ask("GET", "/v1/models")
    assert listed["object"] == "list"
    for one in [*listed["data"], ask("GET", f"/v1/models/{model}")[1]]:
        more = {name: "Anthropic's" for name in ("type", "display_name", "created_at")}
        more |= {name: "vLLM's" for name in ("root", "parent", "max_model_len")}
        more |= {name: "Baton's" for name in ("default_max_tokens", "tools")}
        check(openai.types.Model, one, more)


def test_anthropics_client_lists_the_model(cluster, model):
    client = anthropic.Anthropic(base_url=cluster["url"], api_key="none", max_retries=0)
    [listed] = client.models.list()
    assert (listed.id, listed.type, listed.display_name) == (model, "model", model)
    assert listed.created_at.year >= 2026
    assert client.models.retrieve(model).id == model


RESPONSES = {
    "plain": {},
    "logprobs": LOGPROBS,
    "calls": {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required", "max_output_tokens": 60},
    "schema": {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}, "max_output_tokens": 60},
}


@pytest.mark.parametrize("more", RESPONSES.values(), ids=RESPONSES)
def test_responses(ask, made, more):
    types = pytest.importorskip("openresponses_types", reason="needs Python 3.11").types
    known = {path.removeprefix("response.") for path in OPENAI}
    response = made("/v1/responses", "max_output_tokens", input="Name a color.", **more)
    check(types.ResponseResource, without_schema(response), known)
    if more is LOGPROBS:
        entries = response["output"][0]["content"][0]["logprobs"]
        assert entries and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    path = f"/v1/responses/{response['id']}"
    assert ask("GET", path) == (200, response)
    check(openai.types.responses.ResponseItemList, ask("GET", f"{path}/input_items")[1])
    deleted = {"id": response["id"], "object": "response", "deleted": True}
    assert ask("DELETE", path) == (200, deleted)
    events = made("/v1/responses", "max_output_tokens", input="Name a color.", stream=True, **more)
    models = [kind for name, kind in vars(types).items() if name.endswith("StreamingEvent")]
    for event in events:
        kinds = [kind for kind in models if event["type"] in named(kind)]
        assert len(kinds) == 1, event
        if "response" in event:
            event["response"] = without_schema(event["response"])
        check(kinds[0], event, OPENAI)


def without_schema(response):
    """The specification says that the schema of the text is null, which nobody's is."""
    response = json.loads(json.dumps(response))
    if "schema" in response["text"]["format"]:
        assert response["text"]["format"]["schema"] == SCHEMA
        response["text"]["format"]["schema"] = None
    return response


def named(kind):
    """The texts that the field `type` of a model may have."""
    of = kind.model_fields["type"].annotation
    if isinstance(of, type) and issubclass(of, enum.Enum):
        return {one.value for one in of}
    return set(typing.get_args(of))


CLAUDES = {
    "plain": {},
    "calls": {
        "tools": [{"name": "paint", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any"},
        "max_tokens": 60,
    },
}


@pytest.mark.parametrize("more", CLAUDES.values(), ids=CLAUDES)
def test_messages(made, model, more):
    check(anthropic.types.Message, made("/v1/messages", messages=MESSAGES, **more))
    for event in made("/v1/messages", messages=MESSAGES, stream=True, **more):
        if event["type"] != "ping":
            check(anthropic.types.RawMessageStreamEvent, event)


def test_a_prompt_is_counted(ask, model):
    _, counted = ask("POST", "/v1/messages/count_tokens", {"model": model, "messages": MESSAGES})
    check(anthropic.types.MessageTokensCount, counted)


class OpenAIError(pydantic.BaseModel):
    error: openai.types.shared.ErrorObject


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", OpenAIError),
        ("/v1/completions", OpenAIError),
        ("/v1/responses", OpenAIError),
        ("/v1/messages", anthropic.types.ErrorResponse),
    ],
)
def test_errors(ask, model, path, kind):
    prompt = {"/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"}}.get(path, {"messages": MESSAGES})
    limit = {} if path == "/v1/responses" else {"max_tokens": 1}
    for more, expected in [({"temperature": "hot"}, 400), ({"model": "gpt-17"}, 404)]:
        status, answer = ask("POST", path, {"model": model, **prompt, **limit, **more})
        assert status == expected, answer
        check(kind, answer)


def test_a_request_without_a_model_means_the_one_that_there_is(ask, model):
    for path, body in [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 1}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1}),
    ]:
        status, answer = ask("POST", path, body)
        assert (status, answer.get("model")) == (200, model), (path, answer)
    status, answer = ask("POST", "/v1/messages/count_tokens", {"messages": MESSAGES})
    assert status == 200 and answer["input_tokens"] > 0, answer
