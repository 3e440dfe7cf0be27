"""Benchmarks: exact counters, and times as ratios to a reference that runs in turns with what is measured.

Importing this package imports no PyTorch.
"""

from __future__ import annotations

SUITES = {
    "kernels": "each op, by each provider that has it, forward and backward",
    "dispatch": "a bound kernel against a direct call of it",
    "databuffer": "rows redistributed over 2 and 4 local workers",
    "rollout": "generation by the native engine",
    "update": "one update by the training engine, and the log-probs before it",
    "sync_weights": "the rollout engine takes the actor's weights, whole and sharded",
    "train": "whole steps of a small recipe, one worker and two",
}
