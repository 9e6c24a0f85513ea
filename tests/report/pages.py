"""How tests move through a page of the report."""

from __future__ import annotations

import json

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


def opened(driver, path, hash_="#traces", width=1400, height=1000, scheme="light"):
    """The page, fresh, at an address and on a screen; what earlier pages logged is dropped."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(f"file://{path}{hash_}")
    WebDriverWait(driver, 300).until(lambda d: d.execute_script("return performance.getEntriesByName('report-ready').length"))
    return driver


def complaints(driver):
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requested(driver):
    """Addresses asked for, the file itself left out."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith(("file://", "about:"))]


def text(driver, selector):
    return driver.find_element(By.CSS_SELECTOR, selector).text


def soon(driver, selector, expected):
    """Wait until an element says what is expected: the page follows its address, which is told in a moment of its own."""
    redrawn = [StaleElementReferenceException]  # between finding and reading
    WebDriverWait(driver, 300, ignored_exceptions=redrawn).until(
        lambda d: expected in text(d, selector), f"{expected} in {selector}"
    )


def chosen(driver, **fields):
    """Choose values in the fields of the open view, by the name that the address has for each."""
    for name, value in fields.items():
        field = driver.find_element(By.CSS_SELECTOR, f"main > section:not([hidden]) [data-name={name}]")
        field.find_element(By.CSS_SELECTOR, f"option[value='{value}']").click()
