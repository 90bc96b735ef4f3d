"""The load: lines of the last minutes, and what looking at them costs."""

import re

from on_page import LONG, api_server, asking
from playwright.sync_api import expect


def load(client, model):
    """Requests one after the other, that share the beginning of their prompts."""

    def ask(_):
        messages = [{"role": "user", "content": LONG}]
        client.chat.completions.create(model=model, messages=messages, max_tokens=24, extra_body={"ignore_eos": True})

    return asking(ask)


def test_load_is_drawn(open_page, client, model, complaints):
    page = open_page("load")
    titles = ["Tokens", "Requests", "First token", "Between tokens", "Hand-over", "Pull of KV", "Prompt tokens from cache", "Service level met", "Errors and retries"]
    expect(page.locator(".chart strong")).to_have_text(titles)
    with load(client, model):
        # Each line has a number: nothing that is drawn is without a value, however it is called on the server.
        lines = page.locator(".chart .legend > span")
        expect(lines).to_have_text([re.compile(r"\D [0-9.]+k?$")] * 15)
        expect(page.locator(".chart path.line").first).to_have_attribute("d", re.compile("L"))
        for title in titles[:6]:
            expect(page.locator(".chart", has_text=title).first.locator("svg")).to_have_attribute("aria-label", re.compile("[0-9]"))
        expect(page.locator(".chart", has_text="Service level met").locator(".legend")).to_have_text("met 100")
        # There are no halves of requests.
        ticks = page.locator(".chart", has_text="in flight").locator(".grid text").all_text_contents()
        assert len(ticks) >= 2 and all(tick.isdecimal() for tick in ticks), ticks
    assert complaints == []


def test_where_nothing_is_promised_the_chart_says_so(open_page, cluster, model_dir, tmp_path, complaints):
    with api_server(cluster, model_dir, tmp_path) as url:
        page = open_page("load", url=url)
        chart = page.locator(".chart", has_text="Service level met")
        expect(chart.locator(".nothing")).to_have_text("no level promised (the API server's --ttft-ms, --itl-ms)")
        expect(chart.locator("svg")).to_have_attribute("aria-label", re.compile("no level promised"))
        expect(chart.locator(".grid")).to_have_count(0)
    # The cluster's own server promises a first token.
    page = open_page("load")
    with page.expect_response("**/cluster"):
        page.reload()
    chart = page.locator(".chart", has_text="Service level met")
    expect(chart.locator("svg")).not_to_have_attribute("aria-label", re.compile("no level promised"))
    assert complaints == []


def test_the_last_minutes_are_there_for_who_comes_later(open_page, client, model, complaints):
    page = open_page("chat")
    with load(client, model):
        for _ in range(3):
            with page.expect_response("**/metrics"):
                pass
        # From now on the server says nothing more of its load.
        page.route("**/metrics", lambda route: None)
        page.get_by_role("link", name="Load").click()
        expect(page.locator(".chart").first.locator("path.line").first).to_have_attribute("d", re.compile("L"))
        expect(page.locator(".chart").first.locator(".legend")).to_contain_text(re.compile("output [1-9]"))
    page.unroute_all(behavior="ignoreErrors")
    assert complaints == []


def test_who_does_not_look_asks_for_little_and_in_the_end_for_nothing(open_page, complaints):
    page = open_page("load")
    page.clock.install()
    page.reload()
    asked = []
    page.on("request", lambda request: asked.append(request.url))

    def hide(is_hidden):
        page.evaluate("hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); document.dispatchEvent(new Event('visibilitychange')); }", is_hidden)

    def asks(path, ahead):
        """Whether it is asked for when so much time has passed."""
        with page.expect_response(f"**{path}"):
            page.clock.fast_forward(ahead)

    asks("/metrics", "00:02")
    # In another view less often.
    page.get_by_role("link", name="Cluster").click()
    expect(page.locator(".worker").first).to_be_visible()
    asks("/metrics", "00:06")
    asks("/cluster", "00:02")
    # What is hidden has no use for the cluster, and keeps the last minutes of the load.
    hide(True)
    asks("/metrics", "00:06")
    page.clock.fast_forward("00:02")
    page.wait_for_load_state("networkidle")
    asked.clear()
    asks("/metrics", "00:06")
    assert not any(url.endswith("/cluster") for url in asked), asked
    # For five minutes.
    page.clock.fast_forward("06:00")
    page.wait_for_load_state("networkidle")
    asked.clear()
    for _ in range(5):
        page.clock.fast_forward("00:20")
        page.evaluate("fetch('/live')")
    assert [url for url in asked if not url.endswith("/live")] == []
    # Whoever looks again is answered at once.
    with page.expect_response("**/metrics"), page.expect_response("**/cluster"):
        hide(False)
    assert complaints == []
