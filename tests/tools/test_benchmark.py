"""The benchmark's arithmetic."""

import pytest
import torch

from tools import benchmark

CPU = torch.device("cpu")


def test_ratios_are_to_the_floor_of_the_same_turn(monkeypatch):
    seconds = {
        "floor": [1.0, 2.0, 1.0],
        "whole": [2.0, 4.0, 9.0],
        "half": [1.5, 3.0, 9.0],
        "only: own": [3.0, 6.0, 3.0],
    }
    monkeypatch.setattr(benchmark, "measure", lambda *_: dict(seconds))
    found = benchmark.compared(dict.fromkeys(seconds, lambda: None), 3, CPU)
    assert (found["floor_seconds"], found["whole"]) == (1.0, 2.0)
    assert found["parts"] == {"half": pytest.approx(0.5)}
    assert found["alone"] == {"own": pytest.approx(3.0)}


def test_each_work_runs_once_in_every_turn_and_once_before():
    runs = []
    works = {name: (lambda name=name: runs.append(name)) for name in ("floor", "whole")}
    times = benchmark.measure(works, 2, CPU)
    assert runs == ["floor", "whole"] * 3
    assert all(len(values) == 2 for values in times.values())


def test_peak_memory_is_that_of_the_work_alone():
    found = benchmark.peak_mib(lambda: torch.zeros(2**24).sum(), CPU)  # 64 MiB
    assert found is None or 50 < found < 90
