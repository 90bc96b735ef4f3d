"""The frame around the views: keyboard, colours, narrow screens, and how it is served."""

import re
import urllib.error
import urllib.request

import pytest
from clusters import REPOSITORY
from on_page import KEY, ask, end, hold_answers, last_answer, open_settings, say, stop_button, tab_to, wait_for_end
from playwright.sync_api import expect


def test_the_keyboard_is_enough_to_go_anywhere(open_page, complaints):
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


def test_a_whole_chat_by_keyboard(open_page, complaints):
    page = open_page()
    hold_answers(page)
    expect(page.get_by_text("Ask")).to_be_visible()
    draft, settings = page.get_by_label("Message", exact=True), page.get_by_role("button", name="Settings")
    tab_to(page, settings)
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_label("Seed"))
    page.keyboard.type("7")
    tab_to(page, settings, back=True)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Seed")).to_have_count(0)
    # Send, and stop with Escape: the next question can be written at once.
    tab_to(page, draft, back=True)
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    say(page, 0, content="An answer")
    expect(last_answer(page).locator(".markdown")).to_have_text("An answer")
    page.keyboard.press("Escape")
    wait_for_end(page)
    expect(last_answer(page).locator("footer")).to_contain_text("stopped")
    expect(page.locator("article.of-user .plain")).to_have_text("Two\nlines", use_inner_text=True)
    expect(draft).to_be_focused()
    # With the buttons too.
    page.keyboard.type("Another question")
    tab_to(page, page.get_by_role("button", name="Send"))
    page.keyboard.press("Enter")
    say(page, 1, content="Another answer")
    expect(last_answer(page).locator(".markdown")).to_have_text("Another answer")
    tab_to(page, stop_button(page))
    page.keyboard.press("Enter")
    wait_for_end(page)
    expect(draft).to_be_focused()
    # Dialogs: Escape closes them, stops nothing, and leads back.
    tab_to(page, page.get_by_role("button", name="Again"))
    page.keyboard.press("Enter")
    say(page, 2, content="One")
    code = page.get_by_role("button", name="As code")
    tab_to(page, code)
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="This request as code")
    expect(dialog).to_contain_text('"seed": 7')
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(code).to_be_focused()
    key = page.get_by_role("button", name="API key")
    tab_to(page, key, back=True)
    page.keyboard.press("Enter")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(key).to_have_text("API key ✓")
    expect(key).to_be_focused()
    say(page, 2, content=", two")
    expect(last_answer(page).locator(".markdown")).to_have_text("One, two")
    expect(stop_button(page)).to_be_visible()
    page.keyboard.press("Escape")
    wait_for_end(page)
    # Another conversation, and back.
    tab_to(page, page.get_by_role("button", name="New conversation"))
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(0)
    expect(draft).to_be_focused()
    tab_to(page, page.locator(".conversations li button").first, back=True)
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(4)
    assert complaints == []


def test_colours_are_the_systems_or_what_was_chosen(open_page, complaints):
    page = open_page(color_scheme="dark")
    light, dark = "rgb(251, 251, 253)", "rgb(19, 22, 28)"
    for colours, ground in [("system", dark), ("light", light), ("dark", dark), ("system", dark)]:
        button = page.get_by_role("button", name=f"Colours: {colours}")
        expect(button).to_be_visible()
        page.reload()
        expect(button).to_be_visible()
        expect(page.locator("body")).to_have_css("background-color", ground)
        button.click()
    # The system's, when it is light.
    page.get_by_role("button", name="Colours: light").click()
    page.get_by_role("button", name="Colours: dark").click()
    page.emulate_media(color_scheme="light")
    expect(page.locator("body")).to_have_css("background-color", light)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_in_a_chat_its_settings_and_dialogs(open_page, complaints, axe, scheme):
    page = open_page(color_scheme=scheme)
    hold_answers(page)
    ask(page, "A question")
    say(page, reasoning_content="Hm.")
    say(page, content="# Title\n\nA [link](https://example.org), `code`, and\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\nlines\n```\n")
    expect(last_answer(page).locator("table")).to_be_visible()
    assert axe(page) == []
    end(page)
    wait_for_end(page)
    assert axe(page) == []
    open_settings(page)
    page.get_by_label("Temperature").fill("hot")
    expect(page.locator("#set-temperature-wrong")).to_be_visible()
    assert axe(page) == []
    page.get_by_role("button", name="API key").click()
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()
    assert axe(page) == []
    assert complaints == []


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


def test_the_page_is_small():
    files = list((REPOSITORY / "page/dist").iterdir())
    assert sum(file.stat().st_size for file in files) < 300_000, files


def test_every_picture_is_shown_somewhere():
    pages = [path for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/*.md")] if path.is_file()]
    shown = {(path.parent / name).resolve() for path in pages for name in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", path.read_text())}
    pictures = set((REPOSITORY / "docs/pictures").glob("*.png"))
    assert pictures and pictures <= shown, f"no page shows {pictures - shown}"
