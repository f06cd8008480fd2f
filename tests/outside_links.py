"""Asks for every link of pages, docstrings, CITATION.cff and pyproject.toml that leads out of the repository.

python tests/outside_links.py
"""

import http.client
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A link ends before a bracket, but for a pair of round ones in it, and before the \n of a line in a notebook.
LINK = re.compile(r"https?://(?:[^\s<>\"'`\[\](){}|\\]|\([^\s<>\"'`\[\](){}|\\]*\))+")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
FILES = ("*.md", "docs/*.rst", "docs/*.ipynb", "attnax/*.py", "CITATION.cff", "pyproject.toml")
BUSY = (429, 500, 502, 503, 504)
REFUSES_PROGRAMS = 403  # of some sites, whose page is there for people


def links(text):
    """The addresses in a text, without the punctuation behind them; those in blocks of code are examples."""
    return {link.rstrip(".,;:!?") for link in LINK.findall(CODE.sub("", text))}


def wrong(link, pause):
    """Why an address cannot be read, or None. A server that is busy or silent is asked twice more, after pauses (s)."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (links of Attnax)"})
    reason = None
    for wait in (0, pause, 2 * pause):
        time.sleep(wait)
        try:
            with urllib.request.urlopen(request, timeout=30):
                return None
        except urllib.error.HTTPError as error:
            if error.code == REFUSES_PROGRAMS:
                return None
            reason = f"{error.code} {error.reason}"
            if error.code not in BUSY:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    return reason


def without_anchor(link):
    return link.partition("#")[0]


def main(pages, pause=20.0):
    """Prints the links of pages that cannot be read; returns the exit code."""
    found = sorted({(link, page.name) for page in pages for link in links(page.read_text())})
    once = sorted({without_anchor(link) for link, _ in found})  # an anchor is not sent
    with ThreadPoolExecutor(8) as threads:
        reasons = dict(zip(once, threads.map(lambda link: wrong(link, pause), once), strict=True))
    broken = [f"{page}: {link}: {reason}" for link, page in found if (reason := reasons[without_anchor(link)])]
    print("\n".join([*broken, f"{len(once)} pages asked for, {len(broken)} links broken."]))
    return bool(broken)


if __name__ == "__main__":
    tracked = subprocess.run(["git", "ls-files", *FILES], cwd=ROOT, capture_output=True, text=True, check=True)
    sys.exit(main([ROOT / name for name in tracked.stdout.splitlines()]))
