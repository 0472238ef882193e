"""The first screen of a run's report as a PNG, for README.md.

python ci/picture.py default docs/verdict.png
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import runs

WIDTH, HEIGHT = 1100, 700  # pixels; the PNG stays under 200 kB


def main(run: str, out: str) -> int:
    from playwright.sync_api import sync_playwright

    report = runs.run_folder(run) / "report.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.screenshot(path=out)
        browser.close()
    print(f"{out}: {Path(out).stat().st_size:,} bytes of {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
