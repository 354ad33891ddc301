"""Subset of a COCO dataset, for baselines on few real images.

python -m tools.subset COCO/annotations/instances_train2017.json COCO/images/train2017 COCO/first_2k --count 2366

`--how first` takes the first images by file name, as the published code does (2366 are its 2 % of train2017), `random`
samples uniformly, and `stratified` balances the classes. OUT gets annotations.json and images/ with links to the files
(`--copy`: copies).
"""

import argparse
import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.runtime.errors import Parser, UserError
from common.runtime.files import atomic, read_json, write_json
from tools import report


def choose(content: dict[str, Any], count: int, how: str, seed: int = 0) -> list[dict[str, Any]]:
    """Selected images of a COCO file, sorted by file name.

    Args:
        content: of the file.
        count: number of images.
        how: first, random or stratified.
        seed: of random and stratified.

    Raises:
        UserError: the dataset has fewer images.
    """
    images = sorted(content["images"], key=lambda image: image["file_name"])
    if not 1 <= count <= len(images):
        raise UserError(f"--count: found {count}; the set has {len(images)} images")
    generator = random.Random(seed)
    if how == "first":
        return images[:count]
    if how == "random":
        return sorted(generator.sample(images, count), key=lambda image: image["file_name"])
    return _stratified(content, images, count, generator)


def _stratified(
    content: dict[str, Any], images: list[dict[str, Any]], count: int, generator: random.Random
) -> list[dict[str, Any]]:
    """Greedy: repeatedly adds an image of the class with the fewest images so far."""
    by_id = {image["id"]: image for image in images}
    classes: dict[int, set[int]] = defaultdict(set)  # of each image
    holders: dict[int, list[int]] = defaultdict(list)  # images of each class
    for annotation in content["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        if category not in classes[image]:
            classes[image].add(category)
            holders[category].append(image)
    for members in holders.values():
        generator.shuffle(members)
    chosen: dict[int, None] = {}
    counts = Counter(dict.fromkeys(sorted(holders), 0))
    while len(chosen) < count and counts:
        rarest = min(counts, key=lambda category: (counts[category], category))
        while holders[rarest] and holders[rarest][-1] in chosen:
            holders[rarest].pop()
        if not holders[rarest]:
            del counts[rarest]
            continue
        image = holders[rarest].pop()
        chosen[image] = None
        counts.update(category for category in classes[image] if category in counts)
    rest = [image["id"] for image in images if image["id"] not in chosen]  # without annotations
    ids = [*chosen, *generator.sample(rest, count - len(chosen))]
    return sorted((by_id[i] for i in ids), key=lambda image: image["file_name"])


def write_subset(content: dict[str, Any], images: list[dict[str, Any]], folder: Path, out: Path, copy: bool) -> None:
    """Writes OUT/images and, last, OUT/annotations.json.

    Raises:
        UserError: an image is missing, or OUT exists already.
    """
    if (out / "annotations.json").exists():
        raise UserError(f"{out}: exists; remove it first")
    wanted = {image["file_name"] for image in images}
    foreign = [
        f.name for f in (out / "images").rglob("*") if not f.is_dir() and f.name not in {Path(w).name for w in wanted}
    ]
    if foreign:
        raise UserError(f"{out}: contains other images ({foreign[0]}); remove it first")
    for image in tqdm(images, desc="images", disable=None):
        source = (folder / image["file_name"]).resolve()
        if not source.is_file():
            raise UserError(f"{source}: does not exist; give the image folder of these annotations")
        target = out / "images" / image["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() or target.exists():
            continue
        if copy:
            with atomic(target) as temporary:
                shutil.copyfile(source, temporary)
        else:
            target.symlink_to(source)
    ids = {image["id"] for image in images}
    rows = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    write_json(out / "annotations.json", content | {"images": images, "annotations": rows})


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m tools.subset", description=__doc__, formatter_class=form)
    parser.add_argument("annotations", type=Path, help="COCO JSON file")
    parser.add_argument("images", type=Path, help="folder of its images")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--count", type=int, required=True, help="how many images")
    parser.add_argument("--how", choices=("first", "random", "stratified"), default="first", help="selection (first)")
    parser.add_argument("--seed", type=int, default=0, help="of random and stratified (0)")
    parser.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")
    return report(_make(parser.parse_args(argv)))


def _make(arguments: argparse.Namespace) -> Iterator[str]:
    content = read_json(arguments.annotations)
    try:
        images = choose(content, arguments.count, arguments.how, arguments.seed)
        write_subset(content, images, arguments.images, arguments.out, arguments.copy)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{arguments.annotations}: not a COCO detection file ({type(error).__name__}: {error})"
        raise UserError(problem) from error
    yield f"{arguments.out}: {len(images)} images"


if __name__ == "__main__":
    sys.exit(main())
