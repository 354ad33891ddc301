"""`python -m toy.commands FILE`: several commands of zsqdet in one process, so that torch is imported once.

FILE is a JSON list of lists of words; a command whose first word is a number is interrupted in that epoch of training.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

from torch import distributed

from common.cli import main
from common.distillation import trainer
from common.evaluation import coco

_choose, _join, _leave = trainer.choose, distributed.init_process_group, distributed.destroy_process_group


def interrupted_in(epoch):
    def choose(job, progress, *arguments):
        if progress.epoch == epoch:
            raise KeyboardInterrupt
        _choose(job, progress, *arguments)

    return choose


def join_once(*arguments, **options):
    if not distributed.is_initialized():
        _join(*arguments, **options)


def gather_and_tell(rows):
    gathered = gather(rows)
    sys.stdout.write(f"process {distributed.get_rank()}: {len(gathered)} detections\n")
    return gathered


if __name__ == "__main__":
    gather, coco.gather_to_rank_zero = coco.gather_to_rank_zero, gather_and_tell
    distributed.init_process_group, distributed.destroy_process_group = join_once, lambda: None
    for words in json.loads(Path(sys.argv[1]).read_text()):
        epoch = words.pop(0) if isinstance(words[0], int) else None
        with patch.object(trainer, "choose", interrupted_in(epoch)):
            status = main(words)
    if distributed.is_initialized():
        _leave()
    sys.exit(status)
