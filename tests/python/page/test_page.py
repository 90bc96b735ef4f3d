"""The page at /: what people do with it, in a real browser against a real cluster."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from clusters import baton
from playwright.sync_api import expect

LONG = "Count from one to one hundred, in words."


def ask(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def last_answer(page):
    return page.locator("article.of-assistant").last


def wait_for_end(page):
    expect(page.get_by_role("button", name="Stop")).to_have_count(0)


def set_field(page, label, value):
    settings = page.get_by_role("button", name="Settings")
    if settings.get_attribute("aria-expanded") != "true":
        settings.click()
    page.get_by_label(label).fill(value)


def test_an_answer_streams_and_says_what_it_cost(open_page, complaints, picture, axe):
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
    picture(page, "chat")
    # Kept in the browser, and had again.
    page.reload()
    expect(last_answer(page).locator(".markdown")).to_contain_text("Paris")
    # A second turn; then a new conversation beside it.
    ask(page, "And of Italy?")
    expect(page.locator("article.of-assistant")).to_have_count(2)
    wait_for_end(page)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="What is the capital of France?", exact=True).click()
    expect(page.locator("article")).to_have_count(4)
    assert complaints == []


def test_it_stops_when_told(open_page, cluster, complaints):
    page = open_page()
    set_field(page, "Most tokens", "1500")
    ask(page, LONG)
    expect(last_answer(page).locator(".markdown")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(last_answer(page).locator("footer")).to_contain_text("stopped")
    # Not only the page has stopped: nothing runs any more.
    deadline = time.monotonic() + 30
    while in_flight(cluster) > 0:
        assert time.monotonic() < deadline, "the request goes on"
        time.sleep(0.05)
    assert complaints == []


def in_flight(cluster) -> int:
    with urllib.request.urlopen(cluster["url"] + "/health", timeout=10) as answer:
        return json.load(answer)["in_flight"]


def test_a_schema_is_kept_to_and_wrong_settings_are_named(open_page, complaints):
    page = open_page()
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
    set_field(page, "JSON schema", "{")
    expect(page.locator("#set-schema-wrong")).to_contain_text("no JSON")
    set_field(page, "JSON schema", json.dumps(schema))
    expect(page.locator("#set-schema-wrong")).to_have_count(0)
    ask(page, "The capital of France, as JSON.")
    wait_for_end(page)
    answer = last_answer(page).locator(".markdown").inner_text()
    assert json.loads(answer)["city"] in ("Paris", "Rome")
    assert complaints == []


def test_a_tool_is_called_and_takes_a_result(open_page, complaints):
    page = open_page()
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"], "additionalProperties": False},
        },
    }
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
    set_field(page, "Tools", json.dumps([tool]))
    set_field(page, "Most tokens", "40")
    ask(page, "What is the weather in Paris?")
    expect(page.locator(".call code")).to_have_text("weather")
    page.get_by_label("Its result").fill('{"sky": "clear"}')
    page.get_by_role("button", name="Give result").click()
    expect(page.locator("article.of-tool")).to_contain_text("clear")
    expect(last_answer(page).locator("strong")).to_have_text("clear")
    second = asked[1]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["tools"] == [tool]
    assert complaints == []


def test_the_request_as_code_does_what_the_page_does(open_page, cluster, complaints, axe):
    page = open_page()
    set_field(page, "Most tokens", "8")
    page.get_by_label("Message", exact=True).fill("It's a test.")
    page.get_by_role("button", name="As code").click()
    code = page.locator("dialog pre").inner_text()
    ran = subprocess.run(["sh", "-c", code], capture_output=True, text=True, timeout=60)
    assert "data: [DONE]" in ran.stdout, ran
    page.get_by_role("button", name="Python").click()
    ran = subprocess.run(["python", "-c", page.locator("dialog pre").inner_text()], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and ran.stdout, ran
    assert axe(page) == []
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    assert complaints == []


def test_the_keyboard_is_enough(open_page, complaints):
    page = open_page()
    expect(page.get_by_text("Ask")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="To the content")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Cluster")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".worker").first).to_be_visible()
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["chat", "cluster", "load"])
def test_no_serious_fault_in_any_view_wide_or_narrow(open_page, complaints, axe, view, scheme):
    page = open_page(view, color_scheme=scheme)
    expect(page.locator({"chat": ".talk", "cluster": ".worker", "load": ".chart"}[view]).first).to_be_visible()
    assert axe(page) == []
    page.set_viewport_size({"width": 360, "height": 640})
    assert axe(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "it is wider than a telephone"
    assert complaints == []


def test_the_cluster_shows_load_and_where_kv_goes(open_page, client, model, complaints, picture):
    page = open_page("cluster")
    expect(page.locator(".summary")).to_contain_text("serving")
    expect(page.locator(".worker")).to_have_count(2)
    expect(page.locator(".flow .link")).to_have_count(1)
    with client.chat.completions.create(model=model, messages=[{"role": "user", "content": LONG}], max_tokens=1200, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        decode = page.get_by_label("decode-0: serving")
        expect(decode.locator("dd").nth(1)).to_have_text("1")
        picture(page, "cluster")
    assert complaints == []


def test_load_is_drawn(open_page, client, model, complaints, picture):
    page = open_page("load")
    tokens = page.locator(".chart", has_text="Tokens").first
    for _ in range(4):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": LONG}], max_tokens=48)
    expect(tokens.locator("path.line").first).to_have_attribute("d", re.compile("L"))
    expect(page.locator(".chart", has_text="First token").locator(".legend")).to_contain_text("median")
    picture(page, "load")
    assert complaints == []


def test_a_worker_that_hangs_turns_red_and_the_next_green(open_page, ready_file):
    page = open_page("cluster")
    expect(page.get_by_label("decode-0: serving")).to_be_visible()
    pid = json.loads(ready_file.read_text())["pids"]["decode-0"]
    os.kill(pid, signal.SIGSTOP)
    try:
        expect(page.get_by_label("decode-0: gone")).to_be_visible()
        colour = page.get_by_label("decode-0: gone").evaluate("it => getComputedStyle(it).borderTopColor")
        assert colour == "rgb(189, 35, 48)"
        expect(page.locator(".flow .box.is-gone")).to_have_count(1)
    finally:
        os.kill(pid, signal.SIGKILL)
    # It is started again.
    expect(page.get_by_label("decode-0: serving")).to_be_visible()


def test_a_worker_that_drains_leaves(open_page, cluster, model_dir, complaints):
    page = open_page("cluster")
    expect(page.locator(".worker")).to_have_count(2)
    command = [baton(), "worker", "--role", "decode", "--model", model_dir, "--worker-name", "extra", "--threads", "1", "--kv-mib", "64"]
    extra = subprocess.Popen([*command, "--request-plane-uri", cluster["request_plane_uri"]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        expect(page.get_by_label("extra: serving")).to_be_visible()
        extra.send_signal(signal.SIGTERM)
        expect(page.locator(".worker")).to_have_count(2)
        assert extra.wait(60) == 0
    finally:
        extra.kill()
    assert complaints == []


def test_a_key_is_asked_for_and_stands_in_no_address(open_page, cluster, model_dir, tmp_path):
    keys, port_file = tmp_path / "keys", tmp_path / "log"
    keys.write_text("somebody 0123456789abcdef0123\n")
    keys.chmod(0o600)
    command = [baton(), "api-server", "--tokenizer", model_dir, "--model-name", cluster["model"], "--api-server-port", "0", "--request-plane-uri", cluster["request_plane_uri"], "--api-keys-file", keys]
    with open(port_file, "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = address(server, port_file)
        page = open_page("cluster", url=url)
        addresses = []
        page.on("request", lambda request: addresses.append(request.url))
        expect(page.locator(".fault")).to_contain_text("key")
        page.get_by_role("button", name="API key").click()
        page.get_by_label("Key", exact=True).fill("0123456789abcdef0123")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator(".worker").first).to_be_visible()
        assert not any("0123456789" in it for it in addresses)
    finally:
        server.kill()


def address(server, log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"serving.*address=([0-9.]+:[0-9]+)", log.read_text(errors="replace"))
        if found:
            return f"http://{found.group(1)}"
        time.sleep(0.05)
    raise AssertionError(log.read_text(errors="replace"))


def test_what_is_served_says_so(cluster):
    for path, kind in [("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")]:
        with urllib.request.urlopen(cluster["url"] + path, timeout=10) as answer:
            assert answer.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            tag = answer.headers["etag"]
        again = urllib.request.Request(cluster["url"] + path, headers={"If-None-Match": tag})
        with pytest.raises(urllib.error.HTTPError) as unchanged:
            urllib.request.urlopen(again, timeout=10)
        assert unchanged.value.code == 304
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(cluster["url"] + "/page/../secrets", timeout=10)
    assert missing.value.code == 404
