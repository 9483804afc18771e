"""Pages as a parser and a real browser see them: headless Chromium, driven over WebDriver."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest

HOSTILE = "<img src=x onerror=alert(1)>\"'&</title><script>alert(2)</script>\x1b[31m\u202e"
CHROMIUM = [shutil.which(name) for name in ("chromium", "chromedriver")]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


class Page(HTMLParser):
    """Every tag of a page with its attributes, and all its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def call(method, url, body=None):
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=20) as answer:
        return json.load(answer)["value"]


def ask(browser, script):
    """What a script returns in the page that is shown."""
    return call("POST", f"{browser}/execute/sync", {"script": script, "args": []})


def show(browser, path, width, scheme="light", height=900):
    """Open a page in a window so large, in a colour scheme; what the browser logged before is forgotten."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    for command, params in (("setDeviceMetricsOverride", metrics), ("setEmulatedMedia", media)):
        call("POST", f"{browser}/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": params})
    for kind in ("browser", "performance"):
        call("POST", f"{browser}/se/log", {"type": kind})
    call("POST", f"{browser}/url", {"url": path.as_uri()})


def complaints(browser):
    """What the browser has logged of the page."""
    return call("POST", f"{browser}/se/log", {"type": "browser"})


def fetched(browser):
    """The addresses that the page asked for, but those that are data themselves."""
    events = [json.loads(e["message"])["message"] for e in call("POST", f"{browser}/se/log", {"type": "performance"})]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


@contextlib.contextmanager
def open_browser(profile):
    """The address of a WebDriver session in headless Chromium, which keeps its profile in that folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([CHROMIUM[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": CHROMIUM[0]}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
    base, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 10
    try:
        while True:
            try:
                call("GET", f"{base}/status")
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.05)
        session = call("POST", f"{base}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        yield f"{base}/session/{session}"
        call("DELETE", f"{base}/session/{session}")
    finally:
        driver.terminate()
        driver.wait(10)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """The address of a WebDriver session in headless Chromium."""
    if not all(CHROMIUM):
        assert not os.environ.get("CI"), "CI looks at the report in a browser: install chromium and chromium-driver"
        pytest.skip("no chromium or chromedriver on the PATH: the report is not looked at in a browser")
    with open_browser(tmp_path_factory.mktemp("profile")) as address:
        yield address
