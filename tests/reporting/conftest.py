"""A finished run of the toy detector."""

import shutil

import pytest
from toy.experiment import write_experiment

from common.config.load import load_config
from common.pipeline import stages as pipeline


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    return pipeline.run(load_config(write_experiment(tmp_path_factory.mktemp("toy"))))


@pytest.fixture
def run(toy_run, tmp_path):
    """A copy of a finished run, to be changed."""
    return shutil.copytree(toy_run, tmp_path / "run")
