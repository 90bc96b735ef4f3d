"""Chat completions through the official client."""

import pytest

HELLO = [{"role": "user", "content": "What is the capital of France?"}]


def test_models(client, model):
    models = client.models.list().data
    assert [entry.id for entry in models] == [model]
    assert models[0].object == "model"
    assert client.models.retrieve(model).id == model


def test_an_answer(client, model):
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=24, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == model
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 20, "the template adds a system prompt"
    assert 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_it_stops_by_itself(client, model):
    messages = [{"role": "user", "content": "Say hello."}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=400, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.choices[0].message.content


def test_max_completion_tokens(client, model):
    answer = client.chat.completions.create(model=model, messages=HELLO, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_content_in_parts(client, model):
    parts = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    ask = lambda messages: client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    assert ask(parts).choices[0].message.content == ask(HELLO).choices[0].message.content


def test_a_system_prompt_matters(client, model):
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    with_it = client.chat.completions.create(model=model, messages=system, max_tokens=1)
    without = client.chat.completions.create(model=model, messages=HELLO, max_tokens=1)
    assert with_it.usage.prompt_tokens != without.usage.prompt_tokens


def test_control_tokens_in_a_message_are_text(client, model):
    def tokens(content):
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(model=model, messages=messages, max_tokens=1).usage.prompt_tokens

    assert tokens("x<|im_end|>x") > tokens("x x") + 3, "one control token would be one token"


def test_a_stream(client, model):
    whole = client.chat.completions.create(model=model, messages=HELLO, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert chunks[0].choices[0].delta.role == "assistant", "the role comes first"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert all(chunk.usage is None for chunk in chunks)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert reasons[:-1] == [None] * (len(reasons) - 1), "one finish_reason, in the last chunk of the choice"
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 8, "tokens come one by one, not all at the end"


def test_a_stream_without_usage(client, model):
    stream = client.chat.completions.create(model=model, messages=HELLO, max_tokens=4, stream=True)
    for chunk in stream:
        assert chunk.choices
        assert chunk.usage is None


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, model, stream):
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=4, stream=stream
    )
    if stream:
        content, text = [], ""
        for chunk in answer:
            choice = chunk.choices[0]
            text += choice.delta.content or ""
            content += choice.logprobs.content if choice.logprobs else []
    else:
        content, text = answer.choices[0].logprobs.content, answer.choices[0].message.content
    assert len(content) == 6
    assert b"".join(bytes(token.bytes) for token in content).decode() == text
    for token in content:
        assert token.logprob <= 0
        tops = token.top_logprobs
        assert len(tops) == 4
        assert tops[0].token == token.token, "greedy takes the most likely"
        assert tops[0].logprob == token.logprob
        assert [top.logprob for top in tops] == sorted((top.logprob for top in tops), reverse=True)


def test_no_logprobs_unless_asked_for(client, model):
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=2)
    assert answer.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_n(client, model, stream):
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=12, n=3, temperature=1.2, seed=5, stream=stream
    )
    if stream:
        texts, finished = {}, {}
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                if choice.finish_reason:
                    assert choice.index not in finished
                    finished[choice.index] = choice.finish_reason
        assert sorted(finished) == [0, 1, 2]
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = {choice.index: choice.message.content for choice in answer.choices}
        assert answer.usage.completion_tokens <= 36
    assert len(set(texts.values())) > 1, "the choices of one request differ"


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, model, stream):
    ask = dict(model=model, messages=HELLO, max_tokens=40, temperature=0)
    free = client.chat.completions.create(**ask).choices[0].message.content
    # a stop string in the middle of the text, across token borders
    word = free[8:14]
    expected = free[: free.index(word)]
    answer = client.chat.completions.create(**ask, stop=[word, "never said"], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == expected, "nothing of the stop string or after it is sent"
    assert reason == "stop"


def test_a_seed_gives_the_same_text_again(client, model):
    def ask(seed):
        answer = client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=20, temperature=1.0, seed=seed, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].message.content

    first = ask(1234)
    assert ask(1234) == first
    assert any(ask(seed) != first for seed in (1, 2, 3))


def test_temperature_without_a_seed_varies(client, model):
    ask = lambda: client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=20, temperature=1.5, extra_body={"ignore_eos": True}
    )
    assert len({ask().choices[0].message.content for _ in range(4)}) > 1


def test_logit_bias(client, model):
    # 100 is "take this one" in OpenAI's words; "hello" is some token of the model's
    token = 28120
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=4, temperature=0, logit_bias={str(token): 100}, logprobs=True
    )
    assert len({entry.token for entry in answer.choices[0].logprobs.content}) == 1


def test_extra_sampling_parameters(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=HELLO,
        max_tokens=30,
        temperature=1.0,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        extra_body={"top_k": 1, "min_p": 0.05, "ignore_eos": True, "min_tokens": 30},
    )
    assert answer.usage.completion_tokens == 30


def test_min_tokens(client, model):
    messages = [{"role": "user", "content": "Say hello."}]
    free = client.chat.completions.create(model=model, messages=messages, max_tokens=200, temperature=0)
    assert free.choices[0].finish_reason == "stop"
    more = free.usage.completion_tokens + 10
    longer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=more + 5, temperature=0, extra_body={"min_tokens": more}
    )
    assert longer.usage.completion_tokens >= more
