"""What Ray's autoscaler needs to add nodes to a cluster of this machine: raylets of their own, by Ray's fake provider.

Names of that provider are Ray's own; it keeps its nodes by these ids. The autoscaler is the second version, which
KubeRay and `ray up` use.
"""

from __future__ import annotations

from collections.abc import Mapping

IDLE_TIMEOUT_S = 6.0
"""A node that nobody has used or asked for so long is taken away."""

MAX_NODES = 4
OBJECT_STORE_BYTES = 100 * 2**20
_HEAD_TYPE = "ray.head.default"
_HEAD_ID = f"{0:05d}".rjust(56, "f")
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"

HEAD_ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
"""Of `ray start --head`."""


def autoscaling_config(gcs_address: str, added: Mapping[str, float]) -> dict[str, object]:
    """Of a cluster that may get as many as `MAX_NODES` nodes with the resources `added`; for `--autoscaling-config`."""
    worker = {"resources": {**added, "object_store_memory": OBJECT_STORE_BYTES}, "node_config": {}}
    return {
        "cluster_name": "test",
        # The type fake_multinode would read a file of defaults that Ray's packages do not have.
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "gcs_address": gcs_address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {**worker, "min_workers": 0, "max_workers": MAX_NODES},
        },
        "max_workers": MAX_NODES,
        "idle_timeout_minutes": IDLE_TIMEOUT_S / 60,
        **{key: [] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
        "cluster_synced_files": [],
    }
