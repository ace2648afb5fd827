# SPDX-License-Identifier: Apache-2.0
"""The system's chromium, driven by playwright, whose own browsers are not used."""

import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = "VSRAQ_BROWSER_REQUIRED"  # set by `make test-report`: missing is a failure


def missing():
    """Why there is no browser, or None."""
    if any(shutil.which(name) for name in NAMES):
        return None
    return (
        f"none of {', '.join(NAMES)} is installed; run `apt-get install chromium`, and "
        "then `make test-report`"
    )


@contextmanager
def chromium():
    if reason := missing():
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    path = next(found for name in NAMES if (found := shutil.which(name)))
    # root has no sandbox; screenshots need no graphics card
    arguments = ["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()
