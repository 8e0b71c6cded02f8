"""From arguments to deployments: everything that Ray is told."""

from __future__ import annotations

from typing import Any

from ray import serve

from llama_fast.serve.ray.arguments import Arguments, read
from llama_fast.serve.ray.gateway import Gateway
from llama_fast.serve.ray.group import Share
from llama_fast.serve.ray.replica import Replica, Serving

BY_PREFIX = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router:PrefixCacheAffinityRouter"
"""Ray's own. Its public name, in ray.serve.llm, can only be imported where vLLM or SGLang is installed."""
OPEN = 100_000
"""Requests that a gateway holds: as many as come, because what waits is counted at the replicas' handle."""
QUIET = {"enable_access_log": False, "log_level": "WARNING"}
HEALTH_SECONDS = 2.0
"""How often Ray asks a replica whether it is healthy, and so at most how long until a lost one is started again."""


def app(arguments: dict[str, Any]) -> Any:
    """The application of `serve run llama_fast.serve.ray:app key=value ...`, as `Arguments`. ValueError for one that is wrong."""
    told = read(arguments)
    share = Share(told.cpus, int(told.on_gpu))
    serving = Serving(told.setup, told.name or told.model, told.limits, told.ranks, share)
    replicas = serve.deployment(Replica, name="Replica").options(**options(told, share)).bind(serving)
    gateway = serve.deployment(Gateway, name="Gateway").options(
        num_replicas=told.gateways,
        max_ongoing_requests=OPEN,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    return gateway.bind(replicas, told.limits, told.api_key, told.placement == "prefix")


def options(told: Arguments, share: Share) -> dict[str, Any]:
    """Those of the replicas' deployment, which a Serve config may overrule."""
    found: dict[str, Any] = {
        "max_ongoing_requests": told.rows + told.waiting,
        "max_queued_requests": told.max_queue,
        "ray_actor_options": {"num_cpus": share.cpus, "num_gpus": share.gpus},
        "health_check_period_s": HEALTH_SECONDS,
        "logging_config": QUIET,
    }
    if told.ranks > 1:
        found |= {"placement_group_bundles": [share.bundle] * told.ranks, "placement_group_strategy": "PACK"}
    if told.max_replicas is None:
        found["num_replicas"] = told.replicas
    else:
        bounds = {"min_replicas": told.replicas, "max_replicas": told.max_replicas}
        found["autoscaling_config"] = {**bounds, "target_ongoing_requests": told.rows}
    if told.placement == "prefix":
        kept = {"imbalanced_threshold": told.waiting, "do_eviction": True}  # else its tree grows with every request
        found["request_router_config"] = {"request_router_class": BY_PREFIX, "request_router_kwargs": kept}
    return found
