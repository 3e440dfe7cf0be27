"""Formulas of reinforcement learning: small functions over packed tensors, the exchangeable ones registered by name."""

from siirl.algorithms.registry import advantage, get_advantage, get_policy_loss, policy_loss

__all__ = ["advantage", "get_advantage", "get_policy_loss", "policy_loss"]
