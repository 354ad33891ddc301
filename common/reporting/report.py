"""Writes the report of a run: report.html, one file that needs no network, no script and nothing beside it."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.distillation.selection import chosen_epoch
from common.reporting import figures, label_statistics, tables
from common.reporting.pictures import pictures, snapshots
from common.reporting.run_data import Contents, gather
from common.reporting.side_by_side import side_by_side
from common.runtime.files import atomic
from common.synthesis.imageset import ANNOTATIONS, ImageSet

NAME = "report.html"
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
CLASSES = 12  # with the largest losses, and as many at the other end


def write_report(run_dir: Path, reference: Path | None = None) -> Path:
    """Writes the report into a run folder, finished or not, and returns its path.

    Args:
        run_dir: the run folder.
        reference: COCO file whose labels are shown beside those of the run's images.

    Raises:
        UserError: not a run folder, a damaged file in it, or a folder that cannot be written.
    """
    contents = gather(run_dir)
    made = _made(contents)
    made["labels"] = _label_statistics(contents.images, reference) if contents.images else None
    made["predictions"] = side_by_side(run_dir, contents)
    return write_page(run_dir / NAME, "template.html.j2", run=contents, **made)


def _made(contents: Contents) -> dict[str, Any]:
    """What the template shows besides the contents themselves; None or empty where there is nothing to show."""
    history, layers, images = contents.history, contents.results["layers"], contents.images
    chosen = chosen_epoch(history)
    losses = images.description.get("history") if images else None
    moved = [scale for scale in contents.scales if not scale.before.equal(scale.after)]
    scored = [key for key in ("fidelity", "held_out") if any(key in row for row in history)]
    rows = contents.results["rows"]
    of_masks = tables.of_masks(rows)
    return {
        "headline": tables.headline(rows),
        "masks": tables.headline(of_masks),
        "per_class": tables.per_class(rows),
        "per_class_masks": tables.per_class(of_masks),
        "class_changes": _class_changes(tables.per_class(rows)),
        "settings": tables.settings(contents.settings),
        "pictures": pictures(images) if images else [],
        "snapshots": snapshots(images) if images else [],
        "chosen": chosen,
        "stage_one": figures.stage_one(losses) if losses else None,
        "training_losses": figures.training_losses(history) if history else None,
        "selection": {key: figures.selection(history, chosen, key) for key in scored if chosen is not None},
        "scale_changes": {
            side: figures.scale_changes(contents.scales, side, layers)
            for side in dict.fromkeys(scale.side for scale in moved)
        },
        "output_errors": figures.output_errors(layers) if layers else None,
    }


def _label_statistics(images: ImageSet, reference: Path | None) -> dict[str, Any] | None:
    """The numbers and charts of the report's section; None for a set without boxes.

    Raises:
        UserError: `reference` is not a COCO detection file.
    """
    own = label_statistics.of_coco(images.directory / ANNOTATIONS, images.class_names, "this run's images")
    other = label_statistics.of_coco(reference, images.class_names) if reference else None
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
    """Caption -> chart of the classes that lost most, and of those at the other end where there are more."""
    rows = [(name, cells[-1].difference) for name, cells in per_class]
    changes = [(name, change) for name, change in rows if change is not None]
    if not changes:
        return {}
    values = [0.0, *(change for _, change in changes)]
    room = 0.05 * (max(values) - min(values)) or 0.01
    limits = (min(values) - room, max(values) + room)
    most = changes[:CLASSES]
    if len(changes) == len(most):
        return {"What each class lost or won, against full precision.": figures.class_changes(most, limits)}
    least = changes[CLASSES:][-CLASSES:]
    return {
        f"The {len(most)} classes that lost most, against full precision.": figures.class_changes(most, limits),
        f"The {len(least)} that lost least or won.": figures.class_changes(least, limits),
    }


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
