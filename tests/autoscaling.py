"""Ray's own autoscaler (v2) as a function: which machines would it start for so many waiting actors?"""

from __future__ import annotations

from typing import Any


def launched(
    config: dict[str, Any],
    actors: int,
    resources: dict[str, float],
    events: tuple[tuple[str, str], ...] = (),
    market: str | None = None,
) -> dict[str, int]:
    """Machines by node type that Ray's scheduler asks for, with no worker there yet.

    `events` are (node type, status) of earlier machines; `market` is the label that the actors ask for.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LABEL_OPERATOR_IN
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    for kind, status in events:
        monitor.notify(
            [
                InstanceUpdateEvent(
                    instance_type=kind, new_instance_status=Instance.InstanceStatus.Value(status)
                )
            ]
        )
    selectors = None if market is None else [[("market", LABEL_OPERATOR_IN, [market])]]
    demand = [ResourceRequestUtil.make(resources, label_selectors=selectors) for _ in range(actors)]
    made = AutoscalingConfig(config, skip_content_hash=True)
    limit = made.get_max_num_worker_nodes()  # the head, which counts too, is not among the instances here
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=made.get_node_type_configs(),
            max_num_nodes=limit,
            resource_requests=ResourceRequestUtil.group_by_count(demand),
            cloud_resource_availabilities=monitor.get_resource_availabilities(),
            recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
        )
    )
    return {request.instance_type: request.count for request in reply.to_launch}
