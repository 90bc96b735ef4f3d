#!/usr/bin/env python3
"""The official OpenAI client with Baton: a streamed chat, then log-probabilities of one token.

    pip install openai
    examples/client.py [QUESTION]        with the address in BATON_URL (default http://127.0.0.1:8000)
"""

import math
import os
import sys

from openai import OpenAI

QUESTION = " ".join(sys.argv[1:]) or "Name three primary colours."

client = OpenAI(base_url=os.environ.get("BATON_URL", "http://127.0.0.1:8000") + "/v1", api_key="unused")
model = client.models.list().data[0].id
messages = [{"role": "user", "content": QUESTION}]

print(f"{model}: ", end="")
stream = client.chat.completions.create(
    model=model, messages=messages, stream=True, max_tokens=100, stream_options={"include_usage": True}
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n({chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out)")

answer = client.chat.completions.create(model=model, messages=messages, max_tokens=1, logprobs=True, top_logprobs=5)
print("it could have begun with:")
for candidate in answer.choices[0].logprobs.content[0].top_logprobs:
    print(f"  {candidate.token!r:<16} {math.exp(candidate.logprob):6.1%}")
