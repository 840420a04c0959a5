"""The page works in a browser, in both languages and on small screens, and needs nothing else."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright, expect

import moespan.serve
from moespan.serve.page import page_files, page_routes
from tests.serve.fake_ranks import pulse
from tests.serve.scene import QUICKSTART, Served, Wired, play, play_wired

PAGE = Path(moespan.serve.__file__).parent / "page"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# The second line keeps the browser from asking anybody else.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SIZES = [(1440, 900), (1024, 700), (820, 1180), (360, 740)]

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt install chromium)")


def browse(
    script: Callable[[Served, Page], Awaitable[None]],
    texts: list[str] | None = None,
    **context: Any,
) -> None:
    """Run a script on the page, whose console has to stay empty."""
    noise: list[str] = []

    async def visit(served: Served, server: Wired) -> None:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            page = await (await browser.new_context(**context)).new_page()
            page.set_default_timeout(20_000)
            page.on("console", lambda message: noise.append(message.text))
            page.on("pageerror", lambda error: noise.append(str(error)))
            await page.goto(f"http://127.0.0.1:{server.port}/")
            await expect(page.locator("#model")).to_have_text(QUICKSTART)
            await script(served, page)
            await browser.close()

    play_wired(visit, texts)
    # A browser itself notes answers other than 200, which the page shows in its own words.
    assert not [line for line in noise if "Failed to load resource" not in line]


async def ask(page: Page, question: str) -> None:
    await page.fill("#question", question)
    await page.press("#question", "Enter")


@in_browser
def test_a_conversation_streams_stops_and_is_tried_again():
    async def script(served: Served, page: Page) -> None:
        await ask(page, "12+30=")
        answers = page.locator(".answer .text")
        await expect(answers.last).to_have_text(" 42, 不是 41")
        await expect(page.locator(".answer .quiet").last).to_contain_text("tokens/s")
        await expect(page.locator("#count")).to_have_text("")
        served.ranks.holds = True
        await ask(page, "and now?")
        await expect(page.locator("#stop")).to_be_visible()
        while not served.life.num_live:
            await page.wait_for_timeout(10)
        await page.click("#stop")
        await expect(page.locator(".answer .quiet").last).to_contain_text("stopped")
        while served.life.num_live:  # the request is freed
            await page.wait_for_timeout(10)
        served.ranks.holds = False
        await page.get_by_role("button", name="Try again").click()
        await expect(answers.last).to_have_text(" 42, 不是 41")
        assert [len(request.prompt_token_ids) for request in served.ranks.seen][1:] == [
            len(served.ranks.seen[1].prompt_token_ids)
        ] * 2
        await page.click("#clear")
        await expect(answers).to_have_count(0)

    browse(script, [" 42, 不是 41"])


@in_browser
def test_a_token_shows_its_alternatives_and_parameters_are_sent():
    async def script(served: Served, page: Page) -> None:
        await page.click("summary")
        await page.check("#parameter-alternatives")
        await page.fill("#parameter-temperature", "0")
        await page.fill("#parameter-max_tokens", "40")
        await page.fill("#parameter-stop", "###\n&&&")
        for mode in ("#mode-chat", "#mode-text"):
            await page.click(mode)
            await ask(page, "12+30=")
            tokens = page.locator(".answer .token")
            await expect(page.locator(".answer .text")).to_have_text(" 42 字")
            await tokens.nth(1).hover()
            await expect(page.locator("#tip")).to_be_visible()
            # Completions add the token itself where it is not among the best.
            await expect(page.locator("#tip div")).to_have_count(5 + (mode == "#mode-text"))
            await page.mouse.move(0, 0)
            await expect(page.locator("#tip")).to_be_hidden()
            await tokens.first.focus()
            await page.keyboard.press("ArrowRight")
            await expect(page.locator("#tip")).to_be_visible()
            await page.keyboard.press("Escape")
            await expect(page.locator("#tip")).to_be_hidden()
        params = served.ranks.seen[-1].params
        assert (params.temperature, params.max_tokens, params.stop) == (0, 40, ["###", "&&&"])

    browse(script, [" 42 字"])


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_screen_and_speaks_both_languages(scheme: str):
    async def script(served: Served, page: Page) -> None:
        for width, height in SIZES:
            await page.set_viewport_size({"width": width, "height": height})
            await expect(page.locator("#send")).to_be_in_viewport()
            wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{width} pixels are {wide} too few"
        await expect(page.locator("#health")).to_have_text("就绪")
        await page.click("#language")
        await expect(page.locator("#health")).to_have_text("ready")
        assert await page.evaluate("document.documentElement.lang") == "en"
        await ask(page, "12+30=")
        await expect(page.locator(".answer .text")).to_have_text(" 42")
        await page.reload()
        await expect(page.locator("#send")).to_have_text("Send")  # the choice is kept

    browse(script, color_scheme=scheme, locale="zh-CN")


@in_browser
def test_the_page_says_in_words_that_the_engine_has_died():
    async def script(served: Served, page: Page) -> None:
        await expect(page.locator("#health")).to_have_text("ready")
        served.ranks.holds = True
        await ask(page, "12+30=")
        while not served.life.num_live:
            await page.wait_for_timeout(10)
        served.ranks.die()
        await expect(page.locator(".answer .failed")).to_contain_text("the engine has died")
        await expect(page.locator("#health")).to_contain_text("have died and are being started")

    browse(script)


@in_browser
def test_the_heat_map_of_experts_shows_what_came_between_two_moments():
    async def script(served: Served, page: Page) -> None:
        await expect(page.locator("#experts")).to_be_hidden()
        served.ranks.expert_counts = {1: [5, 0, 0, 1], 2: [0, 6, 0, 0]}
        served.ranks.tell(pulse=pulse())
        await expect(page.locator("#experts")).to_be_visible()
        await expect(page.locator("#heat")).to_have_attribute("width", "4")
        await expect(page.locator("#heat-about")).to_contain_text("2 layers (rows) × 4 experts")

    browse(script)


def test_every_word_of_the_page_is_there_in_both_languages():
    text = (PAGE / "words.js").read_text(encoding="utf-8")
    english, chinese = text.split("  zh: {")
    keys = [set(re.findall(r"(?:^|, |\{ |    )(\w+): ", part, re.M)) for part in (english, chinese)]
    assert keys[0] - {"en"} == keys[1]
    used = set(
        re.findall(r"""word\(["'](\w+)["']""", "".join(p.read_text() for p in PAGE.glob("*.js")))
    )
    used |= set(re.findall(r'data-word(?:-\w+)?="(\w+)"', (PAGE / "index.html").read_text()))
    assert used <= keys[1], used - keys[1]


def test_the_page_asks_nobody_else_and_runs_no_code_of_its_own_in_markup():
    for name, file in page_files().items():
        text = file.content.decode()
        assert not re.search(r"(?:src|href|url|import|fetch)\W{1,4}https?:", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text), (
            name
        )
        assert name != "index.html" or not re.search(r"<script>|\son\w+=|style=", text)


def test_files_have_their_types_and_a_strict_policy():
    async def script(served: Served) -> None:
        for path, kind in (
            ("/", "text/html"),
            ("/ui/main.js", "text/javascript"),
            ("/ui/page.css", "text/css"),
        ):
            answer = await served.http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        for path in ("/ui/", "/ui/nothing.js", "/ui/../life.py", "/ui/%2e%2e/life.py"):
            assert (await served.http.get(path)).status_code == 404

    play(script)


def test_with_a_key_the_page_opens_by_password_and_says_nothing_without():
    async def script(served: Served) -> None:
        for path in ("/", "/ui/state", "/ui/main.js"):
            refused = await served.http.get(path)
            assert refused.status_code == 401
            assert "Basic" in refused.headers["www-authenticate"]
            credentials = base64.b64encode(b"anyone:secret").decode()
            opened = await served.http.get(path, headers={"authorization": f"Basic {credentials}"})
            assert opened.status_code == 200

    play(script, api_key="secret")


def test_counts_of_experts_are_there_if_they_are_counted_and_an_engine_runs():
    async def script(served: Served) -> None:
        assert not (await served.http.get("/ui/state")).json()["has_experts"]
        served.ranks.tell(pulse=pulse())
        assert (await served.http.get("/ui/state")).json()["has_experts"]
        served.ranks.expert_counts = {1: [5, 0], 2: [2, 3]}
        assert (await served.http.get("/ui/experts")).json() == {"counts": [[5, 0], [2, 3]]}
        served.ranks.die()
        while served.life.pulse is not None:
            await asyncio.sleep(0)
        assert not (await served.http.get("/ui/state")).json()["has_experts"]
        routes = page_routes(served.life, served.life.metrics, QUICKSTART, 1)
        assert "/ui/experts" not in [route.path for route in routes]

    play(script)


def test_the_state_tells_ranks_and_counts_before_and_after_a_request():
    async def script(served: Served) -> None:
        await served.complete(max_tokens=5)
        state = (await served.http.get("/ui/state")).json()
        assert state["state"] == "ready" and state["model"] == QUICKSTART
        assert state["generated_tokens"] > 0 and state["live_requests"] == 0
        assert [rank["rank"] for rank in state["ranks"]] == list(range(len(served.life.places())))

    play(script)
