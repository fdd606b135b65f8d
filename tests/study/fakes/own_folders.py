"""Ray's provider of nodes that are processes of this machine, each with a folder of its own, as machines have.

By default they share the head's, where the node that comes last writes what a job ships over what the others have open.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class OwnFolders(FakeMultiNodeProvider):  # type: ignore[misc]  # untyped
    def _create_node_with_resources_and_labels(self, *how: Any) -> Any:
        folder = tempfile.mkdtemp(dir=os.environ["FOLDERS"])
        with mock.patch.object(parameter, "RayParams", partial(parameter.RayParams, temp_dir=folder)):
            return super()._create_node_with_resources_and_labels(*how)
