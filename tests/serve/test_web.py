"""The page in headless Chromium: images, streams, stop, retry, reload, tools, reasoning, settings and keys.

Skipped without Chromium. `PAGE_SHOTS=<folder>` saves screenshots.
"""

import os
import shutil
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from minicpmv46_jax.generation.generate import Token
from minicpmv46_jax.library import Delta
from serve.web import page as page_files
from tests.serve.support import NAME, PATIENCE_S, FakeModel, live, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without the flags on networking Chromium asks its vendor's hosts for updates, which a test must not do.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update".split()
)

ANSWER = (
    "It is a **temple** in `China`:\n\n- red columns\n- a wide roof\n\n```python\nprint('<b>hello</b>')\n```\n\nNothing else."
)
XML = "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
TOOLS = '[{"type": "function", "function": {"name": "weather", "parameters": {"properties": {"days": {"type": "integer"}}}}}]'


class PageModel(FakeModel):
    """A fake model with the demo model's prompts and images, which generates `answer` a character a step."""

    def __init__(self, demo):
        super().__init__()
        self.config, self.processor, self.detokenizer = demo.config, demo.processor, demo.detokenizer
        self.plan, self.answer = demo.plan, ANSWER
        self.prompts = []

    def generate(self, inputs, options):
        self.prompts.append(self.detokenizer.decode(inputs.token_ids.tolist(), skip_special_tokens=False))
        for character in self.answer:
            if self.gate is not None:
                self.gate.acquire()
            yield Delta(character, (Token(1, -1.0, ()),))
        yield Delta("", (), "stop")


expect.set_options(timeout=PATIENCE_S * 1000)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def model(demo):
    return PageModel(demo)


@pytest.fixture
def page(browser, model):
    with serving(model) as service, live(service) as address:
        yield from opened(browser, address)


def opened(browser, address, **options):
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_S * 1000)
    faults, asked = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if "Content Security" in line.text else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    assert faults == []
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)  # no request leaves for another host
    context.close()


@pytest.fixture
def photo(photos, tmp_path):
    photos[0].save(tmp_path / "china.jpg")
    return tmp_path / "china.jpg"


def shot(page, name):
    if folder := os.environ.get("PAGE_SHOTS"):
        Path(folder).mkdir(exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")


def say(page, words):
    page.get_by_label("Message").fill(words)
    page.get_by_label("Message").press("Enter")


def test_image_stream_stop_retry_and_reload(page, model, photo, demo):
    page.set_input_files("#files", photo)
    inputs = demo.process([{"role": "user", "content": [{"type": "image", "image": photo}]}])
    rows, columns = inputs.image_grids[0]
    tokens = sum(view.num_tokens for view in inputs.views)
    expect(page.locator("#attached figcaption")).to_have_text(f"{rows} × {columns} slices, {tokens} tokens")
    assert page.locator("#attached i").count() == rows + columns - 2 > 0

    model.gate = threading.Semaphore(5)
    say(page, "What is this?")
    expect(page.locator(".assistant .text")).to_have_text("It is")
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    shot(page, "streaming")
    page.keyboard.press("Escape")
    expect(page.locator(".message-footer")).to_contain_text("stopped")
    expect(page.locator(".assistant .text")).to_have_text("It is")

    model.gate.release(10_000)
    model.gate = None
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".assistant li")).to_have_text(["red columns", "a wide roof"])
    expect(page.locator(".assistant strong")).to_have_text("temple")
    expect(page.locator(".assistant pre code")).to_have_text("print('<b>hello</b>')")  # as text, not as markup
    expect(page.locator(".message-footer")).to_contain_text(f"+ {len(ANSWER)} tokens")
    shot(page, "light")

    page.reload()
    expect(page.locator(".assistant strong")).to_have_text("temple")
    expect(page.locator(".user figcaption")).to_contain_text(f"{tokens} tokens")
    say(page, "And now?")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(page.locator(".message-footer")).to_have_count(2)
    assert "It is a **temple**" in model.prompts[-1] and "And now?" in model.prompts[-1]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#messages > li")).to_have_count(0)


def test_demo_model_draws_images(browser, model):
    with serving(model, demo=True) as service, live(service) as address:
        for page in opened(browser, address):
            page.get_by_role("button", name="Draw").click()
            expect(page.locator("#attached figcaption").first).to_contain_text("tokens")
            question, images = page.get_by_label("Message").input_value(), page.locator("#attached img").count()
            page.get_by_role("button", name="Send").click()
            expect(page.locator(".assistant strong")).to_have_text("temple")
            expect(page.locator(".user")).to_contain_text(question)
            assert question in model.prompts[-1] and page.locator(".user img").count() == images >= 1
            page.get_by_role("button", name="Draw").click()  # another image, in a new chat
            expect(page.locator("#attached img").first).to_be_visible()
            expect(page.locator("#messages > li")).to_have_count(0)


def test_other_models_have_no_draw_button(page):
    expect(page).to_have_title(NAME)
    expect(page.get_by_role("button", name="Draw")).to_be_hidden()


