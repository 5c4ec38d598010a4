"""Open pages in a real headless browser and report what a reader would stumble over.

    python scripts/check_pages.py report.html …  [--pictures FOLDER]

Every page is opened at desktop (1,280 px) and phone (390 px) width, light and dark, without script. Reported are errors
and warnings of the console, requests to anything but the file itself, content wider than the window, at desktop width
tables that are clipped in their box, and text whose contrast against the page is below 4.5. Needs Chromium (or the program that CHROMIUM names) and `pip install playwright`.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

WIDTHS = {"desktop": 1280, "phone": 390}
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

# What sticks out of the window, and which texts are too faint. Runs in the browser; the page itself has no script.
_FAULTS = """() => {
  const found = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width)
    found.push(`the page is ${document.documentElement.scrollWidth} px wide in a window of ${width}`);
  if (width > 1000) for (const e of document.querySelectorAll('.scroll'))
    if (e.scrollWidth > e.clientWidth + 1) found.push(`a table or figure of ${e.scrollWidth} px in a box of ${e.clientWidth}`);
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126*v[0] + 0.7152*v[1] + 0.0722*v[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c && !/, 0\\)$/.test(c) && c !== 'transparent') return c; } return 'rgb(255,255,255)'; };
  for (const e of document.querySelectorAll('h1,h2,p,li,td,th,dd,dt,code,figcaption,b,.line>span')) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const a = light(getComputedStyle(e).color), b = light(behind(e));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push(`contrast ${contrast.toFixed(2)} of "${e.textContent.trim().slice(0, 40)}"`);
  }
  return found;
}"""


def browser_program() -> str | None:
    """The browser to use, or None where there is none."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def faults(page_file: Path, *, program: str, pictures: Path | None = None) -> list[str]:
    """Everything that is wrong with a page, in sentences; screenshots of each view into `pictures`."""
    from playwright.sync_api import sync_playwright

    found: list[str] = []
    address = page_file.resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for device, width in WIDTHS.items():
            for scheme in ("light", "dark"):
                view = f"{page_file.name}, {device}, {scheme}"
                context = browser.new_context(
                    viewport={"width": width, "height": 900 if device == "desktop" else 844},
                    color_scheme=scheme,
                    is_mobile=device == "phone",
                    device_scale_factor=1 if device == "desktop" else 2,
                )
                page = context.new_page()
                page.on("console", lambda told, view=view: found.append(f"{view}: console: {told.text}"))
                page.on("pageerror", lambda error, view=view: found.append(f"{view}: error: {error}"))
                page.on(
                    "request",
                    lambda asked, view=view: (
                        None
                        if asked.url == address or asked.url.startswith("data:")
                        else found.append(f"{view}: loads {asked.url}")
                    ),
                )
                page.goto(address)
                for folded in page.query_selector_all("details"):
                    folded.evaluate("element => element.open = true")
                found += [f"{view}: {fault}" for fault in page.evaluate(_FAULTS)]
                if pictures is not None:
                    name = f"{page_file.parent.name}_{page_file.stem}_{device}_{scheme}.png"
                    page.screenshot(path=str(pictures / name), full_page=True)
                context.close()
        browser.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()
    program = browser_program()
    if program is None:
        print(f"no browser found ({', '.join(PROGRAMS)}); install one or name it with CHROMIUM=", file=sys.stderr)
        return 2
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
    wrong = [fault for page in given.pages for fault in faults(page, program=program, pictures=given.pictures)]
    for fault in wrong:
        print(fault)
    print(f"{len(given.pages)} pages in {2 * len(WIDTHS)} views each: {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
