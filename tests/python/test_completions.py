"""Text completions through the official client."""

import pytest

PROMPT = "The capital of France is"
# the same, as the model's ids (tests/golden/logits.json)
IDS = [504, 3575, 282, 4649, 314]
# and what follows, greedily
NEXT = " Paris."


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT], IDS, [IDS]], ids=["text", "texts", "ids", "lists of ids"])
def test_every_form_of_a_prompt(client, model, prompt):
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=2, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == NEXT
    assert answer.usage.prompt_tokens == len(IDS)
    assert answer.usage.completion_tokens == 2


def test_many_prompts(client, model):
    prompts = [PROMPT, "def fibonacci(n):\n    ", PROMPT]
    answer = client.completions.create(model=model, prompt=prompts, max_tokens=6, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] == texts[4] == texts[5]
    assert texts[2] == texts[3] != texts[0]
    assert answer.usage.completion_tokens == 36


def test_a_stream(client, model):
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    stream = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:n])) for n in range(5)]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert logprob == max(top.values()) == top[token]


def test_echo(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=2, temperature=0, echo=True)
    assert answer.choices[0].text == PROMPT + NEXT
    assert answer.usage.completion_tokens == 2


def test_echo_with_logprobs(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=2, temperature=0, echo=True, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == PROMPT + NEXT
    assert len(logprobs.tokens) == len(IDS) + 2
    assert logprobs.token_logprobs[0] is None, "nothing comes before the first token"
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    # asked the long way round: what the model says after the first four tokens about the fifth
    shorter = client.completions.create(model=model, prompt=IDS[:4], max_tokens=1, temperature=0, logprobs=5)
    assert shorter.choices[0].text == logprobs.tokens[4], "\" is\", as most would say"
    assert shorter.choices[0].logprobs.token_logprobs[0] == logprobs.token_logprobs[4]


def test_echo_says_the_same_whatever_is_cached(client, model):
    ask = dict(model=model, prompt="A dog ran over the hill and " * 20, max_tokens=3, temperature=0, echo=True, logprobs=1)
    first = client.completions.create(**ask).choices[0]
    again = client.completions.create(**ask).choices[0]
    assert first == again


def test_a_cache_salt_sets_prompts_apart(client, model):
    def cached(salt):
        ask = dict(model=model, prompt="Salt and pepper stand on the table. " * 20, max_tokens=1, temperature=0)
        answer = client.completions.create(**ask, extra_body={"cache_salt": salt} if salt else None)
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens

    text, _ = cached(None)
    assert cached(None)[1] > 0
    assert cached("anna") == (text, 0), "what others sent is not hers"
    assert cached("anna")[1] > 0
    assert cached("bert") == (text, 0)


def test_stop_across_tokens(client, model):
    ask = dict(model=model, prompt="def fibonacci(n):\n    ", max_tokens=40, temperature=0)
    free = client.completions.create(**ask, logprobs=0).choices[0]
    # Which text it is depends on the CPU's instructions: the first token is nearly a tie.
    word = "".join(free.logprobs.tokens[20:23])
    assert word in free.text
    cut = client.completions.create(**ask, stop=word).choices[0]
    assert cut.text == free.text[: free.text.index(word)]
    assert cut.finish_reason == "stop"


def test_unicode_is_whole_in_every_chunk(client, model):
    ask = dict(model=model, prompt="Translate to Japanese, Korean and Russian, with emoji 🌊:", max_tokens=60,
               temperature=1.3, seed=3, extra_body={"ignore_eos": True})
    whole = client.completions.create(**ask).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)]
    assert "".join(pieces) == whole


def test_a_seed_gives_the_same_text_again(client, model):
    ask = dict(model=model, prompt=PROMPT, max_tokens=20, temperature=1.0, n=2)
    first = [choice.text for choice in client.completions.create(**ask, seed=99).choices]
    again = [choice.text for choice in client.completions.create(**ask, seed=99).choices]
    assert first == again
    assert first[0] != first[1], "the choices of one request differ"