def test_reasoning_is_folded_and_tool_calls_get_results(page, model):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Reason before answering").check()
    page.get_by_label("Tools").fill(TOOLS)
    page.get_by_label("Close settings").click()
    model.answer = f"I wonder.\n</think>\n\nI look.\n\n{XML}"
    say(page, "Rain?")
    expect(page.locator(".call code")).to_have_text("weather")
    expect(page.locator(".call pre")).to_have_text('{\n  "days": 3\n}')
    expect(page.locator("details div")).to_be_hidden()
    page.locator("summary").click()
    expect(page.locator("details div")).to_have_text("I wonder.")
    shot(page, "call")
    model.answer = "hm</think>No rain."
    page.get_by_label("Result of weather").fill("dry")
    page.get_by_role("button", name="Send result").click()
    expect(page.locator(".assistant .text").last).to_have_text("No rain.")
    assert "<tool_response>\ndry\n</tool_response>" in model.prompts[-1] and "<function=weather>" in model.prompts[-1]


def test_settings_are_stored_and_sent(page, model):
    seen, make = [], model.options
    model.options = lambda **options: seen.append(options) or make(**options)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Max tokens", exact=True).fill("7")
    page.get_by_label("API key").fill("k")
    shot(page, "settings")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    page.reload()
    say(page, "Hi")
    expect(page.locator(".message-footer")).to_contain_text("tokens")
    assert (seen[-1]["temperature"], seen[-1]["max_new_tokens"]) == (0.5, 7)
    assert "Be brief." in model.prompts[-1]


def test_message_waits_for_the_model_name(page, model):
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    say(page, "Hi")
    expect(page.locator("#status")).to_have_text("answering…")
    for route in held:
        route.continue_()
    expect(page.locator(".message-footer")).to_contain_text("tokens")
    assert "Hi" in model.prompts[-1]


def test_message_without_a_server_can_be_retried(page, model):
    page.route("**/v1/*", lambda route: route.abort())
    page.reload()
    expect(page.locator("#status")).to_have_text("no connection")
    say(page, "Hi")
    expect(page.locator(".error")).to_be_visible()
    page.unroute("**/v1/*")
    page.get_by_role("button", name="Retry").click()  # without a reload
    expect(page.locator("#model")).to_have_text("fake")
    expect(page.locator(".message-footer")).to_contain_text("tokens")


def test_image_cost_is_shown_beside_invalid_tools(page, photo):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill("{")
    page.keyboard.press("Escape")
    page.set_input_files("#files", photo)
    expect(page.locator("#attached figcaption")).to_contain_text("tokens")


def test_errors_are_shown(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("-1")
    page.get_by_label("Tools").fill("{")
    page.keyboard.press("Escape")
    say(page, "Hi")
    expect(page.locator(".error")).to_contain_text("Tools:")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill("")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".error")).to_contain_text("temperature is -1.0, expected at least 0.0")


def test_pasted_and_dropped_images(page, photo):
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(60, 40);
            canvas.getContext("2d").fillRect(0, 0, 60, 40);
            const file = new File([await canvas.convertToBlob()], "drawn.png", {type: "image/png"});
            const data = new DataTransfer();
            data.items.add(file);
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }"""
    )
    expect(page.locator("#attached figcaption")).to_have_count(2)
    expect(page.locator("#attached figcaption").first).to_contain_text("not sliced,")
    page.get_by_label("Remove drawn.png").first.click()
    expect(page.locator("#attached figcaption")).to_have_count(1)


def test_server_with_an_api_key(browser, demo):
    with serving(PageModel(demo), api_keys=("secret",)) as service, live(service) as address:
        for page in opened(browser, address):
            expect(page.locator("#status")).to_have_text("this server needs an API key")
            expect(page.get_by_label("API key")).to_be_focused()
            page.get_by_label("API key").fill("secret")
            page.get_by_label("API key").press("Tab")
            expect(page.locator("#model")).to_have_text("fake")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_and_by_keyboard(browser, demo, photo, scheme):
    with serving(PageModel(demo)) as service, live(service) as address:
        for page in opened(browser, address, viewport={"width": 375, "height": 667}, color_scheme=scheme):
            page.set_input_files("#files", photo)
            expect(page.locator("#attached figcaption")).to_contain_text("tokens")
            page.get_by_label("Message").focus()
            page.keyboard.type("What is this?")
            page.keyboard.press("Enter")
            expect(page.locator(".message-footer")).to_contain_text("tokens")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # no horizontal overflow
            shot(page, f"phone-{scheme}")
            page.get_by_role("button", name="Light or dark").click()
            chosen = page.evaluate("document.documentElement.dataset.theme")
            assert chosen != scheme
            page.reload()
            assert page.evaluate("document.documentElement.dataset.theme") == chosen


def test_page_names_no_other_host():
    html, headers = page_files()
    assert "http" not in html.replace("http-equiv", "").replace("HTTP status", "").replace("over https", "")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
