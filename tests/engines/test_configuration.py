from __future__ import annotations

import json
import sys

import pytest
from monai.bundle import ConfigParser

from common.engines import running_config, start
from common.errors import BadInput


def test_config_of_the_parser_that_calls():
    parser = ConfigParser(
        {
            "learning_rate": 0.01,
            "doubled": "$2 * @learning_rate",
            "labels": {"0": "background"},
            "record": {"_target_": "common.engines.running_config"},
        }
    )
    parser.read_meta({"version": "1"})
    parser["learning_rate"] = 0.5  # as an override on the command line does
    config = parser.get_parsed_content("record")
    assert config["learning_rate"] == 0.5
    assert config["doubled"] == "$2 * @learning_rate", "as written"
    assert config["labels"] == {"0": "background"}
    assert "_meta_" not in config
    assert ConfigParser(json.loads(json.dumps(config))).get_parsed_content("doubled") == 1.0


def test_what_json_does_not_know_is_text():
    parser = ConfigParser({"object": object, "record": {"_target_": "common.engines.running_config"}})
    config = parser.get_parsed_content("record")
    assert isinstance(config["object"], str)


def test_outside_a_bundle_there_is_none():
    assert running_config() == {}


def test_the_command_lines_words_are_read_as_json() -> None:
    """MONAI's command line gives "false" as text, which Python takes for true."""
    parser = ConfigParser(
        {
            "attention": True,
            "path": "models/model.pt",
            "mirror_axes": [0],
            "options": {"_target_": "builtins.dict", "learn": False, "axes": "@mirror_axes", "sides": [1, "null"]},
            "state": "$(@attention, @path, @mirror_axes, @options)",
            "initialize": ["$__import__('common.engines').engines.start(None)"],
        }
    )
    parser.update({"attention": "false", "path": "null", "mirror_axes": "null", "options#learn": "true"})
    parser.parse(reset=True)
    parser.get_parsed_content("initialize#0")
    options = {"learn": True, "axes": None, "sides": [1, None]}
    assert parser.get_parsed_content("state") == (False, None, None, options)
    assert parser.get_parsed_content("options") == options


def test_a_folder_may_be_named_by_a_number() -> None:
    parser = ConfigParser(
        {
            "ckpt_dir": "models",
            "seed": 0,
            "model": "$@ckpt_dir + '/model.pt'",
            "initialize": ["$__import__('common.engines').engines.start(None)"],
        }
    )
    parser.update({"ckpt_dir": 2024, "seed": 7})
    parser.parse(reset=True)
    parser.get_parsed_content("initialize#0")
    assert parser.get_parsed_content("model") == "2024/model.pt"
    assert parser.get_parsed_content("seed") == 7


def test_none_on_the_command_line_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bundle", "run", "--scale", "None"])
    with pytest.raises(BadInput, match=r"--scale None: .*Write null"):
        start(None)
