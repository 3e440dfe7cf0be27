"""The errors a user meets. Each carries one sentence and the exit status of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SiirlError(Exception):
    """A run failed. The message is one sentence: what is wrong, where, what to do."""

    exit_code = 1


class WorkerLost(SiirlError):
    """A collective failed because another worker is gone: a consequence of that worker's failure."""


class RequestError(SiirlError):
    """The request cannot be carried out as written: an unknown key, a wrong value, a missing file."""

    exit_code = 2


class DeviceError(SiirlError):
    """The device asked for is not usable here."""

    exit_code = 3


class ValidationError(SiirlError):
    """A validation run found a failure, or a comparison a regression."""

    exit_code = 4


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return a clause such as ``; did you mean 'lr'?``, or an empty string when nothing is near."""
    near = get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
