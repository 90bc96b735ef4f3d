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


def tokens_of(client, model, text):
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    return client.post("/../tokenize", body=body, cast_to=object)["tokens"]


def holds(tokens, word):
    return any(tokens[at : at + len(word)] == word for at in range(len(tokens)))


def test_bad_words_do_not_come(client, model):
    ask = dict(model=model, prompt="Once upon a time", max_tokens=24, temperature=1, n=4)

    def outputs(seed, **more):
        answer = client.completions.create(seed=seed, extra_body={"return_token_ids": True, **more}, **ask)
        return [(choice.token_ids, choice.text) for choice in answer.choices]

    free = outputs(1)
    # A token of each output, and two in a row of another: texts that would come again.
    words = [client.post("/../detokenize", body={"tokens": ids[3:4]}, cast_to=object)["prompt"] for ids, _ in free]
    words.append(client.post("/../detokenize", body={"tokens": free[0][0][6:8]}, cast_to=object)["prompt"])
    words = [word for word in words if word.strip()]
    banned = [tokens_of(client, model, space + word.lstrip()) for word in words for space in ("", " ")]
    assert any(holds(ids, word) for ids, _ in free for word in banned), "without them they do"
    for seed in (1, 2, 3):
        for ids, text in outputs(seed, bad_words=words):
            assert not any(holds(ids, word) for word in banned), (text, words)


def test_only_allowed_tokens_come(client, model):
    allowed = tokens_of(client, model, " yes no maybe")
    extra = {"allowed_token_ids": allowed, "return_token_ids": True}
    ask = dict(model=model, temperature=1, max_tokens=12, n=3, seed=5)
    for stream in (False, True):
        if stream:
            chunks = client.chat.completions.create(messages=HELLO, stream=True, extra_body=extra, **ask)
            choices = [choice for chunk in chunks for choice in chunk.choices]
            ids = [getattr(choice, "token_ids", None) or [] for choice in choices]
            ids, reasons = sum(ids, []), [choice.finish_reason for choice in choices if choice.finish_reason]
        else:
            choices = client.chat.completions.create(messages=HELLO, extra_body=extra, **ask).choices
            ids, reasons = sum((choice.token_ids for choice in choices), []), [c.finish_reason for c in choices]
        assert len(ids) == 36 and set(ids) <= set(allowed)
        assert reasons == ["length"] * 3, "the end is not among them"
    for wrong in ([], [10**6]):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(messages=HELLO, extra_body={"allowed_token_ids": wrong}, **ask)
        assert caught.value.param == "allowed_token_ids"


def test_allowed_tokens_and_a_grammar_hold_together(client, model):
    extra = {"guided_regex": "[0-9]{6}", "bad_words": [str(digit) for digit in range(5)]}
    for seed in range(3):
        answer = client.completions.create(
            model=model, prompt="Number:", max_tokens=20, temperature=1, seed=seed, extra_body=extra
        )
        assert len(answer.choices[0].text) == 6 and set(answer.choices[0].text) <= set("56789")


def test_a_prompt_has_log_probabilities(client, model):
    prompt = "The capital of France is Paris"
    ids = tokens_of(client, model, prompt)
    for _ in range(2):  # the second time the prompt is cached
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=1, logprobs=1, echo=True, extra_body={"prompt_logprobs": 3}
        ).choices[0]
        first, *rest = answer.prompt_logprobs
        assert first is None and len(rest) == len(ids) - 1
        for token, echoed, entry in zip(ids[1:], answer.logprobs.token_logprobs[1:], rest):
            own = entry[str(token)]
            assert own["logprob"] == pytest.approx(echoed, abs=1e-6)
            assert next(iter(entry)) == str(token), "the token itself is the first"
            ranked = sorted((one for one in entry.values() if one["rank"]), key=lambda one: one["rank"])
            assert [one["rank"] for one in ranked] == [1, 2, 3]
            assert [one["logprob"] for one in ranked] == sorted((one["logprob"] for one in ranked), reverse=True)
            assert len(entry) == 3 or own["rank"] is None
        assert "".join(entry[str(token)]["decoded_token"] for token, entry in zip(ids[1:], rest)) in prompt
    chat = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=1, n=2, extra_body={"prompt_logprobs": 0}
    )
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens
    assert chat.prompt_logprobs[0] is None and all(len(entry) == 1 for entry in chat.prompt_logprobs[1:])
    for wrong in (-1, 21):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model, prompt=prompt, extra_body={"prompt_logprobs": wrong})
        assert caught.value.param == "prompt_logprobs"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=prompt, stream=True, extra_body={"prompt_logprobs": 1})
    assert caught.value.param == "prompt_logprobs"


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_says_what_stopped_it(client, model, stream):
    ask = dict(model=model, temperature=0, max_tokens=12)
    chat = lambda **more: client.chat.completions.create(messages=HELLO, stream=stream, **ask, **more)
    text = lambda **more: client.completions.create(prompt="One, two, three,", stream=stream, **ask, **more)
    for door in (chat, text):

        def last(**more):
            answer = door(**more)
            choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
            return choices[-1].finish_reason, choices[-1].stop_reason

        extra = {"return_token_ids": True}
        whole = client.chat.completions.create if door is chat else client.completions.create
        prompt = {"messages": HELLO} if door is chat else {"prompt": "One, two, three,"}
        ids = whole(**prompt, **ask, extra_body=extra).choices[0].token_ids
        stop = client.post("/../detokenize", body={"tokens": ids[4:6]}, cast_to=object)["prompt"]
        assert last(stop=[stop, "wibble"]) == ("stop", stop)
        assert last(extra_body={"stop_token_ids": [ids[5]]}) == ("stop", ids[5])
        assert last(extra_body={"ignore_eos": True}) == ("length", None)
