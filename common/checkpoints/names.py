"""The names of classes, as checkpoints keep them."""

from collections.abc import Mapping
from typing import Any

from common.checkpoints.description import short
from common.runtime.errors import UserError


def class_list(names: Any, where: str) -> list[str]:
    """The names of classes in the order of the outputs, from a list or a dictionary with the keys 0, 1, 2, ...

    Raises:
        UserError: other keys, or names that are no texts.
    """
    rows = names
    if isinstance(names, Mapping):
        try:
            indices = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError):
            indices = {}
        if sorted(indices) != list(range(len(names))):
            raise UserError(f"{where}: the classes have the numbers {short(list(names)[:4])}; needed are 0, 1, 2, ...")
        rows = [indices[i] for i in range(len(indices))]
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(name, str) for name in rows):
        raise UserError(f"{where}: found {short(names)} as names of classes; needed is a list of texts")
    return list(rows)


def published_names(meta: Mapping[str, Any], where: str) -> list[str]:
    """The names of classes in the `meta` of OpenMMLab's files; empty where there are none.

    mmdet 2.x has `CLASSES`, 3.x has `dataset_meta` with `classes`, of old `CLASSES`.

    Raises:
        UserError: something else under such a key.
    """
    within = meta.get("dataset_meta")
    places = (meta, within if isinstance(within, Mapping) else {})
    found = [place[key] for place in places for key in ("CLASSES", "classes") if place.get(key)]
    return class_list(found[0], f"{where}: its meta") if found else []
