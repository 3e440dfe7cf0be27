"""What ``rollout.router_replay`` adds to a pipeline: one more column from rollout to the passes of the actor."""

from __future__ import annotations

from dataclasses import replace

from siirl.config.schema import Config
from siirl.dag.conditions import Live
from siirl.errors import RequestError

COLUMN = "router_choices"


def replay_routers(live: dict[str, Live], config: Config) -> dict[str, Live]:
    """The nodes with ``router_choices``: written by rollout, read by the actor's log-probs and its policy update.

    Pipelines need not name the column, for it means something to a mixture of experts alone.

    Raises:
        RequestError: another key stands against it.
    """
    if not config.rollout.router_replay or not any(item.node.op == "rollout" for item in live.values()):
        return live
    if config.rollout.engine != "native":
        raise RequestError(
            f"rollout.router_replay needs rollout.engine=native, for {config.rollout.engine} does not say which "
            "experts it chose; set rollout.router_replay=false"
        )
    if config.rollout.partial:
        raise RequestError(
            "rollout.router_replay needs the routers' choices of whole responses, and rollout.partial carries begun "
            "ones without; set one of them off"
        )
    return {name: _with_choices(item) for name, item in live.items()}


def _with_choices(item: Live) -> Live:
    node = item.node
    if node.op == "rollout":
        return replace(item, node=replace(node, writes={**node.writes, COLUMN: COLUMN}))
    policy = node.op == "update" and node.params.get("loss", "policy") == "policy"
    if policy or node.op == "log_prob" and node.model == "actor":
        return replace(item, reads={**item.reads, COLUMN: COLUMN})
    return item
