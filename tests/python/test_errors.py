"""Errors arrive as the exceptions of the official client."""

import openai
import pytest

HELLO = [{"role": "user", "content": "Hi"}]


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=HELLO)
    assert caught.value.status_code == 404
    assert "gpt-17" in caught.value.message
    assert caught.value.param == "model"


def test_unknown_model_by_name(client):
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")


@pytest.mark.parametrize(
    ("param", "value"),
    [("temperature", 9), ("top_p", 2), ("n", 0), ("max_tokens", 0), ("presence_penalty", 5), ("stop", [""] * 99)],
)
def test_the_parameter_is_named(client, model, param, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=HELLO, **{param: value})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.message


def test_a_stream_fails_before_it_begins(client, model):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=HELLO, temperature=-1, stream=True)


def test_a_prompt_longer_than_the_model(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="word " * 4000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"


def test_prompt_and_output_longer_than_the_model(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="word " * 1500, max_tokens=1500)
    assert caught.value.param == "max_tokens"


def test_an_embedding_is_not_offered(client, model):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="x")
