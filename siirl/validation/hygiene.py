"""L0: what can be known without the device, of the framework and of the back end's first stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import siirl
from siirl.device.backend import Backend, EngineSpec, Probe, Role
from siirl.device.selection import backend_class, probe_all
from siirl.errors import DeviceError
from siirl.validation.checks import all_checks, check, require
from siirl.validation.expected import read_expected
from siirl.validation.subject import Subject
from siirl.validation.words import Words

STAGE_0 = """
import importlib, os, sys
backend = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
before = dict(os.environ)
backend.probe(); backend.kernel_order(); backend.engines(); backend.visible_devices_env()
backend.launcher_resources(1); backend.expected_failures()
for role in sys.argv[3:]:
    backend.bootstrap_env(role)
print("torch" in sys.modules, dict(os.environ) != before)
"""


@check("L0", "no line of the framework names a vendor")
def vendor_words(subject: Subject) -> None:
    words = Words(known_words(subject.backend))
    found = words.under(Path(siirl.__path__[0]))
    require(not found, f"{len(found)} lines do, the first is {found[0] if found else ''}")


def known_words(backend: Backend) -> set[str]:
    """Names, device types, extensions and variables of the installed accelerators, and the library of `backend`."""
    classes = {type(backend)} | {found for name in probe_all() if (found := _class(name)) is not None}
    words = set()
    for found in classes:
        if found.is_accelerator():
            words |= {found.name, found.torch_type, found.visible_devices_env(), *found.torch_plugins}
    if backend.is_accelerator():
        words |= {part for pair in backend.communication().torch_backend.split(",") for part in pair.split(":")}
    return words


def _class(name: str) -> type[Backend] | None:
    try:
        return backend_class(name)
    except DeviceError:  # a broken package of another device
        return None


@check("L0", "the first stage answers without importing PyTorch, and leaves the environment alone")
def stage_0(subject: Subject) -> None:
    kind = type(subject.backend)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", STAGE_0, kind.__module__, kind.__qualname__, *get_args(Role)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    said = done.stderr.strip().splitlines()
    require(done.returncode == 0, f"it raised: {said[-1] if said else done.returncode}")
    torch_imported, environment_changed = done.stdout.split()
    require(torch_imported == "False", "it imports torch, whose import may fail for want of a driver")
    require(environment_changed == "False", "it changes os.environ")


@check("L0", "the probe finds the device, says so in words, and the same again")
def probe(subject: Subject) -> None:
    first, again = subject.backend.probe(), subject.backend.probe()
    require(isinstance(first, Probe), f"it is a {type(first).__name__}")
    require(first.available and first.count > 0, f"the device is in use, but the probe says: {first.reason}")
    require(bool(first.reason.strip()), "it gives no reason")
    require(not first.problems, f"it is available in spite of {first.problems}")
    require(first == again, f"it changes from {first} to {again}")
    json.dumps(first.to_dict())


@check("L0", "the environment of every role is proposed once, in strings, and what a user set stays")
def bootstrap_env(subject: Subject) -> None:
    before = dict(os.environ)
    for role in get_args(Role):
        wanted = subject.backend.bootstrap_env(role)
        require(all(isinstance(x, str) for pair in wanted.items() for x in pair), f"{role}: {wanted} holds no strings")
        try:
            os.environ.update(wanted)
            again = subject.backend.bootstrap_env(role)
        finally:
            os.environ.clear()
            os.environ.update(before)
        changed = {key: value for key, value in again.items() if wanted.get(key, before.get(key)) != value}
        require(not changed, f"{role}: once set, it wants other values: {changed}")


@check("L0", "the contract is complete: nothing abstract is left, and answers have the types they should")
def contract(subject: Subject) -> None:
    backend = type(subject.backend)
    missing = sorted(getattr(backend, "__abstractmethods__", ()))
    require(not missing, f"it lacks {', '.join(missing)}")
    require(bool(backend.name) and bool(backend.torch_type), "name or torch_type is empty")
    order = backend.kernel_order()
    require(order[-1:] == ["torch"], f"kernel providers end in {order[-1:]}, not in the reference, 'torch'")
    require(len(set(order)) == len(order), f"kernel providers repeat: {order}")
    engines = backend.engines()
    require(all(isinstance(engine, EngineSpec) for engine in engines), f"engines are no EngineSpec: {engines}")
    kinds = {engine.kind for engine in engines}
    require(kinds == {"rollout", "training"}, f"engines are there for {sorted(kinds)} alone")
    require(isinstance(backend.visible_devices_env(), str), "visible_devices_env is no string")
    resources = backend.launcher_resources(2)
    require(bool(resources) and resources == json.loads(json.dumps(resources)), f"resources {resources} are no JSON")


@check("L0", "the file of expected failures names checks that exist")
def expected_failures(subject: Subject) -> None:
    known = {f"{each.level}.{each.name}" for each in all_checks()}
    entries = [entry.check for entry in read_expected(subject.backend.expected_failures())]
    unknown = sorted(name for name in entries if name.partition("[")[0] not in known)
    require(not unknown, f"there is no check {', '.join(unknown)}")
