"""Check that every relative link in the Markdown pages leads to a file, and to a heading in it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "examples").glob("*.md")]

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Describe each link of a page that leads nowhere; links to other sites are not followed."""
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            broken.append(f"{page.relative_to(ROOT)}: no file {target}")
        elif anchor and anchor not in anchors(file):
            broken.append(f"{page.relative_to(ROOT)}: no heading {target}")
    return broken


def main() -> None:
    """Print the broken links and exit with 1 if there are any."""
    broken = [line for page in PAGES for line in broken_links(page)]
    print("\n".join(broken) or f"links of {len(PAGES)} pages: all found")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
