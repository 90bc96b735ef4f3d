"""Clients that agents are written with. They stay on this machine, and try nothing twice."""

import asyncio
import json
import os
import urllib.request

import pytest

# read when they are imported: no price list is fetched, no traces are sent
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
os.environ["LANGSMITH_TRACING"] = "false"


@pytest.fixture(scope="session")
def base_url(cluster) -> str:
    """Of OpenAI's doors."""
    return cluster["url"] + "/v1"


@pytest.fixture(scope="session")
def braces(cluster) -> list[int]:
    """With these tokens only, a JSON object is `{}`: a small model does not know what it is asked for, and need not end."""

    def token(text: str) -> int:
        body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
        request = urllib.request.Request(cluster["url"] + "/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            (one,) = json.load(answer)["tokens"]
        return one

    return [token("{"), token("}"), token("<|im_end|>")]


@pytest.fixture(scope="session")
def later():
    """Runs coroutines in one loop: some clients keep connections for all their users."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    # what clients left running in it ends here, as with asyncio.run: left to the interpreter's end, litellm's crashes it
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
