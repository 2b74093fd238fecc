from __future__ import annotations

import json

from monai.bundle import ConfigParser

from common.engines import running_config


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
