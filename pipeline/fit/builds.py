"""Which builds of vLLM, torch and transformers a node has: those of one role must be the same, or their numbers may differ.

A node's role is its label `egrsd-role`, and whether it has GPUs. A head without GPUs may so have other builds than its workers.
The first node of a role decides. Ray's own key-value store keeps what it has, for the length of a driver's job. The driver looks
at the nodes that are there when it starts (actors/cluster.py). On a node that joins later the first task or actor looks.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any

from pipeline.errors import UserError
from pipeline.fit import code

ROLE = "egrsd-role"  # the label of a node in cluster.yaml: head, rollout or train
REMEDY = "Install the same environment on all nodes of a role"
_SPACE = b"egrsd"


def check() -> None:
    """Raise UserError when this worker process has other code than its driver, or its node other builds than its role."""
    code.check()
    if code.CODE in os.environ:
        _check_this_node()


def check_node(node: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise UserError when a node of `ray.nodes()` has other builds than its role. `found` is the result of `code.look` there."""
    name = f"node {node['NodeManagerAddress']} ({found['host']})"
    role = f"{node.get('Labels', {}).get(ROLE, '')}{' with GPUs' if node['Resources'].get('GPU', 0) > 0 else ''}"
    other, versions = keep_first(f"role {role}", [name, found["versions"]])
    for package in code.BUILDS:
        if found["versions"].get(package) != versions.get(package):
            what = f"has {package} {found['versions'].get(package)}, {other} of the same role {versions.get(package)}"
            raise UserError(what, name, REMEDY)
    keep_first(_mark(node["NodeID"]), True)


def keep_first(name: str, value: Any) -> Any:
    """The value that this driver's job keeps under a name: `value`, plain JSON, unless there was one before."""
    from ray.experimental import internal_kv

    key = f"{_job()} {name}".encode()
    if internal_kv._internal_kv_put(key, json.dumps(value).encode(), overwrite=False, namespace=_SPACE):
        return json.loads(internal_kv._internal_kv_get(key, namespace=_SPACE))
    return value


@lru_cache(maxsize=1)
def _check_this_node() -> None:
    """Look at the node of this worker process, unless somebody has. Raises UserError, as often as it is called."""
    import ray
    from ray.experimental import internal_kv

    node_id = ray.get_runtime_context().get_node_id()
    if not internal_kv._internal_kv_exists(f"{_job()} {_mark(node_id)}".encode(), namespace=_SPACE):
        check_node(next(node for node in ray.nodes() if node["NodeID"] == node_id), code.here())


def _mark(node_id: str) -> str:
    return f"node {node_id} is fine"


def _job() -> str:
    import ray

    return str(ray.get_runtime_context().get_job_id())
