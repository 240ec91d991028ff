"""The page in a real browser: what a user sees and does, with a mouse, a finger, or the keyboard alone."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serving import served, write_models

from core.pictures.images import read_image_metadata

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
try:
    from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright
except ImportError:
    pytest.skip("playwright is not installed: pip install playwright", allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("no chromium is installed: apt-get install chromium", allow_module_level=True)

PROMPT = "a red house on green hills"
PATIENCE = 60_000  # ms
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = write_models(tmp_path_factory.mktemp("models"))
    with served(
        tmp_path_factory.mktemp("out"), "--preset", "tiny", "--device", "cpu", "--models", str(models)
    ) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server: str, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens windows of their own, in which the page is shown; an error in their scripts, a question, or a
    request to another server fails the test at its end (raising where playwright tells of them stops it)."""
    pages, faults = [], []

    def heed(url: str) -> None:
        if not url.startswith((server, "data:", "blob:")):
            faults.append(f"the page asks another server: {url}")

    def ask(dialog: Dialog) -> None:
        faults.append(f"the page asks: {dialog.message}")
        dialog.dismiss()

    def opened(**options: object) -> Page:
        page = browser.new_context(**options).new_page()
        pages.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: faults.append(f"the page's script failed: {error}"))
        page.on("request", lambda request: heed(request.url))
        page.on("dialog", ask)
        page.goto(server)
        expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
        return page

    yield opened
    for page in pages:
        page.context.close()
    assert not faults


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


def fill(page: Page, steps: int = 1, prompt: str = PROMPT, seed: int = 5) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in (("Width", 96), ("Height", 64), ("Seed", seed)):
        page.get_by_label(name, exact=True).fill(str(value))
    if not page.get_by_role("combobox", name="Sampler").is_visible():
        page.get_by_role("button", name=re.compile("^More(?! tabs)")).click()
    page.get_by_label("number input for Steps").fill(str(steps))


def make(page: Page) -> None:
    page.get_by_role("button", name="Make", exact=True).click()


def finished(page: Page) -> bytes:
    """The file of the picture that the page shows."""
    link = page.get_by_role("link", name="Download PNG")
    expect(link.first).to_be_visible()
    with page.expect_download() as download:
        link.first.click()
    return Path(download.value.path()).read_bytes()


def picture(colour: str = "gray") -> dict[str, object]:
    content = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(content, "PNG")
    return {"name": "a.png", "mimeType": "image/png", "buffer": content.getvalue()}


def test_a_prompt_becomes_a_picture_and_its_file_fills_the_form(page: Page) -> None:
    fill(page, steps=8)
    make(page)
    expect(page.locator("#up-progress progress").first).to_be_visible()
    expect(page.locator(".up-preview")).to_be_visible()
    content = finished(page)
    stored = read_image_metadata(io.BytesIO(content))
    assert (stored["prompt"], stored["seed"], stored["steps"], stored["width"]) == (PROMPT, 5, 8, 96)
    expect(page.get_by_text(re.compile("96 × 64: .* of memory, about"))).to_be_visible()
    fill(page, steps=1, prompt="something else", seed=9)
    dropped = {"name": "a.png", "mimeType": "image/png", "buffer": content}
    page.get_by_test_id("file-upload").last.set_input_files(dropped)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
    expect(page.get_by_label("number input for Steps")).to_have_value("8")
    page.get_by_role("tab", name="History").click()
    page.locator("#up-history button").first.click()
    expect(page.locator("dd", has_text=PROMPT)).to_be_visible()


def test_small_pictures_come_first_and_one_is_rendered_high(page: Page) -> None:
    fill(page)
    page.get_by_role("button", name="Small pictures first").click()
    ones = page.get_by_role("button", name="Render this one high")
    expect(ones).to_have_count(4)
    expect(page.get_by_role("button", name="Make", exact=True)).to_be_enabled()
    page.get_by_role("button", name="Render this one high, seed 6").click()
    expect(page.locator("#up-results img")).to_be_visible()
    stored = read_image_metadata(io.BytesIO(finished(page)))
    assert (stored["seed"], stored["width"], stored["lr_only"]) == (6, 96, False)
    expect(ones).to_have_count(4)
    page.get_by_role("tab", name="Upscale").click()
    expect(page.get_by_role("button", name="Small pictures first")).to_be_hidden()


def test_a_job_outlives_a_reload_and_is_cancelled(page: Page) -> None:
    fill(page, steps=50)
    for name in ("Width", "Height"):  # so that it takes longer than a reload
        page.get_by_label(name, exact=True).fill("768")
    make(page)
    expect(page.get_by_text("Running")).to_be_visible()
    page.reload()
    expect(page.get_by_text("Running")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_text("Cancelled")).to_be_visible()
    expect(page.get_by_role("button", name="Make", exact=True)).to_be_enabled()


def test_two_windows_wait_for_each_other(page: Page, open_page: Callable[..., Page]) -> None:
    other = open_page()
    for window, steps in ((page, 50), (other, 1)):
        fill(window, steps=steps)
        make(window)
        expect(window.get_by_text(re.compile("Running|before this one"))).to_be_visible()
    expect(other.get_by_text("Waiting: 1 before this one")).to_be_visible()
    page.get_by_role("button", name="Cancel", exact=True).click()
    assert finished(other)
    expect(page.get_by_text("Cancelled")).to_be_visible()


