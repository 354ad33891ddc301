"""COCO files with random damage: each is refused in lines that name places, or has the AP of its repaired copy."""

import copy
import math
import os
import re

import numpy as np
from toy.coco import correct, detections, ours, read, reference

from common.runtime.errors import UserError

FUZZED = int(os.environ.get("ZSQDET_FUZZED", "150"))  # files
JUNK = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10,
    11,
    0.5,
    1e300,
    10**40,
    math.nan,
    math.inf,
    "",
    "3",
    "x",
    [],
    [[]],
    {},
    [1] * 4,
]
JUNK += ["../x", "a/../b.png", {"id": 3}, [0, 0, 0, 0], [1, 2, 3, -4], 2**63, "\0", [None] * 4, [True] * 4]


def damaged(seed):
    """A correct file with one or two random values put, removed, repeated or moved."""
    rng = np.random.default_rng(seed)
    content = correct(seed)
    for _ in range(rng.integers(1, 3)):
        rows = content[("images", "annotations", "categories")[rng.integers(3)]]
        number = int(rng.integers(len(rows)))
        fields = sorted(rows[number]) if isinstance(rows[number], dict) else []
        field = fields[rng.integers(len(fields))] if fields else None
        match rng.integers(6):
            case 0 | 1 if field:
                rows[number][field] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
            case 2 if field:
                del rows[number][field]
            case 3:
                rows.append(copy.deepcopy(rows[number]))
            case 4:
                rows[number] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
            case _ if field and isinstance(rows[number - 1], dict) and field in rows[number - 1]:
                rows[number][field] = copy.deepcopy(rows[number - 1][field])
    return content


def cleaned(content):
    """What a person who repairs the file would leave."""
    content = copy.deepcopy(content)
    for number, found in enumerate(content["annotations"], 1):
        found |= {"id": number, "iscrowd": found.get("iscrowd") or 0}
        if found.get("area") is None:
            found["area"] = found["bbox"][2] * found["bbox"][3]
    return content


def outcome(folder, seed):
    """`refused` or `read`, after checking that it is the right one of the two in form and in AP."""
    content = damaged(seed)
    try:
        coco = read(folder, content)
    except UserError as error:
        for line in str(error).splitlines():
            assert re.search(r"set\.json: \w+(\[\d+\](\.\w+)?)?: found .*; allowed: |^\.\.\. and \d+ more$", line), line
        return "refused"
    objects = cleaned(content)
    found = detections(objects)
    assert ours(coco.content, found) == reference(objects, found)
    ids = [image["id"] for image in content["images"]]
    assert len(set(ids)) == len(ids)
    assert {r["image_id"] for r in content["annotations"]} <= set(ids)
    assert not any(type(r[k]) in (bool, str) for r in content["annotations"] for k in ("image_id", "category_id"))
    return "read"


def test_random_damage_is_refused_or_changes_no_ap(tmp_path):
    outcomes = [outcome(tmp_path, seed) for seed in range(FUZZED)]
    assert outcomes.count("refused") > FUZZED / 3
    assert outcomes.count("read") > FUZZED / 40
