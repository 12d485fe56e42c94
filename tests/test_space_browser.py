"""The page on which people try a model, served by the real command and used in headless Chromium.

    apt-get install chromium chromium-driver
    python -m pytest -m slow tests/test_space_browser.py

Screenshots, at the width of a desktop and of a phone, are left in the folder that SCREENSHOTS names, by default in
pytest's temporary one.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import complaints, open_chromium
from PIL import Image
from test_space import noise_image, save_thinking_chat_model, vision_folder
from tiny_chat_model import ANSWERS
from training_runs import REPOSITORY

from hf_models.convnextv2_fcmae import ConvNextV2FcmaeForImageClassification, ConvNextV2FcmaeForPreTraining
from hub_cards.space import build_space

pytestmark = pytest.mark.slow

SIZES = ((1280, 900), (390, 844))  # a desktop and a phone
PATIENCE = 600  # seconds, on a machine that has other work
# An app as the Hub runs it: there is no package of ours.
STRANGER = """
import runpy, sys
for ours in ("hf_models", "training", "hub_cards"):
    sys.modules[ours] = None
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    save_thinking_chat_model(folder)
    return folder


@contextmanager
def served(words, port, cwd, log, **environment):
    """The address of a page that the command serves on `port` meanwhile."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    with open(log, "w") as file:
        server = subprocess.Popen(words, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"The page was not served:\n{log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield url
        assert "Traceback" not in log.read_text()
    except Exception:
        print(log.read_text())
        raise
    finally:
        server.terminate()
        server.wait(timeout=30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def page_of(folder, tmp_path, *words):
    port = free_port()
    command = [sys.executable, "-m", "hub_cards.space", str(folder), "--port", str(port), *words]
    return served(command, port, REPOSITORY, tmp_path / "log")


@contextmanager
def opened(url, size, tmp_path):
    """The page in a browser of that size; it must not have complained in the end."""
    browser = open_chromium(tmp_path / f"profile_{size[0]}", *size)
    try:
        browser.get(url)
        yield browser
        assert complaints(browser) == []
    finally:
        browser.quit()


def wait(browser, condition, what):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not appear; the page says: {browser.find_element('tag name', 'body').text}")


def find(browser, css, what=None):
    return wait(browser, lambda: browser.find_elements("css selector", css), what or css)


def screenshot(browser, tmp_path, name):
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    width = browser.execute_script("return innerWidth")
    file = folder / f"{name}_{width}.png"
    browser.save_screenshot(str(file))
    with Image.open(file) as picture:
        assert len(picture.convert("L").getcolors()) > 10  # something is on it
    # Nothing is wider than the window.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def texts(browser, css):
    """At once, because the page replaces its elements while it is read."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText)", css
    )


def bot_texts(browser):
    return texts(browser, ".message.bot")


def test_a_chat_streams_an_answer_and_folds_thoughts(chat_folder, tmp_path):
    with page_of(chat_folder, tmp_path) as url:
        for size in SIZES:
            with opened(url, size, tmp_path) as browser:
                use_chat(browser, url)
                screenshot(browser, tmp_path, "chat")


def use_chat(browser, url):
    (box, *_) = find(browser, "textarea[placeholder='Type a message']")
    browser.execute_script(
        """
        window.seen = [];
        const look = () => document.querySelectorAll('.message.bot').forEach(message => {
            if (window.seen.at(-1) !== message.innerText) window.seen.push(message.innerText);
        });
        new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
        """
    )
    question, answer = next(iter(ANSWERS.items()))
    box.send_keys(question + "\n")
    wait(browser, lambda: any(answer in text for text in bot_texts(browser)), "the answer")
    seen = browser.execute_script("return window.seen")
    grown = {text.strip() for text in seen if text.strip() and answer.startswith(text.strip())}
    assert len(grown) > 2, seen  # it came in pieces
    browser.get(url)  # a conversation of its own
    (box, *_) = find(browser, "textarea[placeholder='Type a message']")
    box.send_keys("What is 4+4?\n")
    wait(browser, lambda: "Reasoning" in " ".join(bot_texts(browser)), "the thoughts' title")
    wait(browser, lambda: bot_texts(browser)[-1].strip().endswith("8"), "the answer after thoughts")
    # They fold when they are done.
    wait(browser, lambda: "4 and 4 is 8" not in browser.find_element("tag name", "body").text, "folded thoughts")


def test_the_space_of_a_base_model_runs_where_our_packages_are_not(chat_folder, tmp_path):
    (chat_folder / "run.json").write_text('{"task": "pretrain_lm", "status": "finished"}')
    try:
        space, port = build_space(chat_folder, tmp_path / "space", "me/tiny"), free_port()
    finally:
        (chat_folder / "run.json").unlink()
    home = {"MODEL": str(chat_folder), "GRADIO_SERVER_PORT": str(port), "HF_HOME": str(tmp_path / "home")}
    with served([sys.executable, "-c", STRANGER], port, space, tmp_path / "log", **home) as url:
        for size in SIZES:
            with opened(url, size, tmp_path) as browser:
                (box, *_) = find(browser, "textarea")
                box.send_keys("What is")
                find(browser, "button.primary")[0].click()
                wait(browser, lambda box=box: len(box.get_property("value")) > len("What is"), "a continuation")
                assert box.get_property("value").startswith("What is")
                (link,) = browser.find_elements("link text", "Its card")
                assert link.get_attribute("href") == "https://huggingface.co/me/tiny"
                screenshot(browser, tmp_path, "text")


def test_an_image_is_uploaded_masked_reconstructed_and_classified(tmp_path):
    kinds = ConvNextV2FcmaeForImageClassification, ConvNextV2FcmaeForPreTraining
    folder = vision_folder(tmp_path / "tiny-vision", *kinds)
    noise_image("RGBA", (90, 60)).save(tmp_path / "image.png")
    with page_of(folder, tmp_path) as url:
        for size in SIZES:
            with opened(url, size, tmp_path) as browser:
                use_image(browser, tmp_path / "image.png")
                screenshot(browser, tmp_path, "vision")


def use_image(browser, file):
    def told():
        return next((text for text in texts(browser, ".prose") if "patches of 16" in text), "")

    (upload, *_) = find(browser, "input[type=file]")
    upload.send_keys(str(file))
    wait(browser, lambda: told().startswith("10 of 16"), "the number of removed patches")
    (number, *_) = find(browser, "input[type=number]")
    browser.execute_script("arguments[0].value = ''", number)
    number.send_keys("0.25\t")
    wait(browser, lambda: told().startswith("4 of 16"), "fewer removed patches")
    sources = "return [...document.querySelectorAll('img')].map(image => image.src)"
    wait(browser, lambda: len(set(browser.execute_script(sources))) >= 4, "the image and three pictures")
    wait(browser, lambda: len(browser.find_elements("css selector", "[data-testid$='confidence-set']")) == 5, "labels")
