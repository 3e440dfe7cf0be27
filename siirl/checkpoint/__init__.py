"""Checkpoints: whole or absent, without pickle, written and read by every worker."""
