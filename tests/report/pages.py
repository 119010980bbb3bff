"""Reports as tests read them."""

import re
from html.parser import HTMLParser
from pathlib import Path

CARDS = Path(__file__).parents[2] / "model_cards"


class Page(HTMLParser):
    """tags: (name, attributes) of all elements. headings: their levels. texts: all text outside of styles."""

    def __init__(self, text: str):
        super().__init__()
        self.source, self.tags, self.texts, self._inside = text, [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside != "style" and data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def headings(self) -> list[int]:
        return [int(tag[1]) for tag, _ in self.tags if re.fullmatch("h[1-6]", tag)]

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def outside(self) -> list[str]:
        """What the page refers to beyond itself."""
        names = ("src", "href", "srcset", "action", "data", "poster", "background")
        found = [about[name] for _, about in self.tags for name in names if name in about]
        found += re.findall(r"url\(\s*['\"]?([^)]*)", self.source) + re.findall(r"@import[^;]*", self.source)
        return [x for x in found if not re.match(r"data:image/png;base64,|#", x)]


def assert_readable(page: Page):
    """What every reader needs, also one who listens or prints."""
    assert page.outside == [] and not page.all("script")
    assert page.headings.count(1) == 1 and page.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.all("html")[0]["lang"] == "en" and page.all("title")
    assert all(len(image["alt"]) > 15 and image["width"] for image in page.all("img"))
    assert page.all("th") and all(head["scope"] in ("row", "col") for head in page.all("th"))
    names = [about["id"] for _, about in page.tags if "id" in about]
    assert all(link["href"][1:] in names for link in page.all("a"))
