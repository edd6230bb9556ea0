"""The fixture `chromium`: a real headless browser, or a skip that says what to install.

A test module asks for it with `pytest_plugins = ["browser"]`, and opens pages by `chromium.new_page()`. Debian's
Chromium plays H.264, which the builds that playwright would download do not.
"""

import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")  # a longer life would leave playwright's event loop running under other tests
def chromium():
    """A `playwright.sync_api.Browser`; every `new_context()` or `new_page()` of it starts without storage."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[test]'")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser ({', '.join(NAMES)}): apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox by default, as a container needs it; a busy machine takes its time.
        browser = playwright.chromium.launch(executable_path=path, timeout=180_000)
        yield browser
        browser.close()
