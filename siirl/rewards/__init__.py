"""Rewards: the registry of functions, and the processes they run in."""

from __future__ import annotations

from siirl.rewards.pool import RewardPool, RewardResult
from siirl.rewards.registry import Reward, choose, resolve, reward

__all__ = ["Reward", "RewardPool", "RewardResult", "choose", "resolve", "reward"]
