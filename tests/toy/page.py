"""HTML pages as tests read them."""

import base64
import io
from html.parser import HTMLParser
from xml.etree import ElementTree

from PIL import Image

VOID = {"meta", "img", "br", "image", "rect"}  # elements without an end


class Page(HTMLParser):
    """A parsed page: all elements, and for each section its text and the texts of its tables' cells."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.places, self.text, self.rows = [], [], {}, {}
        self.section, self.cell, self.open = "header", None, []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.places.append(self.section)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.section = attributes["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()
        if tag in ("td", "th"):
            self.rows[self.section][-1].append(" ".join(" ".join(self.cell).split()))
            self.cell = None

    def handle_data(self, data):
        self.text[self.section] = " ".join((self.text.get(self.section, "") + " " + data).split())
        if self.cell is not None:
            self.cell.append(data)

    def attributes(self, tag, section=None):
        found = zip(self.tags, self.places, strict=True)
        return [attributes for (name, attributes), place in found if name == tag and section in (None, place)]

    def check_alone(self):
        """Nothing is loaded from outside, nothing runs, and every image can be decoded."""
        assert self.open == []
        assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in self.tags}
        assert "http://" not in self.source
        assert "https://" not in self.source
        targets = {f"#{attributes['id']}" for _, attributes in self.tags if "id" in attributes}
        assert {attributes["href"] for attributes in self.attributes("a")} <= targets
        for attributes in self.attributes("img") + self.attributes("image"):
            header, _, content = (attributes.get("src") or attributes["href"]).partition(",")
            assert header in ("data:image/svg+xml;base64", "data:image/jpeg;base64")
            content = base64.b64decode(content, validate=True)
            if "svg" in header:
                ElementTree.fromstring(content)
            else:
                Image.open(io.BytesIO(content)).load()
