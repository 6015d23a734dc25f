"""The README's pictures: two pages over the demo's index.

python tests/browser/pictures.py          # after `make demo` and `make browser`
"""

from __future__ import annotations

from urllib.parse import urlencode

from browsing import ROOT, Window, chromium_path, serving
from playwright.sync_api import sync_playwright

SAE = "smollm2-135m-res/layer_15/width_4k/average_l0_41"
PAGES = {
    "sae": f"/sae?{urlencode({'sae': SAE})}",
    "feature": f"/feature?{urlencode({'sae': SAE, 'feature': 100})}",
}


def main() -> None:
    """Write docs/explorer-*.png, light, 1,200 by 860."""
    with serving(ROOT / "out/demo/index") as site, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path())
        for name, address in PAGES.items():
            page = browser.new_page(viewport={"width": 1200, "height": 860})
            Window(page, site.base).open(address)
            page.screenshot(path=ROOT / f"docs/explorer-{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
