"""The chat: what is asked, what comes, and what is kept of it."""

import json
import subprocess

import pytest
from on_page import LONG, answer_at_length, ask, end, hold_answers, last_answer, say, set_field, stop_button, wait_for_end, wait_for_more_text, wait_until_nothing_runs
from playwright.sync_api import expect

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"], "additionalProperties": False},
    },
}


def titles(page):
    return page.locator(".conversations li button:first-child")


def test_an_answer_says_what_it_cost_and_is_kept(open_page, complaints, axe):
    page = open_page()
    expect(page.get_by_text("Ask")).to_be_visible()
    set_field(page, "Temperature", "0")
    set_field(page, "Most tokens", "64")
    page.get_by_role("button", name="Settings").click()
    ask(page, "What is the capital of France?")
    expect(last_answer(page).locator(".markdown")).to_contain_text("Paris")
    wait_for_end(page)
    expect(last_answer(page).locator("footer")).to_contain_text("output tokens")
    assert axe(page) == []
    # Kept in the browser, and had again.
    page.reload()
    expect(last_answer(page).locator(".markdown")).to_contain_text("Paris")
    # A second turn; then a new conversation beside it.
    ask(page, "And of Italy?")
    expect(page.locator("article.of-assistant")).to_have_count(2)
    wait_for_end(page)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    page.locator(".conversations").get_by_role("button", name="What is the capital of France?", exact=True).click()
    expect(page.locator("article")).to_have_count(4)
    assert complaints == []


def test_the_first_screen_says_what_the_model_takes_and_what_to_ask(open_page, model, complaints, axe):
    page = open_page()
    welcome = page.locator(".empty")
    expect(welcome).to_contain_text(model)
    # A CPU's small model, whose template shows it no tools.
    expect(welcome.locator(".note")).to_have_text("2,048 tokens for question and answer · calls tools only where tool_choice says so")
    examples = page.get_by_role("list", name="Example questions").get_by_role("button")
    expect(examples).to_have_count(4)
    assert axe(page) == []
    set_field(page, "Temperature", "0")
    set_field(page, "Most tokens", "48")
    page.get_by_role("button", name="Settings").click()
    # By keyboard too.
    question = examples.first.text_content()
    examples.first.press("Enter")
    expect(page.locator("article.of-user")).to_contain_text(question)
    expect(page.get_by_role("list", name="Example questions")).to_have_count(0)
    wait_for_end(page)
    expect(last_answer(page).locator(".markdown")).to_contain_text("Paris")
    # A new conversation begins with them again.
    page.get_by_role("button", name="New conversation").click()
    expect(examples).to_have_count(4)
    assert complaints == []


def test_it_streams_and_stops_when_told(open_page, cluster, complaints):
    page = open_page()
    answer_at_length(page)
    ask(page, LONG)
    assert wait_for_more_text(page) < wait_for_more_text(page)
    stop_button(page).click()
    expect(last_answer(page).locator("footer")).to_contain_text("stopped")
    # Not only the page has stopped: nothing runs any more.
    wait_until_nothing_runs(cluster)
    assert complaints == []


def test_other_conversations_are_had_while_an_answer_streams(open_page, complaints):
    page = open_page()
    hold_answers(page)
    ask(page, "First question")
    say(page, content="One")
    expect(last_answer(page)).to_contain_text("One")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    # What comes then goes where it belongs, and leads nobody back.
    say(page, content=", two")
    ask(page, "Second question")
    say(page, 1, content="Uno")
    expect(last_answer(page)).to_contain_text("Uno")
    say(page, 0, content=", three")
    end(page, 0)
    end(page, 1)
    expect(stop_button(page)).to_have_count(0)
    expect(titles(page)).to_have_text(["Second question", "First question"])
    expect(page.locator("article.of-user")).to_have_text(["YouSecond question"])
    page.get_by_role("button", name="First question", exact=True).click()
    expect(last_answer(page).locator(".markdown")).to_have_text("One, two, three")
    expect(stop_button(page)).to_have_count(0)
    assert complaints == []


