"""The command line of a run: options that do not exist, and how mistakes are told."""

import json
import sys

import pytest

from ofl_sam2.errors import InputError, ModelError
from ofl_sam2.workflow.run import check_options, config_key, prepare, report


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "inference.json"
    path.write_text(json.dumps({"model_dir": None, "output_dir": "eval"}))
    return str(path)


@pytest.mark.parametrize(
    "options",
    [
        ["--model_dir", "m"],
        ["--model-dir=m", "--output_dir", "-1"],
        ["--meta_file", "x", "--logging_file=y", "run"],
        ["--output_dir#0", "x"],
    ],
)
def test_known_options_pass(config, options):
    check_options(["run", "--config_file", config, *options])


@pytest.mark.parametrize("files", ["{}", "['{}']", "['{}','{}']", "[{}, {}]"])
def test_an_unknown_option_names_the_closest_key(config, files):
    with pytest.raises(InputError, match=r"^model_dri: .*inference.json hold no such key. Did you mean model_dir\?"):
        check_options(["run", f"--config_file={files.format(config, config)}", "--model_dri", "m"])


def test_an_option_like_no_key_lists_the_keys(config):
    with pytest.raises(InputError, match=r"Keys: .*model_dir.*output_dir"):
        check_options(["--config_file", config, "--zzz", "1"])


def test_other_programs_are_not_checked(monkeypatch, config):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["pytest", "--config_file", config, "--model_dri", "m"])
    prepare()
    assert sys.excepthook is report


def test_a_mistake_is_one_line(capsys):
    try:
        try:
            with config_key("model_dir"):
                raise ModelError("damaged.\nLearn again.")
        except ModelError as error:
            raise RuntimeError("Failed to instantiate component") from error
    except RuntimeError as error:
        report(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == "Error: model_dir: damaged. Learn again.\n"


def test_other_errors_keep_their_traceback(capsys):
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as error:
        report(type(error), error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err
