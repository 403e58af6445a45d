"""What every page of the project must hold to."""

import re
from html.parser import HTMLParser

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Tags(HTMLParser):
    """Collects the tags and ids of a page and checks that they nest."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.wrong = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def assert_well_formed(page):
    """Tags nest and are closed, and no id stands twice."""
    tags = Tags(page)
    assert tags.wrong == []
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))


def assert_asks_for_nothing(page):
    """The page needs no network and may not use it."""
    tags = Tags(page).tags
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in tags
    assert {tag for tag, _ in tags}.isdisjoint(
        {"script", "img", "iframe", "object", "embed", "audio", "video", "base"}
    )
    addresses = [
        v for _, attrs in tags for key, v in attrs.items() if key in ("src", "href", "xlink:href", "action")
    ]
    assert {address for address in addresses if not address.startswith("#")} == {"data:,"}
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