def test_a_hole_is_drawn_and_filled(page: Page) -> None:
    page.get_by_role("tab", name="Control").click()
    fill(page)
    page.locator("#up-picture input[type=file]").set_input_files(picture())
    page.get_by_role("button", name="See the edges").click()
    expect(page.locator("#up-edges img")).to_be_visible()
    page.get_by_label("Controlled by").click()
    page.get_by_role("option", name="inpainting").click()
    canvas = page.locator("#up-mask canvas")
    expect(canvas).to_be_visible()
    make(page)
    expect(page.get_by_role("alert")).to_contain_text("nothing to fill")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.6 * box["height"], steps=3)
    page.mouse.up()
    make(page)
    made = Image.open(io.BytesIO(finished(page)))
    assert made.getpixel((2, 2)) == (128, 128, 128) and made.getpixel((48, 32)) != (128, 128, 128)


def test_a_region_is_made_anew_beside_a_picture_that_says_what_to_show(page: Page) -> None:
    fill(page)
    page.get_by_role("button", name="Start from a picture").click()
    page.locator("#up-start input[type=file]").set_input_files(picture("red"))
    expect(page.locator("#up-start img")).to_be_visible()
    for name, value in (("x", 32), ("y", 16), ("Region's width", 32)):
        page.get_by_label(name, exact=True).fill(str(value))
    make(page)
    expect(page.get_by_role("alert")).to_contain_text("a width and a height")
    page.get_by_label("Region's height", exact=True).fill("32")
    page.get_by_role("button", name="Show a picture beside the prompt").click()
    page.locator("#up-beside input[type=file]").set_input_files(picture("blue"))
    expect(page.locator("#up-beside img")).to_be_visible()
    make(page)
    content = finished(page)
    stored, made = read_image_metadata(io.BytesIO(content)), Image.open(io.BytesIO(content))
    assert (stored["region"], stored["strength"], len(stored["image_prompt"])) == ([32, 16, 32, 32], 1, 1)
    assert made.getpixel((2, 2)) == (255, 0, 0) and made.getpixel((48, 32)) != (255, 0, 0)


def test_a_picture_is_uploaded_and_made_large(page: Page) -> None:
    fill(page, prompt="")
    page.get_by_role("tab", name="Upscale").click()
    make(page)
    expect(page.get_by_role("alert")).to_contain_text("add the picture")
    page.locator("#up-small input[type=file]").set_input_files(picture("red"))
    expect(page.locator("#up-small img")).to_be_visible()
    make(page)
    assert Image.open(io.BytesIO(finished(page))).size == (192, 128)


def test_mistakes_are_sentences_and_prompts_are_text(page: Page) -> None:
    make(page)
    expect(page.get_by_role("alert")).to_contain_text("prompt is empty")
    fill(page, prompt="<img src=x onerror=alert(1)><b>bold</b>")
    make(page)
    assert finished(page)
    assert page.locator("#up-results b").count() == 0
    page.get_by_label("Width", exact=True).fill("9000")
    make(page)
    expect(page.get_by_role("alert").last).to_contain_text("at most 4096")


def test_a_phone_in_the_dark_with_the_keyboard_alone(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport={"width": 360, "height": 780}, color_scheme="dark", has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 80
    fill(page)
    page.get_by_label("Prompt", exact=True).focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == "Make":
            break
    page.keyboard.press("Enter")
    assert finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="More tabs").click()
    page.get_by_text("Control", exact=True).last.click()
    page.locator("#up-picture input[type=file]").set_input_files(picture())
    page.get_by_label("Controlled by").click()
    page.get_by_role("option", name="inpainting").click()
    page.locator("#up-mask canvas").focus()
    for key in ("ArrowLeft", "Space", "Shift+ArrowDown", "+", "Space"):
        page.keyboard.press(key)
    assert page.evaluate("window.upMask.data()").startswith("data:image/png")


def test_the_server_ends_while_a_window_is_open(browser: Browser, tmp_path: Path) -> None:
    with served(tmp_path / "out", "--preset", "tiny", "--device", "cpu") as address:
        page = browser.new_context().new_page()
        page.goto(address)
        expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    page.context.close()  # after the end, which may leave no traceback


FETCH = """async ([url, body, kind]) => {
    const mode = kind == "text/plain" ? "no-cors" : "cors", headers = {"Content-Type": kind};
    try {
        const answer = await fetch(url, {method: "POST", body, headers, mode});
        return answer.type == "opaque" ? "opaque" : answer.status;
    } catch (error) { return "refused"; }
}"""


def test_a_foreign_page_cannot_drive_it(server: str, browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.route(
        "http://evil.example/", lambda route: route.fulfill(body="<p>evil</p>", content_type="text/html")
    )
    page.goto("http://evil.example/")
    body = '{"prompt": "a house", "size": "64x64", "steps": 1}'
    for kind in ("application/json", "text/plain"):
        refused = page.evaluate(FETCH, [f"{server}/v1/jobs", body, kind])
        assert refused in ("refused", "opaque", 403)
    assert httpx.get(f"{server}/v1/jobs/unknown").status_code == 404
    context.close()
