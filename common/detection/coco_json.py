"""COCO detection files: one schema for evaluation, true labels and statistics.

Every mistake is found before any other work, and all of them are reported together, each with its place. What is
harmless is read with its plain meaning: ids of objects (they play no part in AP) are numbered anew, a missing or null
`iscrowd` is 0, a missing or null `area` is that of the box, sizes and ids may be written as 640.0.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic needs it before Python 3.12
)

from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from common.detection.coco_mistakes import NOTHING, Mistakes, short, shown
from common.detection.masks import check_segmentation, compact
from common.runtime.environment import give_back_freed_memory
from common.runtime.errors import UserError
from common.runtime.files import read_ordinary

log = logging.getLogger("zsqdet")
SMALLER = {"segmentation", "area", "iscrowd", "image_id", "bbox", "category_id", "id"}  # keys of an official file
CHUNK = 20_000  # rows that are validated together
LARGEST_ID, LARGEST_SIDE, LARGEST_NUMBER = 2**63, 10**6, 1e9


def _whole(value: Any) -> int:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not -LARGEST_ID <= value < LARGEST_ID:
        raise ValueError
    return value


def _side(value: Any) -> int:
    value = _whole(value)
    if not 1 <= value <= LARGEST_SIDE:
        raise ValueError
    return value


def _crowd(value: Any) -> int:
    if value is None:
        return 0
    if type(value) not in (int, float) or value not in (0, 1):
        raise ValueError
    return int(value)


def _box(box: list[float]) -> list[float]:
    if box[2] < 0 or box[3] < 0:
        raise ValueError
    return box


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    value.encode()  # a ValueError for half of a surrogate pair
    return value


Whole = Annotated[int, PlainValidator(_whole)]
Side = Annotated[int, PlainValidator(_side)]
Text = Annotated[str, PlainValidator(_text)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
Area = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1e10)]  # pycocotools leaves larger ones out


class Image(TypedDict):
    """A row of `images`; sizes in pixels."""

    id: Whole
    width: Side
    height: Side
    file_name: NotRequired[Text]


class Annotation(TypedDict):
    """A row of `annotations`; lengths in pixels of the image."""

    id: NotRequired[Any]
    image_id: Whole
    category_id: Whole
    bbox: Annotated[list[Number], Field(min_length=4, max_length=4), AfterValidator(_box)]  # x, y, width, height
    iscrowd: NotRequired[Annotated[int, PlainValidator(_crowd)]]
    area: NotRequired[Area | None]
    segmentation: NotRequired[Any]  # see `check_segmentation`


class Category(TypedDict):
    """A row of `categories`."""

    id: Whole
    name: Text


SECTIONS: dict[str, TypeAdapter[list[Any]]] = {
    "images": TypeAdapter(list[Image]),
    "annotations": TypeAdapter(list[Annotation]),
    "categories": TypeAdapter(list[Category]),
}
ALLOWED = {
    "id": "a whole number",
    "image_id": "a whole number, the id of an image",
    "category_id": "a whole number, the id of a category",
    "width": f"whole pixels, 1 to {LARGEST_SIDE}",
    "height": f"whole pixels, 1 to {LARGEST_SIDE}",
    "file_name": "the name of an image file, text",
    "name": "the name of a class, text",
    "bbox": f"four finite numbers, x, y, width and height in pixels, no size below 0, none above {LARGEST_NUMBER:g}",
    "iscrowd": "0 or 1",
    "area": "a number of square pixels from 0 to 1e10",
}


@dataclass(frozen=True)
class CocoFile:
    """A checked file. Annotations have `id` 1, 2, ..., `iscrowd` and `area`, in the order of the file."""

    path: Path
    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]

    @property
    def content(self) -> dict[str, Any]:
        """As pycocotools takes it."""
        parts = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        return {"info": {}} | parts


def read_coco(
    path: Path, *, masks: bool = False, files: bool = False, to_score: bool = False, may_be_empty: bool = False
) -> CocoFile:
    """Reads and checks a COCO detection file.

    Args:
        path: the file.
        masks: check and keep segmentations, an empty one being none; without, they are left out already while the file
            is parsed, which takes a third of the memory.
        files: every image needs a `file_name`, and no two of them may be the same.
        to_score: the same object twice is a mistake (it changes AP); otherwise it counts once, with a warning.
        may_be_empty: no images and no objects are allowed.

    Raises:
        UserError: a line for each mistake, the first 20 of them in full.
    """
    mistakes = Mistakes(path)
    raw = _parse(path, masks, mistakes)
    if not any(isinstance(raw.get(section), list) for section in SECTIONS):
        raise UserError(f"{path}: found no list {', '.join(SECTIONS)}; every COCO detection file has these")
    for section in SECTIONS:
        found = raw.get(section)
        if not isinstance(found, list):
            mistakes.add(section, shown(raw, section), "a list; every COCO detection file has one")
        elif not found and not may_be_empty:
            mistakes.add(section, short(found), "a list with something in it; here is nothing to measure")
    mistakes.stop()
    give_back_freed_memory()  # the text
    known = _known_ids(raw["images"]), _known_ids(raw["categories"])
    rows = {section: _rows(section, raw[section], mistakes) for section in SECTIONS}
    _check_images(rows["images"], files, mistakes)
    _check_unique("categories", rows["categories"], "id", mistakes)
    _check_unique("categories", rows["categories"], "name", mistakes)
    _check_annotations(rows["annotations"], *known, to_score, mistakes)
    _check_places(rows["annotations"], rows["images"], mistakes)
    if masks:
        _check_masks(rows["annotations"], rows["images"], mistakes)
    mistakes.stop()
    annotations = [row for row in rows["annotations"] if row is not None]
    for number, row in enumerate(annotations, 1):
        row["id"] = number
    return CocoFile(path, rows["images"], annotations, rows["categories"])


def _is_plain_zero(key: str, value: Any) -> bool:
    return key == "iscrowd" and type(value) is int and value == 0


def _parse(path: Path, masks: bool, mistakes: Mistakes) -> dict[str, Any]:
    """The JSON as it is, an object whose keys are not unique being a mistake.

    Raises:
        UserError: unreadable, or not JSON.
    """
    twice: list[tuple[dict[str, Any], str]] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append((built, next(key for key in keys if keys.count(key) > 1)))
        if not masks:
            built.pop("segmentation", None)
        elif "segmentation" in built:
            built["segmentation"] = compact(built["segmentation"])
        # A smaller dictionary for each of a million objects.
        if "bbox" in built and len(built) == len(pairs) and built.keys() <= SMALLER:
            return {key: value for key, value in built.items() if key != "id" and not _is_plain_zero(key, value)}
        return built

    if path.exists() and not path.is_file():  # a pipe could be read once, and would be waited for
        raise UserError(f"{path}: is no ordinary file; give a COCO JSON file")
    try:
        text = read_ordinary(path).decode("utf-8-sig")
        give_back_freed_memory()  # the bytes: 450 MB of the official train2017
        content = json.loads(text, object_pairs_hook=build)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except RecursionError as error:
        raise UserError(f"{path}: not a COCO detection file (lists in lists, too deep)") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: found {type(content).__name__}; a COCO detection file is an object with {', '.join(SECTIONS)}"
        )
    for built, key in twice:
        mistakes.add(_place(content, built), f"the key {key!r} twice", "each key once")
    return content


def _place(content: Any, wanted: dict[str, Any]) -> str:
    """Where an object is in the file."""
    todo: list[tuple[str, Any]] = [("", content)]
    while todo:
        place, value = todo.pop()
        if value is wanted:
            return place or "the whole"
        if isinstance(value, dict):
            todo += [(f"{place}.{key}" if place else key, part) for key, part in value.items()]
        elif isinstance(value, list):
            todo += [(f"{place}[{i}]", part) for i, part in enumerate(value)]
    return "an object that another one replaces"


def _rows(section: str, raw: list[Any], mistakes: Mistakes) -> list[Any]:
    """The checked rows of a section, None in the place of each that has a mistake; `raw` is used up on the way."""
    rows: list[Any] = []
    for start in range(0, len(raw), CHUNK):
        chunk = raw[start : start + CHUNK]
        raw[start : start + CHUNK] = [None] * len(chunk)
        try:
            rows += SECTIONS[section].validate_python(chunk)
        except ValidationError as error:
            # by row and field, so that a box with four wrong numbers is one mistake
            wrong = {
                tuple(found["loc"][:2]): found["type"] for found in error.errors(include_url=False, include_input=False)
            }
            bad = {loc[0] for loc in wrong}
            rows += [None if i in bad else SECTIONS[section].validate_python([row])[0] for i, row in enumerate(chunk)]
            for loc in wrong:
                _explain(section, start, chunk, loc, mistakes)
    return rows


def _explain(section: str, start: int, chunk: list[Any], loc: tuple[Any, ...], mistakes: Mistakes) -> None:
    row, place = chunk[loc[0]], f"{section}[{start + loc[0]}]"
    if len(loc) == 1:
        mistakes.add(place, short(row), "an object")
    else:
        mistakes.add(f"{place}.{loc[1]}", shown(row, loc[1]), ALLOWED[loc[1]])


def _check_unique(section: str, rows: list[Any], field: str, mistakes: Mistakes) -> None:
    first: dict[Any, int] = {}
    for i, row in enumerate(rows):
        if row is not None:
            known = first.setdefault(row[field], i)
            if known != i:
                mistakes.add(
                    f"{section}[{i}].{field}", short(row[field]), f"one of its own; {section}[{known}] has it too"
                )


def _check_images(rows: list[Any], files: bool, mistakes: Mistakes) -> None:
    _check_unique("images", rows, "id", mistakes)
    if not files:
        return
    first: dict[str, Any] = {}
    for i, row in enumerate(rows):
        if row is None:
            continue
        name = row.get("file_name")
        if name is None:
            mistakes.add(f"images[{i}].file_name", NOTHING, ALLOWED["file_name"])
            continue
        known = first.setdefault(str(PurePosixPath(name)), i)
        if known != i and rows[known]["id"] != row["id"]:  # the same id twice is reported already
            mistakes.add(
                f"images[{i}].file_name", short(name), f"one of its own; images[{known}] has it too, under another id"
            )


def _check_annotations(
    rows: list[Any], images: set[int] | None, categories: set[int] | None, to_score: bool, mistakes: Mistakes
) -> None:
    """References and repetitions; fills in what may be missing."""
    seen: dict[int, int] = {}
    repeated = 0
    for i, row in enumerate(rows):
        if row is None:
            continue
        if images is not None and row["image_id"] not in images:
            mistakes.add(
                f"annotations[{i}].image_id", shown(row, "image_id"), "the id of one of the images; none has it"
            )
        if categories is not None and row["category_id"] not in categories:
            mistakes.add(
                f"annotations[{i}].category_id",
                shown(row, "category_id"),
                "the id of one of the categories; none has it",
            )
        row.setdefault("iscrowd", 0)
        if row.get("area") is None:
            row["area"] = row["bbox"][2] * row["bbox"][3]
        key = hash((row["image_id"], row["category_id"], row["iscrowd"], row["area"], *row["bbox"]))
        known = seen.setdefault(key, i)
        if known != i and rows[known] is not None and _same(rows[known], row):
            if to_score:
                mistakes.add(f"annotations[{i}]", f"the same object as annotations[{known}]", "each object once")
            else:
                rows[i], repeated = None, repeated + 1
    if repeated:
        log.warning("%s: %d objects are in it twice; each counts once", mistakes.path, repeated)


def _known_ids(rows: list[Any]) -> set[int] | None:
    """Of images or categories; None where an id is a mistake itself, so that what names it is not another one."""
    try:
        ids = {_whole(row["id"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        return None
    return ids if len(ids) == len(rows) else None


def _same(first: Annotation, second: Annotation) -> bool:
    return all(first.get(key) == second.get(key) for key in second if key != "id")


def _check_places(rows: list[Any], images: list[Any], mistakes: Mistakes) -> None:
    """A box that has a size lies in its image, at least in part: elsewhere no detection can find it."""
    sizes = {row["id"]: (row["width"], row["height"]) for row in images if row is not None}
    for i, row in enumerate(rows):
        if row is None or row["image_id"] not in sizes:
            continue
        (x, y, width, height), (right, bottom) = row["bbox"], sizes[row["image_id"]]
        if width and height and not (x < right and y < bottom and x + width > 0 and y + height > 0):
            mistakes.add(f"annotations[{i}].bbox", shown(row, "bbox"), f"a box in its image, {right} x {bottom} pixels")


def _check_masks(rows: list[Any], images: list[Any], mistakes: Mistakes) -> None:
    """An empty segmentation is none."""
    sizes = {row["id"]: (row["height"], row["width"]) for row in images if row is not None}
    for i, row in enumerate(rows):
        if row is None:
            continue
        if not row.get("segmentation"):
            row.pop("segmentation", None)
        elif row["image_id"] in sizes:
            wrong = check_segmentation(row["segmentation"], *sizes[row["image_id"]])
            if wrong:
                mistakes.add(f"annotations[{i}].segmentation", shown(row, "segmentation"), wrong)
