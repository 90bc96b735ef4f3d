"""Fields beyond OpenAI's, and those that are refused, through the official client."""

import openai
import pytest

HELLO = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize(
    ("body", "param"),
    [({"max_token": 5}, "max_token"), ({"best_of": 2}, "best_of"), ({"wibble": 1}, "wibble")],
)
def test_what_would_be_ignored_is_refused_by_name(client, model, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=HELLO, extra_body=body)
    assert caught.value.param == param


def test_what_is_not_done_is_refused_by_name(client, model):
    function = {"name": "f", "parameters": {"type": "object"}}
    for name, value in [("functions", [function]), ("tool_choice", "required"), ("web_search_options", {})]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=model, messages=HELLO, **{name: value})
        assert caught.value.param == name


def test_a_message_may_be_sent_back_as_it_came(client, model):
    ask = dict(model=model, max_tokens=8, temperature=0)
    answer = client.chat.completions.create(messages=HELLO, **ask).choices[0].message
    again = [*HELLO, answer.model_dump(), {"role": "user", "content": "And of Spain?"}]
    assert client.chat.completions.create(messages=again, **ask).choices[0].message.content


def test_an_answer_that_is_continued_is_the_whole_one(client, model):
    ask = dict(model=model, temperature=0, extra_body={"return_token_ids": True})
    whole = client.chat.completions.create(messages=HELLO, max_tokens=12, **ask).choices[0]
    begun = client.post("/../detokenize", body={"tokens": whole.token_ids[:4]}, cast_to=object)["prompt"]
    ask["extra_body"] = {"continue_final_message": True}
    messages = [*HELLO, {"role": "assistant", "content": begun}]
    rest = client.chat.completions.create(messages=messages, max_tokens=8, **ask).choices[0].message.content
    assert whole.message.content.startswith(begun)
    assert rest and not rest.startswith(begun), "the answer goes on, and does not begin again"


def test_tokens_and_back(client, model):
    def post(path, body):
        return client.post(f"/..{path}", body=body, cast_to=object)

    text = "The capital of France is 🌊."
    tokens = post("/tokenize", {"model": model, "prompt": text})
    assert tokens["count"] == len(tokens["tokens"])
    assert post("/detokenize", {"tokens": tokens["tokens"]})["prompt"] == text
    turn = post("/tokenize", {"model": model, "messages": HELLO})
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=1)
    assert answer.usage.prompt_tokens == turn["count"]


def test_a_request_is_named(client, model):
    ask = dict(model=model, messages=HELLO, max_tokens=1)
    made = client.chat.completions.create(**ask)
    assert made.id == f"chatcmpl-{made._request_id}"
    given = client.chat.completions.create(**ask, extra_headers={"X-Request-Id": "mine-1"})
    assert given._request_id == "mine-1"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask, temperature=9, extra_headers={"X-Request-Id": "mine-2"})
    assert caught.value.request_id == "mine-2"


def test_large_answers_come_compressed_and_are_the_same(client, model):
    ask = dict(model=model, messages=HELLO, max_tokens=40, temperature=0, logprobs=True, top_logprobs=20)
    plain = client.chat.completions.create(**ask, extra_headers={"Accept-Encoding": "identity"})
    raw = client.chat.completions.with_raw_response.create(**ask, extra_headers={"Accept-Encoding": "gzip"})
    assert raw.headers["content-encoding"] == "gzip"
    assert raw.parse().choices == plain.choices
