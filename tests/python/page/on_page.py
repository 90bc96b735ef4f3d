"""What people do on the page, and how its tests see what comes of it."""

import itertools
import json
import re
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from clusters import baton
from playwright.sync_api import expect

LONG = "Count from one to one hundred, in words."
KEY = "0123456789abcdef0123"


def ask(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    # Until the page knows its model, Enter does nothing, as the button says.
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    page.keyboard.press("Enter")


def last_answer(page):
    return page.locator("article.of-assistant").last


def stop_button(page):
    return page.get_by_role("button", name="Stop", exact=True)


def wait_for_end(page):
    expect(stop_button(page)).to_have_count(0)


def wait_for_more_text(page) -> int:
    """Until the last answer has more text than now, while it can still be stopped. How much it has then."""
    expect(stop_button(page)).to_be_visible()
    return page.evaluate(
        """async () => {
          const read = () => [...document.querySelectorAll("article.of-assistant .markdown")].at(-1)?.innerText.length ?? 0;
          const before = read();
          for (;;) {
            const stop = [...document.querySelectorAll(".ask button")].some((it) => it.innerText === "Stop");
            if (!stop) throw new Error(`the answer ended with ${read()} characters`);
            if (read() > before) return read();
            await new Promise((after) => requestAnimationFrame(after));
          }
        }"""
    )


def open_settings(page):
    settings = page.get_by_role("button", name="Settings")
    if settings.get_attribute("aria-expanded") != "true":
        settings.click()


def set_field(page, label, value):
    open_settings(page)
    field = page.get_by_label(label, exact=True)
    if field.evaluate("it => it.tagName") == "SELECT":
        field.select_option(value)
    else:
        field.fill(value)


def tab_to(page, locator, back=False):
    """By keyboard, as people without a mouse go there."""
    for _ in range(60):
        if locator.evaluate("it => it === document.activeElement"):
            return
        page.keyboard.press("Shift+Tab" if back else "Tab")
    raise AssertionError(f"the Tab key does not reach {locator}")


def give_key(page, key=KEY):
    page.get_by_role("button", name="API key").click()
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use it").click()


def in_flight(cluster) -> int:
    with urllib.request.urlopen(cluster["url"] + "/health", timeout=10) as answer:
        return json.load(answer)["in_flight"]


def wait_until_nothing_runs(cluster):
    deadline = time.monotonic() + 60
    while in_flight(cluster) > 0:
        assert time.monotonic() < deadline, "a request goes on"
        time.sleep(0.05)


def answer_at_length(page):
    """The model's answers have as many tokens as they may: a sampled one can end before it is stopped."""

    def ask(route):
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

    page.route("**/v1/chat/completions", ask)
    set_field(page, "Most tokens", "2000")


def hold_answers(page):
    """From the next visit on answers come from `say` and end with `end`, not from a model."""
    page.add_init_script(
        """
        const fetched = window.fetch;
        const held = [];
        window.fetch = (path, init) => {
          if (!String(path).includes("/v1/chat/completions")) return fetched(path, init);
          const body = new ReadableStream({
            start(stream) {
              held.push(stream);
              init.signal.addEventListener("abort", () => stream.error(init.signal.reason));
            },
          });
          return Promise.resolve(new Response(body, { headers: { "Content-Type": "text/event-stream" } }));
        };
        const write = (stream, choice) =>
          stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify({ choices: [{ index: 0, ...choice }] })}\\n\\n`));
        window.say = (delta, answer = held.length - 1) => write(held[answer], { delta });
        window.end = (answer = held.length - 1) => {
          write(held[answer], { delta: {}, finish_reason: "stop" });
          held[answer].close();
        };
        window.asked = () => held.length;
        """
    )
    page.reload()


def say(page, answer=None, **delta):
    """The answer that was asked for last, or the one of this number, goes on."""
    page.wait_for_function("number => window.asked() > number", arg=answer or 0)
    page.evaluate("([delta, answer]) => window.say(delta, answer ?? undefined)", [delta, answer])


def end(page, answer=None):
    page.evaluate("answer => window.end(answer ?? undefined)", answer)


@contextmanager
def asking(ask):
    """Calls ask(1), ask(2), … one after the other on a thread of its own meanwhile; what one of them fails with fails the test."""
    stop, failures = threading.Event(), []

    def go_on():
        for number in itertools.count(1):
            if stop.is_set():
                return
            try:
                ask(number)
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


@contextmanager
def worker(cluster, model_dir, name, role="decode", *more):
    """Another worker beside the cluster's."""
    command = [baton(), "worker", "--role", role, "--model", model_dir, "--worker-name", name, "--kv-mib", "96"]
    if "--threads" not in more:
        command += ["--threads", "1"]
    process = subprocess.Popen([*command, "--request-plane-uri", cluster["request_plane_uri"], *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)


@contextmanager
def api_server(cluster, model_dir, directory, *more):
    """Another API server of the cluster; brings its address."""
    log_file = directory / "api-server.log"
    command = [baton(), "api-server", "--tokenizer", model_dir, "--model-name", cluster["model"], "--api-server-port", "0"]
    with open(log_file, "wb") as log:
        server = subprocess.Popen([*command, "--request-plane-uri", cluster["request_plane_uri"], *more], stdout=log, stderr=subprocess.STDOUT)
    try:
        yield address(server, log_file)
    finally:
        server.kill()
        server.wait(60)


def keys_file(directory) -> Path:
    keys = directory / "keys"
    keys.write_text(f"somebody {KEY}\n")
    keys.chmod(0o600)
    return keys


def address(server, log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"serving.*address=([0-9.]+:[0-9]+)", log.read_text(errors="replace"))
        if found:
            return f"http://{found.group(1)}"
        time.sleep(0.05)
    raise AssertionError(log.read_text(errors="replace"))
