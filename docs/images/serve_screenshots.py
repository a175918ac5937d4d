"""Drives the page of `serve` in a headless Chromium, checks what it shows, takes pictures of it.

    pip install playwright
    python docs/images/serve_screenshots.py --model runs/emoji/model --store shelf --query dolphin \
        --picture dolphin.png --chromium /usr/bin/chromium

Types a query, drags the budget over all plans, opens an explanation, drops a picture, filters, and
does so on a wide and a narrow screen, light and dark. An expectation that does not hold ends it.
"""

import argparse
import base64
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
DROP = """
([content, name]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: "image/png" }));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true }));
  }
}
"""


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--store", type=Path, required=True)
    add("--query", required=True, help="a text that some items of the store answer")
    add("--picture", type=Path, required=True, help="a PNG to drop")
    add("--chromium", help="path of the browser (default: Playwright's own)")
    add("--python", default=sys.executable, help="that has metaembed_pl (default: this one)")
    add("--out", type=Path, default=Path(__file__).parent, help="for serve.png, serve_explain.png")
    add("--more", type=Path, help="a folder for pictures of the dark and the narrow page")
    args = parser.parse_args()
    with served(args) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=CHROMIUM_FLAGS)
        for name, size, scheme in (
            ("light", (1280, 860), "light"),
            ("dark", (1280, 860), "dark"),
            ("narrow", (390, 844), "light"),
        ):
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]},
                color_scheme=scheme,
                device_scale_factor=1.5,
            )
            page = context.new_page()
            problems: list[str] = []
            page.on("pageerror", partial(_note_error, problems))
            page.on("console", partial(_note_console, problems))
            requests: list[str] = []
            page.on("request", partial(_note_request, requests))
            drive(page, url, args, name)
            assert not problems, problems
            elsewhere = [one for one in requests if not one.startswith((url, "data:", "blob:"))]
            assert not elsewhere, f"the page asks other servers: {elsewhere}"
            context.close()
        browser.close()
    print("the page does what it should")


def _note_error(problems: list[str], error: Any) -> None:
    problems.append(str(error))


def _note_console(problems: list[str], said: Any) -> None:
    # What the browser says of answers that the page expects, such as a filter that is none.
    if said.type == "error" and "status of 422" not in said.text:
        problems.append(said.text)


def _note_request(requests: list[str], request: Any) -> None:
    requests.append(request.url)


@contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """The service, while it runs; its address."""
    command = [args.python, "-m", "metaembed_pl", "serve", "--port", "0"]
    command += ["--model", str(args.model), "--store", str(args.store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at http://" in line, "the service did not start"
            yield line.partition(" at ")[2].split()[0]
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(timeout=30)
        assert status == 0, f"the service ended with {status}"


def drive(page: Page, url: str, args: argparse.Namespace, name: str) -> None:
    """What a person would do."""
    page.goto(url)
    expect(page.locator("#facts")).to_contain_text("items")
    if name == "light":
        measured(page)
    searched(page, args.query)
    last = int(page.locator("#plan").get_attribute("max") or 0)
    found = {step: dragged(page, step) for step in range(last + 1)}
    assert found[0] != found[last], "the cheapest plan and all vectors find the same"
    fits(page)
    picture_of(page, args, name, "serve.png")
    explained(page, args, name)
    dropped(page, args.picture)
    filtered(page)


def measured(page: Page) -> None:
    """The button measures where the store was not yet; then there is a plot with points."""
    if page.locator("#measure").is_visible():
        page.locator("#measure").click()
    expect(page.locator("#plot .point").first).to_be_visible(timeout=120_000)
    expect(page.locator("#auto")).to_be_visible()


def searched(page: Page, query: str) -> None:
    """A text is typed, and results come."""
    page.locator("#text").blur()
    page.keyboard.press("/")
    page.keyboard.type(query)
    page.keyboard.press("Enter")
    expect(page.locator("#results li")).to_have_count(24, timeout=20_000)
    expect(page.locator("#spent-bytes")).to_contain_text("B")


def dragged(page: Page, step: int) -> list[str]:
    """The slider is put at a step; ids of what is found there."""
    with page.expect_response(lambda answer: "/api/search" in answer.url) as answered:
        page.locator("#plan").evaluate(
            "(slider, step) => { slider.value = step; slider.dispatchEvent(new Event('input')); }",
            step,
        )
    wanted = [result["id"] for result in answered.value.json()["results"]]
    page.wait_for_function(
        "wanted => [...document.querySelectorAll('#results li')].map(one => one.dataset.id).join()"
        " === wanted.join()",
        arg=wanted,
    )
    return wanted


def explained(page: Page, args: argparse.Namespace, name: str) -> None:
    """A result is opened by keyboard; its winners sum to its score; Escape closes it."""
    page.locator("#results button").first.focus()
    with page.expect_response(lambda answer: "/api/explanation" in answer.url) as answered:
        page.keyboard.press("Enter")
    why: dict[str, Any] = answered.value.json()
    expect(page.locator("#why")).to_be_visible()
    best = [max(row) for row in why["products"]]
    assert abs(sum(best) - why["item"]["score"]) < 1e-4
    expect(page.locator("#why-sum")).to_contain_text(f"{why['item']['score']:.3f}")
    expect(page.locator("#winners li")).to_have_count(len(best) + 1)
    expect(page.locator("#matrix .winner")).to_have_count(len(best))
    expect(page.locator("#look-heat")).to_be_visible()
    strongest = best.index(max(best)) + 2
    page.locator(f"#winners li:nth-child({strongest}) button").click()
    expect(page.locator("#look-words")).to_contain_text(
        f"vector {why['winners'][strongest - 2] + 1} "
    )
    expect(page.locator("#matrix .column")).to_have_count(1)
    page.wait_for_function("document.querySelector('#look-picture').complete")
    fits(page)
    picture_of(page, args, name, "serve_explain.png")
    page.keyboard.press("Escape")
    expect(page.locator("#why")).to_be_hidden()


def dropped(page: Page, picture: Path) -> None:
    """A picture is dropped and asked with; without words it finds something else."""
    content = base64.b64encode(picture.read_bytes()).decode()
    before = shown(page)
    page.locator("#text").fill("")
    with page.expect_response(lambda answer: "/api/search" in answer.url):
        page.evaluate(DROP, [content, picture.name])
    expect(page.locator("#chosen")).to_be_visible()
    page.wait_for_function(
        "before => [...document.querySelectorAll('#results li')].map(one => one.dataset.id).join()"
        " !== before.join()",
        arg=before,
    )
    page.locator("#forget").click()
    expect(page.locator("#chosen")).to_be_hidden()


def filtered(page: Page) -> None:
    """A filter that nothing passes finds nothing, one that is none is told, and both are undone."""
    page.locator("#more").evaluate("more => { more.open = true; }")
    for words, said in (("asked_as=no such thing", "0 of"), ("nonsense", "a filter is KEY")):
        page.locator("#where").fill(words)
        page.locator("#where").press("Enter")
        expect(page.locator("#said")).to_contain_text(said)


def shown(page: Page) -> list[str]:
    """Ids of the results on the page."""
    return page.locator("#results li").evaluate_all("items => items.map(one => one.dataset.id)")


def fits(page: Page) -> None:
    """Nothing is wider than the screen."""
    wide, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= screen, f"the page is {wide} pixels wide on a screen of {screen}"


def picture_of(page: Page, args: argparse.Namespace, name: str, file: str) -> None:
    """A picture of the window, once pictures have come and movements are over."""
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(400)
    if name == "light":
        page.screenshot(path=args.out / file)
    elif args.more is not None:
        args.more.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=args.more / f"{name}_{file}")


if __name__ == "__main__":
    main()
