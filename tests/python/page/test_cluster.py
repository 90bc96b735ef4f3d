"""The cluster: who serves, what they hold, where KV goes, and what is seen of workers that die, hang and leave."""

import json
import os
import re
import signal
import urllib.error
import urllib.request

import pytest
from on_page import LONG, api_server, asking, give_key, keys_file, worker
from playwright.sync_api import expect

RED = "rgb(189, 35, 48)"

# Something goes over it: a rate that is not 0.
RATE = re.compile(r"(?<![0-9.])(?!0 )[0-9.]+ [kMG]B/s now")


def long_prompts(client, model):
    """Prompts of some 40 MB of KV one after the other, none of which has been seen before."""

    def ask(number):
        words = " ".join(f"{number * 7919 + place}" for place in range(300))
        client.completions.create(model=model, prompt=words, max_tokens=2, extra_body={"ignore_eos": True})

    return asking(ask)


def test_the_cluster_shows_what_its_workers_do(open_page, client, model, complaints):
    page = open_page("cluster")
    expect(page.locator(".summary")).to_contain_text("serving")
    expect(page.locator(".worker")).to_have_count(2)
    with client.chat.completions.create(model=model, messages=[{"role": "user", "content": LONG}], max_tokens=1200, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        decode = page.get_by_label("decode-0: serving")
        expect(decode.locator("dt")).to_have_text(["waiting", "running", "staged", "pulled"])
        expect(decode.locator("dd").nth(1)).to_have_text("1")
        expect(decode.locator(".pool")).to_have_attribute("aria-label", re.compile(r"KV blocks: [1-9]\d* used, \d+ cached, \d+ quarantined of [1-9]\d*"))
    expect(page.get_by_label("decode-0: serving").locator(".note").first).to_contain_text(re.compile("cpu.*, [a-z0-9]+$"))
    assert complaints == []


def test_each_number_of_a_worker_stands_in_its_place(open_page, complaints):
    page = open_page()

    def changed(route):
        answer = route.fetch()
        cluster = answer.json()
        for it in cluster["workers"]:
            it.update(device="a device", ranks=4, weights="fp8", reason=None)
            it["load"].update(waiting=3, running=5, leased=2, pulling=4, blocks_used=30, blocks_cached=20, blocks_quarantined=10)
            it["capacity"]["blocks"] = 100
        route.fulfill(response=answer, json=cluster)

    page.route("**/cluster", changed)
    page.get_by_role("link", name="Cluster").click()
    card = page.get_by_label("context-0: serving")
    expect(card.locator("dt")).to_have_text(["waiting", "running", "staged", "pulled"])
    expect(card.locator("dd")).to_have_text(["3", "5", "2", "4"])
    expect(card.locator(".note").first).to_have_text("a device, 4 ranks, fp8")
    expect(card.locator(".pool")).to_have_attribute("aria-label", "KV blocks: 30 used, 20 cached, 10 quarantined of 100")
    widths = card.locator(".pool span").evaluate_all("all => all.map((it) => it.style.width)")
    assert widths == ["30%", "20%", "10%"]
    expect(page.locator(".flow .box .small")).to_have_text(["5 run, 2 staged", "5 run, 4 pulled"])
    page.unroute_all(behavior="ignoreErrors")
    assert complaints == []


def test_a_long_prompt_makes_its_link_busy_with_a_rate(open_page, client, model, complaints):
    page = open_page("cluster")
    link = page.locator(".flow svg .link")
    expect(link).to_have_count(1)
    thin = link.locator("path").evaluate("it => getComputedStyle(it).strokeWidth")
    with long_prompts(client, model):
        expect(page.locator(".flow .rate")).to_have_text(RATE)
        expect(link).to_have_class("link is-busy")
        thick = link.locator("path").evaluate("it => getComputedStyle(it).strokeWidth")
        assert float(thick.removesuffix("px")) > float(thin.removesuffix("px")), (thin, thick)
        # How fast the link is stands beside it.
        expect(page.locator(".flow .rate")).to_contain_text(re.compile(r"link [0-9.]+ [kMG]B/s"))
    expect(link).to_have_class("link")
    expect(page.locator(".flow .rate")).to_contain_text("0 kB/s now")
    assert complaints == []


def test_on_a_narrow_screen_the_links_are_a_list(open_page, client, model, complaints, axe):
    page = open_page("cluster")
    expect(page.locator(".flow svg")).to_be_visible()
    page.set_viewport_size({"width": 360, "height": 640})
    expect(page.locator(".flow svg")).to_be_hidden()
    row = page.get_by_role("list", name="Links that KV takes").get_by_role("listitem")
    expect(row).to_contain_text("context-0 → decode-0")
    assert row.bounding_box()["width"] > 200
    with long_prompts(client, model):
        expect(row).to_have_text(RATE)
    assert axe(page) == []
    assert complaints == []


def test_a_worker_that_does_both_is_one_box(open_page, cluster, model_dir, tmp_path, complaints, axe):
    alone = "--cluster", "both"
    with worker(cluster, model_dir, "one", "both", *alone), worker(cluster, model_dir, "two", "both", *alone), api_server(cluster, model_dir, tmp_path, *alone) as url:
        page = open_page("cluster", url=url)
        expect(page.get_by_label("two: serving")).to_be_visible()
        expect(page.locator(".flow .box text:not(.small)")).to_have_text(["one", "two"])
        expect(page.locator(".flow .box .small").first).to_have_text("0 run, 0 staged, 0 pulled")
        expect(page.locator(".flow svg .link")).to_have_count(2)
        expect(page.locator(".flow svg .link.is-broken")).to_have_count(0)
        rows = page.get_by_role("list", name="Links that KV takes").get_by_role("listitem")
        expect(rows).to_contain_text(["two → one", "one → two"])
        # Each link's numbers are at its reader, and the two do not cross.
        one, two = (it.bounding_box() for it in page.locator(".flow .box rect").all())
        boxes = sorted((it.bounding_box() for it in page.locator(".flow .rate rect").all()), key=lambda box: box["x"])
        left, right = boxes
        assert one["x"] + one["width"] <= left["x"] and left["x"] + left["width"] <= right["x"], (one, left, right)
        assert right["x"] + right["width"] <= two["x"], (right, two)
        assert right["y"] + right["height"] <= left["y"] + 1, "what goes right is above what goes left"
        assert axe(page) == []
    assert complaints == []


def test_where_the_last_requests_time_went_can_be_opened(open_page, client, model, complaints, axe):
    said = "Something that is not to be seen here."
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": said}], max_tokens=8, extra_body={"ignore_eos": True})
    page = open_page("cluster")
    bars = page.locator(".spent summary")
    expect(bars.first).to_have_attribute("aria-label", re.compile("queue .*prefill .*hand-over .*decode "))
    expect(page.locator(".spent details").first.locator("dl")).to_be_hidden()
    # By keyboard, and it stays open when others come.
    first = page.locator(".spent details").filter(has=page.locator(f"summary[aria-label='{bars.first.get_attribute('aria-label')}']"))
    bars.first.focus()
    page.keyboard.press("Enter")
    expect(first.locator("dl")).to_contain_text("8 tokens")
    expect(first.locator("dl")).to_contain_text("context-0, then decode-0")
    shown = bars.count()
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": said}], max_tokens=8)
    if shown < 64:
        expect(bars).to_have_count(shown + 1)
    expect(first.locator("dl")).to_be_visible()
    # And by pointer.
    bars.first.click()
    expect(page.locator(".spent details[open]")).to_have_count(2)
    assert axe(page) == []
    assert said not in page.content()
    assert complaints == []


def test_a_worker_that_dies_is_seen_however_soon_it_is_back(open_page, ready_file, complaints, axe):
    page = open_page("cluster")
    expect(page.get_by_label("decode-0: serving")).to_be_visible()
    os.kill(json.loads(ready_file.read_text())["pids"]["decode-0"], signal.SIGKILL)
    # Its supervisor starts it again, mostly before anybody misses it.
    red = page.get_by_label(re.compile("decode-0: (gone|died, started again)"))
    expect(red).to_be_visible()
    assert red.evaluate("it => getComputedStyle(it).borderTopColor") == RED
    expect(page.locator(".flow .box.is-gone, .flow .box.is-restarted")).to_have_count(1)
    assert axe(page) == []
    expect(page.get_by_label("decode-0: serving")).to_be_visible()
    assert complaints == []


def test_a_worker_that_hangs_turns_red_and_the_next_green(open_page, ready_file, complaints, axe):
    page = open_page("cluster")
    expect(page.get_by_label("decode-0: serving")).to_be_visible()
    pid = json.loads(ready_file.read_text())["pids"]["decode-0"]
    os.kill(pid, signal.SIGSTOP)
    try:
        expect(page.get_by_label("decode-0: gone")).to_be_visible()
        assert page.get_by_label("decode-0: gone").evaluate("it => getComputedStyle(it).borderTopColor") == RED
        expect(page.locator(".flow .box.is-gone")).to_have_count(1)
        expect(page.locator(".flow svg .link.is-broken")).to_have_count(1)
        assert axe(page) == []
    finally:
        os.kill(pid, signal.SIGKILL)
    # It is started again.
    expect(page.get_by_label("decode-0: serving")).to_be_visible()
    assert complaints == []


def test_a_worker_that_drains_leaves(open_page, cluster, model_dir, complaints):
    page = open_page("cluster")
    expect(page.locator(".worker")).to_have_count(2)
    with worker(cluster, model_dir, "extra", "decode", "--tp-size", "3", "--threads", "3") as extra:
        card = page.get_by_label("extra: serving")
        expect(card).to_be_visible()
        expect(card.locator(".note").first).to_have_text(re.compile("^cpu [^,]*, 3 threads, 3 ranks, [a-z0-9]+$"))
        extra.send_signal(signal.SIGTERM)
        expect(page.locator(".worker")).to_have_count(2)
        assert extra.wait(60) == 0
    assert complaints == []


def test_a_key_is_asked_for_and_stands_in_no_address(open_page, cluster, model_dir, tmp_path):
    with api_server(cluster, model_dir, tmp_path, "--api-keys-file", keys_file(tmp_path)) as url:
        page = open_page("cluster", url=url)
        addresses = []
        page.on("request", lambda request: addresses.append(request.url))
        expect(page.locator(".fault")).to_contain_text("key")
        give_key(page)
        expect(page.locator(".worker").first).to_be_visible()
        assert not any("0123456789" in it for it in addresses)


def test_a_worker_is_drained_from_the_page_with_a_key(open_page, cluster, model_dir, tmp_path, complaints, axe):
    with api_server(cluster, model_dir, tmp_path, "--api-keys-file", keys_file(tmp_path)) as url, worker(cluster, model_dir, "extra") as extra:
        page = open_page("cluster", url=url)
        expect(page.locator(".fault")).to_contain_text("key")
        # The browser says of each 401 that there was one.
        give_key(page)
        card = page.get_by_label("extra: serving")
        expect(card).to_be_visible()
        complaints.clear()
        card.get_by_role("button", name="Drain extra", exact=True).click()
        card.get_by_role("button", name="No", exact=True).click()
        assert extra.poll() is None
        card.get_by_role("button", name="Drain extra", exact=True).focus()
        page.keyboard.press("Enter")
        expect(card.get_by_role("button", name="Yes, drain it: extra")).to_be_focused()
        assert axe(page) == []
        # What the server answers meanwhile takes the focus from nobody.
        page.keyboard.press("Tab")
        with page.expect_response("**/cluster"):
            pass
        with page.expect_response("**/cluster"):
            pass
        expect(card.get_by_role("button", name="No", exact=True)).to_be_focused()
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        # It leaves, and is not missed.
        expect(page.locator(".worker")).to_have_count(2)
        assert extra.wait(60) == 0
        expect(page.get_by_label("extra: gone")).to_have_count(0)
        assert complaints == []


def test_without_keys_nobody_is_drained_from_the_page(open_page, cluster):
    page = open_page("cluster")
    expect(page.locator(".worker").first).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("Drain"))).to_have_count(0)
    asked = urllib.request.Request(cluster["url"] + "/workers/decode-0/drain", method="POST", data=b"")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=10)
    assert refused.value.code == 403
    assert "--api-keys-file" in json.load(refused.value)["error"]["message"]
