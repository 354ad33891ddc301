"""A run folder with damaged files is refused in one line, and its settings are compared key by key."""

import pytest
from toy.experiment import write_experiment

from common.config.load import load_config
from common.pipeline.run_dir import check_run, open_run, results
from common.runtime.errors import UserError

SHA = "0" * 64


@pytest.fixture
def config(tmp_path):
    config = load_config(write_experiment(tmp_path))
    open_run(config, SHA, {"machine": "here"})
    return config


@pytest.mark.parametrize("text", ["[]", "{}x", '{"a": 1}', '{"weights_sha256": 5}', "null", "[" * 100, '"a"'])
def test_a_damaged_environment_file_is_one_line(config, text):
    (config.run_dir / "environment.json").write_text(text)
    with pytest.raises(UserError, match=r"^\S*environment.json: (damaged|not valid JSON)[^\n]*$"):
        check_run(config, SHA)


@pytest.mark.parametrize(
    "text", ["[]", "5", '{"rows": {}}', '{"seconds": []}', '{"layers": null}', '{"data_read": "a"}']
)
def test_damaged_results_are_one_line(config, text):
    (config.run_dir / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"^\S*results.json: damaged[^\n]*rerun the command$"):
        results(config.run_dir)


def test_a_folder_is_reopened_with_the_same_settings_on_another_machine(config):
    open_run(config.model_copy(update={"device": "cuda"}), SHA, {"machine": "there"})
    with pytest.raises(UserError, match=r"was made with other settings: seed \(0 there, 3 now\)"):
        check_run(config.model_copy(update={"seed": 3}), SHA)
    with pytest.raises(UserError, match="was made from another checkpoint"):
        check_run(config, "1" * 64)
