"""Rollout: engines that turn prompts into responses with per-token log-probs."""
