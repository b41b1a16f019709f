"""Look at the built book as a reader does: headless Chromium, over a local server or from disk."""

import shutil
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from axe_playwright_python.sync_playwright import Axe

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
SERIOUS = ("serious", "critical")
# Mean and spread of an image's pixels: a blank one has no spread.
SPREAD = """image => {
  const canvas = document.createElement('canvas');
  canvas.width = 64; canvas.height = 64;
  const context = canvas.getContext('2d');
  context.fillStyle = 'white'; context.fillRect(0, 0, 64, 64);
  context.drawImage(image, 0, 0, 64, 64);
  const data = context.getImageData(0, 0, 64, 64).data;
  return Math.max(...data) - Math.min(...data.filter((_, i) => i % 4 < 3));
}"""


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def served(folder: Path):
    """The folder on a free loopback port."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@contextmanager
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield opened
        finally:
            opened.close()


def problems_of(page, address: str) -> list[str]:
    """Console errors, failed requests, images that are missing or blank, and barriers that axe-core finds, of one page."""
    found: list[str] = []
    page.on("console", lambda message: found.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("requestfailed", lambda request: found.append(f"failed: {request.url}"))
    page.goto(address, wait_until="networkidle")
    for image in page.query_selector_all("article img"):
        source = image.get_attribute("src")
        if not image.evaluate("image => image.complete && image.naturalWidth > 0"):
            found.append(f"image missing: {source}")
        elif image.evaluate(SPREAD) < 30:
            found.append(f"image blank: {source}")
        if not image.get_attribute("alt"):
            found.append(f"image without alt text: {source}")
    violations = Axe().run(page, options={"preload": False}).response["violations"]
    return found + [
        f"accessibility: {v['id']}: {v['nodes'][0]['html'][:200]}" for v in violations if v["impact"] in SERIOUS
    ]
