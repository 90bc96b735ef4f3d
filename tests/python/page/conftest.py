"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import json
import os
import shutil

import pytest
from clusters import REPOSITORY, running_cluster
from playwright.sync_api import expect, sync_playwright

# An answer of the model may take long on a slow machine; nothing waits longer than it must.
expect.set_options(timeout=60_000)

# Not one connection to anybody else.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def ready_file(model_dir, tmp_path_factory):
    """Of a cluster whose workers are started again when they die: a process's id is the one of now. It promises something, so that
    there is a service level to be met, even by a slow machine."""
    with running_cluster(model_dir, tmp_path_factory.mktemp("page"), "--ttft-ms", "60000", restart=True) as ready:
        yield ready


@pytest.fixture(scope="session")
def cluster(ready_file):
    """What the ready file said when the cluster came up."""
    return json.loads(ready_file.read_text())


@pytest.fixture(scope="session")
def browser():
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.exit("chromium is missing: container/install-deps.sh page", 1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def complaints():
    """What the browser's console said that it should not have."""
    return []


@pytest.fixture
def open_page(browser, cluster, complaints):
    """Opens the page in a browser of its own: view, and what the context is made with."""
    contexts = []

    def open_it(view="chat", url=None, **options):
        context = browser.new_context(viewport={"width": 1200, "height": 820}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{url or cluster['url']}/#{view}")
        return page

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture
def axe():
    """Serious faults that axe-core finds in a page."""
    source = REPOSITORY / "page/node_modules/axe-core/axe.min.js"

    def check(page) -> list[str]:
        # The page's own policy allows no foreign script; a debugger's evaluation is not bound by it.
        page.evaluate(source.read_text())
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        serious = [it for it in found if it["impact"] in ("serious", "critical")]
        return [f"{it['id']}: {it['help']}: {[node['html'][:200] for node in it['nodes']]}" for it in serious]

    return check
