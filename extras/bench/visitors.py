"""
How the demo bears many visitors: each opens the page in a browser, uploads an image of its own and asks about it.

    python extras/share/demo.py --run=out/sample
    python extras/bench/visitors.py --pid=1234 --visitors=20 --minutes=5    # the number of the demo's process

Prints how long answers took, from the key that sends a question until all of the answer stands on the page, the line
of waiting visitors included; what went wrong; and the server's memory. Images are drawn here at random. Needs
playwright, and a chromium.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

import asyncio
import io
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from PIL import Image

from extras.bench.progress import tell
from plumbing.flags import Count, Range, Seconds, UserError, Whole, one_line, parse_command_line, require_packages, run

BROWSERS = "chromium", "chromium-browser", "google-chrome"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
QUESTIONS = ("what is shown?", "which organ is it?", "is it normal?", "where is the finding?")
ENDED = "[data-test-script-state=notRunning]"  # streamlit's word for a page that is whole


@dataclass(frozen=True)
class Config:
    url: str = "http://127.0.0.1:8501"  # of the running demo
    visitors: Annotated[int, Range(1, 200)] = 20  # sessions at a time
    minutes: Annotated[float, Range(0, 1440)] = 2.0  # from when all have opened the page
    pause: Annotated[float, Range(0, 3600)] = 3.0  # seconds between an answer and the next question, on average
    patience: Seconds = 120  # for a page or an answer, beyond which it counts as an error
    pixels: Count = 512  # of an image's side
    password_file: str = ""  # the demo's
    pid: Whole = 0  # of the demo's process, whose memory is measured; 0: not measured
    seed: Whole = 0  # of the images, questions and pauses


@dataclass
class Notes:
    """What happened to all visitors."""
    opened: list = field(default_factory=list)  # seconds until a visitor's image was shown
    answered: list = field(default_factory=list)  # seconds until an answer was whole
    errors: Counter = field(default_factory=Counter)
    memory: list = field(default_factory=list)  # (when, MB)


def memory_of(pid):
    """The resident memory of a process in MB. Raises UserError where there is none of that number."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError as error:
        raise UserError(f"--pid={pid}: {error.strerror}; name the process of the running demo") from None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def draw_image(seed, pixels):
    """A PNG of noise, as bytes: another one for each visitor, so that nothing is shared."""
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


async def open_page(page, config, image):
    """Go in, with the password where there is one, and upload an image."""
    await page.goto(config.url)
    if config.password_file:
        await page.get_by_label("Password", exact=True).fill(Path(config.password_file).read_text().strip())
        await page.keyboard.press("Enter")
    own = page.get_by_text("Your own")
    await own.click()
    await page.set_input_files("input[type=file]", {"name": "image.png", "mimeType": "image/png", "buffer": image})
    await page.get_by_alt_text("The image, the whole of it").wait_for()


async def ask(page, question):
    """Ask, and wait until all of the answer is there."""
    await page.get_by_placeholder("Ask about this image").fill(question)
    await page.keyboard.press("Enter")
    await page.locator(".question").first.get_by_text(question, exact=True).wait_for()
    await page.locator(ENDED).wait_for()


async def visit(browser, number, config, notes, ready):
    """One visitor, from the first page until the minutes are over."""
    draw = random.Random(f"{config.seed} {number}")
    context = await browser.new_context()
    context.set_default_timeout(1000 * config.patience)
    page, begin, asked, inside = await context.new_page(), time.monotonic(), 0, True
    try:
        await open_page(page, config, draw_image(config.seed + number, config.pixels))
        notes.opened.append(time.monotonic() - begin)
    except Exception as error:  # of many kinds; each is counted
        inside = False
        notes.errors[f"opening the page: {one_line(error):.80}"] += 1
    await ready.wait()
    end = time.monotonic() + 60 * config.minutes
    while inside and time.monotonic() < end:
        await asyncio.sleep(draw.uniform(0, 2 * config.pause))
        begin, asked = time.monotonic(), asked + 1
        try:
            await ask(page, f"{draw.choice(QUESTIONS)} ({asked})")  # no two alike: an old answer is never taken for it
            notes.answered.append(time.monotonic() - begin)
        except Exception as error:
            notes.errors[f"asking: {one_line(error):.80}"] += 1
    await context.close()


async def watch(config, notes):
    """Note the server's memory ten times until the minutes are over."""
    for tenth in range(11):
        notes.memory.append((6 * config.minutes * tenth, memory_of(config.pid)))
        if tenth < 10:
            await asyncio.sleep(6 * config.minutes)


async def visit_all(config):
    """All visitors at once; what happened, as Notes."""
    from playwright.async_api import async_playwright
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise UserError(f"none of {', '.join(BROWSERS)} here; install one")
    notes, ready = Notes(), asyncio.Event()
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=path, args=QUIET)
        visits = [asyncio.create_task(visit(browser, number, config, notes, ready))
                  for number in range(config.visitors)]
        while len(notes.opened) + notes.errors.total() < config.visitors:
            await asyncio.sleep(0.1)
        tell(f"{len(notes.opened)} of {config.visitors} visitors are in; {config.minutes:g} minutes from now")
        ready.set()
        await asyncio.gather(*visits, *([watch(config, notes)] if config.pid else []))
        await browser.close()
    return notes


def describe(seconds):
    """Half, nineteen in twenty and all of some seconds, in words."""
    if not seconds:
        return "none"
    half, most, all_of_them = np.percentile(seconds, (50, 95, 100))
    return f"{len(seconds):,}; p50 {half:.2f} s, p95 {most:.2f} s, max {all_of_them:.2f} s"


def main(config):
    require_packages("tests/requirements.txt", "playwright")
    before = memory_of(config.pid) if config.pid else None
    notes = asyncio.run(visit_all(config))
    print(f"{config.visitors} visitors, {config.minutes:g} minutes, {config.pause:g} s between questions")
    print(f"image shown   {describe(notes.opened)}")
    print(f"answers       {describe(notes.answered)}")
    print(f"errors        {notes.errors.total()}" + "".join(
        f"; {count} {words}" for words, count in notes.errors.most_common()))
    if config.pid:
        print(f"server        {before:.0f} MB before; " + ", ".join(
            f"{megabytes:.0f} MB at {seconds:.0f} s" for seconds, megabytes in notes.memory))
    if notes.errors or not notes.answered:
        raise UserError("not every visitor was answered, see above")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
