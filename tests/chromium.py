"""Headless Chromium for tests of pages, and what it complained about."""

import json
import shutil

import pytest

SETUP = "pip install '.[dev]' and apt-get install chromium chromium-driver"
# Without a network, and without looking for one.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def open_chromium(profile, width=1280, height=900):
    """A browser with an empty profile in the folder `profile`; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason=f"needs selenium: {SETUP}")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip(f"needs Chromium and its driver: {SETUP}")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    # A window is at least 500 pixels wide; a phone is not.
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return browser


def complaints(browser):
    """Severe messages in the console, and requests that failed or were answered with an error, since the last call."""
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    addresses, failed = {}, []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        event, values = message["method"], message["params"]
        if event == "Network.requestWillBeSent":
            addresses[values["requestId"]] = values["request"]["url"]
        elif event == "Network.loadingFailed" and not values.get("canceled"):
            failed.append(f"{addresses.get(values['requestId'])}: {values['errorText']}")
        elif event == "Network.responseReceived" and values["response"]["status"] >= 400:
            failed.append(f"{values['response']['url']}: {values['response']['status']}")
    return severe + failed
