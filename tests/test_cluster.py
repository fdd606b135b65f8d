"""cluster.yaml against Ray's own validator, offline."""

from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cluster_file_is_valid_for_ray() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu_worker"]["max_workers"] <= config["max_workers"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_misspelt_key_is_refused() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    config["max_wokers"] = config.pop("max_workers")
    with pytest.raises(ValidationError, match="max_wokers"):
        validate_config(prepare_config(config))
