"""Pipelines as DAGs: the graph a user writes, the planner, and the plan a worker runs. Imports no torch."""

from __future__ import annotations

from siirl.dag.graph import Graph, Node, Read
from siirl.dag.ops import OpSpec, find_op, op_names, python_target, register_op
from siirl.dag.plan import (
    ENGINE_DEGREES,
    Layout,
    Placement,
    Role,
    Step,
    Table,
    WorkerPlan,
    all_plans_json,
    batch_table,
    check_batch,
    describe,
    describe_all,
    due,
    rollout_layout,
    training_layout,
)
from siirl.dag.planner import left_out, plan, plan_roles, plan_steps, plan_worker

__all__ = [
    "ENGINE_DEGREES",
    "Graph",
    "Layout",
    "Node",
    "OpSpec",
    "Placement",
    "Read",
    "Role",
    "Step",
    "Table",
    "WorkerPlan",
    "all_plans_json",
    "batch_table",
    "check_batch",
    "describe",
    "describe_all",
    "due",
    "find_op",
    "left_out",
    "op_names",
    "plan",
    "plan_roles",
    "plan_steps",
    "plan_worker",
    "python_target",
    "register_op",
    "rollout_layout",
    "training_layout",
]
