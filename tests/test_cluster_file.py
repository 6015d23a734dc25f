"""`ray_cluster.yaml` by Ray's own rules: its defaults filled in, its schema checked; no cloud is called."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.cluster
CONFIG = yaml.safe_load((Path(__file__).parent.parent / "ray_cluster.yaml").read_text())


def validate(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_accepts_the_cluster_file():
    validate(CONFIG)
    types = CONFIG["available_node_types"]
    assert types[CONFIG["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1


def test_ray_refuses_a_key_it_does_not_know():
    from jsonschema.exceptions import ValidationError

    with pytest.raises(ValidationError):
        validate({**CONFIG, "no_such_key": 1})
