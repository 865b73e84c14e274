"""Drawings and pages, taken apart."""

import math
import re
import xml.etree.ElementTree as ET


def elements(svg: str, css_class: str) -> list[ET.Element]:
    """Elements of a drawing with a class, after a look at every number in it."""
    root = ET.fromstring(svg)
    for element in root.iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "d", "points", "viewBox"):
            for number in re.findall(r"nan|inf|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", element.get(name) or ""):
                assert math.isfinite(float(number)), ET.tostring(element)
    return [element for element in root.iter() if css_class in (element.get("class") or "").split()]


def figure_marks(page: str) -> dict[str, list[ET.Element]]:
    """Marks of the figures of a page, by the figure's title."""
    figures = re.findall(r"<figure>(<svg.*?</svg>)<figcaption><b>(.*?)\.</b>", page, re.DOTALL)
    return {title: elements(svg, "mark") for svg, title in figures}