def test_a_conversation_that_is_deleted_while_its_answer_streams_stays_away(open_page, cluster, complaints):
    page = open_page()
    answer_at_length(page)
    ask(page, LONG)
    wait_for_more_text(page)
    page.get_by_role("button", name=f"Delete {LONG}").click()
    expect(titles(page)).to_have_count(0)
    wait_until_nothing_runs(cluster)
    expect(titles(page)).to_have_count(0)
    page.reload()
    expect(page.get_by_text("Ask")).to_be_visible()
    expect(titles(page)).to_have_count(0)
    assert complaints == []


def test_settings_that_are_changed_while_an_answer_streams_stay(open_page, complaints):
    page = open_page()
    hold_answers(page)
    ask(page, "A question")
    say(page, content="An")
    expect(last_answer(page)).to_contain_text("An")
    set_field(page, "Seed", "7")
    say(page, content=" answer")
    expect(last_answer(page)).to_contain_text("An answer")
    end(page)
    wait_for_end(page)
    expect(page.get_by_label("Seed")).to_have_value("7")
    page.reload()
    set_field(page, "Temperature", "1")
    expect(page.get_by_label("Seed")).to_have_value("7")
    assert complaints == []


def test_an_answer_goes_on_behind_other_views_and_dialogs(open_page, complaints):
    page = open_page()
    hold_answers(page)
    ask(page, "A question")
    say(page, content="One")
    expect(last_answer(page)).to_contain_text("One")
    page.get_by_label("Message", exact=True).fill("a draft")
    page.get_by_role("link", name="Cluster").click()
    expect(page.locator(".worker").first).to_be_visible()
    say(page, content=", two")
    page.get_by_role("link", name="Load").click()
    say(page, content=", three")
    page.get_by_role("link", name="Chat").click()
    expect(last_answer(page).locator(".markdown")).to_have_text("One, two, three")
    expect(stop_button(page)).to_be_visible()
    expect(page.get_by_label("Message", exact=True)).to_have_value("a draft")
    page.get_by_role("button", name="API key").click()
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    expect(stop_button(page)).to_be_visible()
    say(page, content=", four")
    end(page)
    expect(last_answer(page).locator(".markdown")).to_have_text("One, two, three, four")
    assert complaints == []


def test_who_loads_the_page_anew_finds_the_question_and_what_had_come(open_page, complaints):
    page = open_page()
    hold_answers(page)
    ask(page, "A question")
    say(page, content="Half an")
    expect(last_answer(page).locator(".markdown")).to_have_text("Half an")
    page.reload()
    expect(page.locator("article.of-user")).to_contain_text("A question")
    expect(last_answer(page).locator(".markdown")).to_have_text("Half an")
    expect(last_answer(page).locator("footer")).to_contain_text("unfinished")
    page.get_by_role("button", name="Again").click()
    say(page, content="A whole one")
    end(page)
    expect(last_answer(page).locator(".markdown")).to_have_text("A whole one")
    assert complaints == []


def test_two_tabs_keep_each_others_conversations(open_page, complaints):
    one = open_page()
    hold_answers(one)
    two = one.context.new_page()
    two.goto(one.url)
    hold_answers(two)
    ask(one, "Of the first tab")
    say(one, content="One")
    ask(two, "Of the second tab")
    say(two, content="Two")
    end(two)
    end(one)
    for page in (one, two):
        expect(titles(page)).to_have_text(["Of the second tab", "Of the first tab"])
    # Neither was led away from its own.
    expect(last_answer(one)).to_contain_text("One")
    expect(last_answer(two)).to_contain_text("Two")
    one.reload()
    expect(titles(one)).to_have_count(2)
    two.get_by_role("button", name="Delete Of the first tab").click()
    expect(titles(one)).to_have_text(["Of the second tab"])
    assert complaints == []


def test_reasoning_is_shown_until_the_answer_begins(open_page, complaints, axe):
    page = open_page()
    hold_answers(page)
    ask(page, "Why?")
    say(page, reasoning_content="Because of **this**.")
    reasoning = last_answer(page).locator("details.reasoning")
    expect(reasoning.locator(".plain")).to_have_text("Because of **this**.")
    expect(reasoning.locator(".plain")).to_be_visible()
    assert axe(page) == []
    say(page, content="So.")
    expect(last_answer(page).locator(".markdown")).to_have_text("So.")
    expect(reasoning.locator(".plain")).to_be_hidden()
    end(page)
    reasoning.locator("summary").click()
    expect(reasoning.locator(".plain")).to_be_visible()
    assert complaints == []


