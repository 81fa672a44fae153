"""One self-contained HTML page from the documents of a folder.

Nothing is loaded from a network: plotly's script, compressed, and all pictures lie within the page.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from vitfold.errors import ReportError
from vitfold.report.headlines import headlines
from vitfold.report.loading import Folder
from vitfold.report.maps import Mapped
from vitfold.report.mosaic import Traced
from vitfold.report.sections import build_sections
from vitfold.version import __version__
from vitfold.visible import visible

MOST_BYTES = 5_000_000
_LONE = re.compile("[\ud800-\udfff]")
"""How Python holds bytes of file names that are no UTF-8, and that no page can hold."""


@dataclass(slots=True)
class _Figures:
    """The figures of the page, numbered as they are placed."""

    specs: list[dict[str, Any]] = field(default_factory=list)

    def place(self, plot: Any) -> dict[str, Any]:
        spec = json.loads(plot.figure.to_json(remove_uids=True))
        self.specs.append({"id": f"plot-{len(self.specs)}", "data": spec["data"], "layout": spec["layout"]})
        return {"id": self.specs[-1]["id"], "title": plot.title, "height": plot.height}


def render_page(
    folder: Folder, *, title: str, command: str, traced: Sequence[Traced | Mapped] = (), most_bytes: int = MOST_BYTES
) -> str:
    """Return the page.

    Raises:
        ReportError: if it would be larger than `most_bytes`: then there are too many pictures.
    """
    sections = build_sections(folder, traced, command)
    found = _Figures()
    placed = [
        {"section": section, "plots": [found.place(plot) for plot in section.plots], "id": f"s{i}"}
        for i, section in enumerate(sections)
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_asset("page.html.j2"))
    page: str = template.render(
        title=title,
        version=__version__,
        headline=headlines(folder),
        sections=placed,
        specs=_safe_json(found.specs),
        style=_asset("page.css"),
        script=_asset("page.js"),
        plotly=_packed_plotly() if found.specs else "",
    )
    page = _LONE.sub(lambda found: visible(found[0]), page)
    size = len(page.encode("utf-8"))
    if size > most_bytes:
        raise ReportError(
            f"the page would have {size / 1e6:.1f} MB, more than {most_bytes / 1e6:g}; give fewer --photos, or move a "
            "sheet.png elsewhere"
        )
    return page


def _safe_json(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files("vitfold.report").joinpath(name).read_text(encoding="utf-8")


def _packed_plotly() -> str:
    """plotly.js of the basic charts, gzipped, in base64; the page unpacks it.

    It starts four times as fast as the whole library, which plotly's Python package carries.
    """
    packed = resources.files("vitfold.report").joinpath("plotly-basic.min.js.gz").read_bytes()
    return base64.b64encode(packed).decode("ascii")
