"""report.html of a run: a single file without scripts or external resources."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.distillation.selection import chosen_epoch
from common.pipeline.records import protocol
from common.reporting import figures, tables
from common.reporting.pictures import pictures, snapshots
from common.reporting.run_data import Contents, boxes_of_coco, gather
from common.reporting.side_by_side import least_alike, side_by_side
from common.runtime.files import atomic
from common.synthesis.imageset import ANNOTATIONS, ImageSet

NAME = "report.html"
FILTERS = (
    "basename",
    "bits",
    "decibels",
    "duration",
    "metric",
    "percent",
    "plain",
    "signed",
    "significant",
    "title_of",
)  # functions of tables.py
CLASSES = 12  # per chart: with the largest drops, and with the smallest


def write_report(run_dir: Path, reference: Path | None = None) -> Path:
    """Writes the report into a run folder, finished or not, and returns its path.

    Args:
        run_dir: the run folder.
        reference: COCO file whose label statistics are shown for comparison.

    Raises:
        UserError: not a run folder, a damaged file in it, or an unwritable folder.
    """
    contents = gather(run_dir)
    values = _values(contents)
    values["labels"] = _label_statistics(contents.images, reference) if contents.images else None
    values["predictions"] = side_by_side(run_dir, contents)
    values["unlike"] = least_alike(run_dir, contents)
    return write_page(run_dir / NAME, "report.html.j2", run=contents, **values)


def _values(contents: Contents) -> dict[str, Any]:
    """What the templates show besides the run itself; None or empty if not available."""
    history, layers, images = contents.history, contents.results["layers"], contents.images
    chosen = chosen_epoch(history)
    losses = images.description.get("history") if images else None
    moved = [scale for scale in contents.scales if not scale.before.equal(scale.after)]
    scored = [key for key in ("fidelity", "held_out") if any(key in row for row in history)]
    rows = contents.results["rows"]
    of_masks = tables.of_masks(rows)
    alike = (contents.results.get("fidelity") or {}).get("rows", [])
    return {
        "headline": tables.headline(rows),
        "fidelity": tables.headline(alike),
        "few_objects": tables.FEW,
        "fidelity_classes": sorted(tables.per_class(alike), key=lambda entry: entry[1][-1].value or 0.0),
        "masks": tables.headline(of_masks),
        "per_class": tables.per_class(rows),
        "per_class_masks": tables.per_class(of_masks),
        "class_changes": _class_changes(tables.per_class(rows)),
        "settings": tables.settings(contents.settings),
        "pictures": pictures(images) if images else [],
        "snapshots": snapshots(images) if images else [],
        "chosen": chosen,
        "synthesis_losses": figures.synthesis_losses(losses) if losses else None,
        "training_losses": figures.training_losses(history) if history else None,
        "selection": {key: figures.selection(history, chosen, key) for key in scored if chosen is not None},
        "scale_changes": {
            side: figures.scale_changes(contents.scales, side, layers)
            for side in dict.fromkeys(scale.side for scale in moved)
        },
        "output_errors": figures.output_errors(layers) if layers else None,
    }


def _label_statistics(images: ImageSet, reference: Path | None) -> dict[str, Any] | None:
    """Numbers and charts of the label statistics; None for a set without boxes.

    Raises:
        UserError: `reference` is not a COCO detection file.
    """
    own = boxes_of_coco(images.directory / ANNOTATIONS, images.class_names, "this run")
    other = boxes_of_coco(reference, images.class_names) if reference else None
    if not own.boxes:
        return None
    sets = [own, other] if other and other.boxes else [own]
    return {
        "boxes": own.boxes,
        "images": own.images,
        "per_image": own.per_image,
        "reference": other,
        "sizes": figures.box_sizes(sets),
        "counts": figures.box_counts(sets),
        "positions": figures.box_positions(sets),
        "classes": figures.class_shares(sets, images.class_names),
    }


def _class_changes(per_class: list[tuple[str, list[tables.Cell]]]) -> dict[str, str]:
    """Caption -> chart of the classes with the largest drops and, if there are more, of those with the smallest."""
    rows = [(name, cells[-1].difference) for name, cells in per_class]
    changes = [(name, change) for name, change in rows if change is not None]
    if not changes:
        return {}
    values = [0.0, *(change for _, change in changes)]
    room = 0.05 * (max(values) - min(values)) or 0.01
    limits = (min(values) - room, max(values) + room)
    most = changes[:CLASSES]
    if len(changes) == len(most):
        return {"Change of AP per class, against full precision.": figures.class_changes(most, limits)}
    least = changes[CLASSES:][-CLASSES:]
    return {
        f"The {len(most)} classes with the largest drop of AP, against full precision.": figures.class_changes(
            most, limits
        ),
        f"The {len(least)} classes with the smallest drop, or a gain.": figures.class_changes(least, limits),
    }


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Renders a template into a file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    page = _templates().get_template(template).render(tables=tables, protocol=protocol, **values)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


@cache
def _templates() -> Environment:
    """The templates, each of which is compiled once."""
    # Names of classes, layers and folders come from untrusted files, so everything is escaped.
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update({name: getattr(tables, name) for name in FILTERS})
    templates.tests["is_float"] = tables.is_float
    return templates