def test_a_schema_is_kept_to_and_wrong_settings_are_named(open_page, complaints):
    page = open_page()
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
    set_field(page, "JSON schema of the answer", "{")
    expect(page.locator("#set-schema-wrong")).to_contain_text("no JSON")
    set_field(page, "JSON schema of the answer", json.dumps(schema))
    expect(page.locator("#set-schema-wrong")).to_have_count(0)
    ask(page, "The capital of France, as JSON.")
    wait_for_end(page)
    answer = last_answer(page).locator(".markdown").inner_text()
    assert json.loads(answer)["city"] in ("Paris", "Rome")
    assert complaints == []


def test_a_tool_is_called_and_takes_a_result(open_page, complaints):
    page = open_page()
    called = {"id": "c1", "type": "function", "index": 0, "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    asked = []

    # The tests' model knows no tools: what a model says that does is written here.
    def answer(route):
        asked.append(route.request.post_data_json)
        calls = {"delta": {"tool_calls": [called]}, "finish_reason": "tool_calls"}
        says = {"delta": {"content": "It is **clear**."}, "finish_reason": "stop"}
        chunk = {"choices": [{"index": 0, **(calls if len(asked) == 1 else says)}]}
        route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    set_field(page, "Tools, as OpenAI's JSON list", json.dumps([TOOL]))
    set_field(page, "Tool choice", "weather")
    set_field(page, "Most tokens", "40")
    ask(page, "What is the weather in Paris?")
    expect(page.locator(".call code")).to_have_text("weather")
    page.get_by_label("Its result").fill('{"sky": "clear"}')
    page.get_by_role("button", name="Give result").click()
    expect(page.locator("article.of-tool")).to_contain_text("clear")
    expect(last_answer(page).locator("strong")).to_have_text("clear")
    first, second = asked
    assert first["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["tools"] == [TOOL]
    assert complaints == []


SAMPLING = {
    "Temperature": ("temperature", "0.5"),
    "Top p": ("top_p", "0.9"),
    "Top k": ("top_k", "40"),
    "Min p": ("min_p", "0.05"),
    "Presence penalty": ("presence_penalty", "0.5"),
    "Frequency penalty": ("frequency_penalty", "-0.5"),
    "Repetition penalty": ("repetition_penalty", "1.1"),
    "Most tokens": ("max_tokens", "8"),
    "Seed": ("seed", "3"),
}


@pytest.mark.parametrize("label", [label for label in SAMPLING if label not in ("Seed", "Most tokens")])
def test_what_the_server_would_refuse_is_named_beside_the_field(open_page, complaints, label):
    page = open_page()
    set_field(page, label, "-100")
    expect(page.get_by_label(label, exact=True)).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("button", name="As code")).to_be_disabled()
    assert complaints == []


def test_the_request_as_code_does_what_the_page_does(open_page, complaints, axe):
    page = open_page()
    for label, (_, value) in SAMPLING.items():
        set_field(page, label, value)
    set_field(page, "Reasoning effort", "low")
    page.get_by_label("Message", exact=True).fill("It's a test.")
    page.get_by_role("button", name="As code").click()
    code = page.locator("dialog pre").inner_text()
    for name, value in SAMPLING.values():
        assert f'"{name}": {value}' in code
    assert '"reasoning_effort": "low"' in code
    ran = subprocess.run(["sh", "-c", code], capture_output=True, text=True, timeout=60)
    assert "data: [DONE]" in ran.stdout, ran
    page.get_by_role("button", name="Python").click()
    ran = subprocess.run(["python", "-c", page.locator("dialog pre").inner_text()], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and ran.stdout, ran
    assert axe(page) == []
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    # And so does the page itself.
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Send").click()
    wait_for_end(page)
    expect(last_answer(page).locator("footer")).to_contain_text("output tokens")
    body = asked.value.post_data_json
    assert {name: body[name] for name, _ in SAMPLING.values()} == {name: float(value) for name, value in SAMPLING.values()}
    assert complaints == []
