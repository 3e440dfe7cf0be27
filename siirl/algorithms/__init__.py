"""Formulas of reinforcement learning: small functions over packed tensors, the exchangeable ones registered by name."""

from siirl.algorithms import advantages, policy_losses
from siirl.algorithms.registry import advantage, get_advantage, get_policy_loss, policy_loss

__all__ = ["advantage", "advantages", "get_advantage", "get_policy_loss", "policy_loss", "policy_losses"]
