"""From a matplotlib figure to SVG that may stand in a page beside others: no ids that clash, colours of the page.

Nothing that a page does not need is left: no metadata, no fonts, no widths; text stays text.
"""

from __future__ import annotations

import re
from hashlib import sha256
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from retrofit.report.html.colours import painted
from retrofit.report.html.words import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPACE = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
FAMILY = re.compile(r"font-family: [^;]*;? ?")
UNSAID = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def inline(figure: Figure, title: str) -> str:
    """SVG for a page; the title is read out to whoever does not see it."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata=UNSAID, transparent=True)
    drawn = buffer.getvalue()
    root = ElementTree.fromstring(drawn)
    _own_names(root, sha256(f"{clean(title)}\n{drawn}".encode()).hexdigest()[:8])
    for element in root.iter():
        element.tag = element.tag.removeprefix(SPACE)
        element.text = None if element.tag != "text" else element.text
        element.tail = None
        if style := element.get("style"):
            element.set("style", painted(FAMILY.sub("", style)))
        if path := element.get("d"):
            element.set("d", " ".join(path.split()))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": clean(title)}
    return ElementTree.tostring(root, encoding="unicode")


def _own_names(root: ElementTree.Element, name: str) -> None:
    """Give what is referred to by an id one that no other picture has, and take the other ids away."""
    for parent in root.iter():
        for child in [one for one in parent if one.tag.removeprefix(SPACE) in ("metadata", "style")]:
            parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(value for one in root.iter() for value in _references(one))))
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in used:
            element.set("id", f"{name}-{own}")
        if link := element.attrib.pop(LINK, None):
            element.set("href", f"#{name}-{link.removeprefix('#')}")
        if clip := element.get("clip-path"):
            element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))


def _references(element: ElementTree.Element) -> list[str]:
    return [element.get(LINK, ""), element.get("clip-path", "")]
