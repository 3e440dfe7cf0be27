"""The checks as pytest items: `pytest -p siirl.validation.pytest_plugin --pyargs siirl.validation --siirl-device D`."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

_STACK = pytest.StashKey[ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("siirl", "conformance of a device")
    group.addoption("--siirl-device", metavar="D", default=None, help="a device that `siirl doctor` lists")
    group.addoption("--siirl-level", choices=["smoke", "full"], default="smoke", help="how many cases; default smoke")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STACK] = ExitStack()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_STACK].close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item a check of the device; the device is opened when they are collected."""
    if metafunc.function.__module__ != "siirl.validation.test_conformance":
        return
    from siirl.device import select
    from siirl.validation.run import chosen, prepared

    options = metafunc.config.option
    backend = select(options.siirl_device, role="validation")
    subject = metafunc.config.stash[_STACK].enter_context(prepared(backend, options.siirl_level))
    items = list(chosen(subject))
    metafunc.parametrize("asked", [(subject, *item) for item in items], ids=[check_id for _, check_id, _ in items])
