"""Configuration: the schema, recipes and their overrides. Imports no torch."""

from __future__ import annotations

from siirl.config.keys import Key, describe
from siirl.config.loader import Resolved, Stage, dump, load
from siirl.config.schema import Config

__all__ = ["Config", "Key", "Resolved", "Stage", "describe", "dump", "load"]
