"""The screenshots of README and docs, from a cluster that has something to do: BATON_WRITE_PICTURES=1 writes them."""

import itertools
import os
import random
import threading

import pytest
from clusters import REPOSITORY
from on_page import ask, end, hold_answers, last_answer, say, set_field, tab_to, worker
from playwright.sync_api import expect

pytestmark = pytest.mark.skipif(not os.environ.get("BATON_WRITE_PICTURES"), reason="BATON_WRITE_PICTURES=1 writes the pictures of the docs")

# For how long the lines of the load go back, about, and how often that asks for something.
LOADED_S = 100

TOPICS = ["rivers of Europe", "how bread is baked", "the planets", "a walk in the woods", "old maps", "trains at night", "the colour of the sea", "bees"]


def keep(page, name):
    page.screenshot(path=REPOSITORY / "docs/pictures" / f"{name}.png", animations="disabled")


@pytest.fixture
def busy(cluster, client, model, model_dir):
    """Two context and two decode workers, and people who ask them this and that."""
    stop, failures, chance = threading.Event(), [], random.Random(5)

    def person(number):
        messages = []
        for turn in itertools.count():
            # What a person has said before comes again, so that some is cached; and now and then somebody brings a long text.
            if turn % 4 == 0:
                text = " ".join(f"{chance.randrange(10**6)}" for _ in range(chance.choice([20, 60, 120])))
                messages = [{"role": "user", "content": f"Tell me about {TOPICS[number % len(TOPICS)]}, and of {text}"}]
            if stop.wait(chance.expovariate(0.7)):
                return
            try:
                answer = client.chat.completions.create(model=model, messages=messages, max_tokens=chance.randrange(16, 160))
            except Exception as error:
                failures.append(error)
                return
            messages = [*messages, {"role": "assistant", "content": answer.choices[0].message.content}, {"role": "user", "content": "Go on."}]

    with worker(cluster, model_dir, "context-1", "context"), worker(cluster, model_dir, "decode-1", "decode"):
        people = [threading.Thread(target=person, args=(number,)) for number in range(6)]
        for it in people:
            it.start()
        yield
        stop.set()
        for it in people:
            it.join()
    assert failures == []


def test_the_cluster_and_its_load_at_work(open_page, busy):
    load, cluster = open_page("load"), open_page("cluster")
    expect(cluster.get_by_label("context-1: serving")).to_be_visible()
    expect(cluster.get_by_label("decode-1: serving")).to_be_visible()
    # The lines grow, reading by reading.
    for _ in range(LOADED_S):
        with load.expect_response("**/metrics"):
            pass
    cluster.set_viewport_size({"width": 1200, "height": 1000})
    # Something runs and something is pulled.
    expect(cluster.locator(".flow svg .link.is-busy").nth(1)).to_be_visible()
    keep(cluster, "cluster")
    load.set_viewport_size({"width": 1200, "height": 780})
    keep(load, "load")


def test_a_chat_with_a_tool(open_page):
    page = open_page()
    hold_answers(page)
    for title, text in [("A haiku about rivers", "Slow water, old stones,"), ("Explain KV caches to a child", "Imagine that you read a story aloud")]:
        ask(page, title)
        say(page, content=text)
        end(page)
        expect(page.get_by_role("button", name="Stop")).to_have_count(0)
        page.get_by_role("button", name="New conversation").click()
    set_field(page, "Tools, as OpenAI's JSON list", '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]')
    page.get_by_role("button", name="Settings").click()
    ask(page, "Shall I cycle from Paris to Chartres tomorrow?")
    say(page, reasoning_content="The weather decides: I ask for it.")
    say(page, tool_calls=[{"index": 0, "id": "c", "function": {"name": "weather", "arguments": '{"city": "Chartres", "day": "tomorrow"}'}}])
    end(page)
    page.get_by_label("Its result").fill('{"sky": "clear", "wind_km_h": 12, "from": "east"}')
    page.get_by_role("button", name="Give result").click()
    say(page, content="Yes: it will be **clear**, with the wind behind you.\n\n| part | km | road |\n|---|---|---|\n| Paris to Rambouillet | 52 | quiet, *some hills* |\n| Rambouillet to Chartres | 41 | flat |\n\nTake `2 bottles` of water, and start before 9.")
    end(page)
    expect(last_answer(page).locator("table")).to_be_visible()
    tab_to(page, page.get_by_label("Message", exact=True))
    page.set_viewport_size({"width": 1200, "height": 940})
    keep(page, "chat")
