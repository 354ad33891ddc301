"""HTML pages out of templates."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import atomic
from common.reporting import tables

FILTERS = (
    "basename",
    "bits",
    "duration",
    "metric",
    "percent",
    "plain",
    "signed",
    "significant",
    "title_of",
)  # functions of tables.py


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Renders a template of this folder into a file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    # Names of classes, layers and folders come from files of others, so everything is escaped.
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update({name: getattr(tables, name) for name in FILTERS})
    templates.tests["is_float"] = tables.is_float
    page = templates.get_template(template).render(tables=tables, **values)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path
