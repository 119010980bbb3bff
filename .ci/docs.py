"""Gathers the pages of the site in build/docs: those of docs/ as they are, and those in the root of the repository."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {f"{name}.md": f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def in_site(link: str) -> str:
    """Where the file of a link in a root page lies in the site, whose root is docs/."""
    return PAGES.get(link, link.removeprefix("docs/"))


def gather(site: Path) -> None:
    """Fill a folder with the pages, and with what the root pages link and its neighbours: a card has its pictures."""
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "docs", site)
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        (site / page).write_text(LINK.sub(lambda link: in_site(link[0]), text), encoding="utf-8")
        for linked in {Path(link) for link in LINK.findall(text)}:
            if linked.parts[0] in ("examples", "model_cards"):
                (site / linked.parent).mkdir(parents=True, exist_ok=True)
                for file in (ROOT / linked.parent).iterdir():
                    if file.suffix in (".ipynb", ".md", ".png", ".yaml"):
                        shutil.copy(file, site / linked.parent)


if __name__ == "__main__":
    gather(ROOT / "build" / "docs")
