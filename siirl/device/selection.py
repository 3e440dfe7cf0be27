"""Finding back ends and choosing one: command line, then SIIRL_DEVICE, then the config, then what is there."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from dataclasses import dataclass

from siirl.device.backend import Backend, Probe, Role
from siirl.errors import DeviceError, RequestError, SiirlError, did_you_mean

GROUP = "siirl.backends"
VARIABLE = "SIIRL_DEVICE"
HOST = "cpu"  # other back ends of the host are for trying kernels, and are taken by name alone
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # "0" keeps `import torch` from importing every installed extension

log = logging.getLogger(__name__)
_current: Backend | None = None


@dataclass(frozen=True)
class Choice:
    """A device by name, and why it is that one."""

    device: str
    reason: str


def current() -> Backend:
    """The back end this process runs on."""
    if _current is None:
        raise SiirlError("no device has been chosen in this process: call siirl.device.select() first")
    return _current


def select(cli: str | None = None, config: str = "auto", role: Role = "trainer") -> Backend:
    """Choose a device as `resolve` does, load PyTorch for it and make it `current()`."""
    global _current
    backend = resolve(cli, config)
    autoload = os.environ.get(AUTOLOAD, "1")
    prepare(backend, role)
    backend.load()
    if backend.torch_plugins:
        os.environ[AUTOLOAD] = autoload  # the extension works, and children need it to read this device's tensors
    _current = backend
    return backend


def resolve(cli: str | None = None, config: str = "auto") -> Backend:
    """Decide on a device without importing PyTorch. `cli` beats SIIRL_DEVICE, which beats `config`.

    Raises DeviceError when the device asked for is not usable, RequestError when its name is unknown or when
    `auto` finds several kinds of accelerators.
    """
    asked = {"the command line": cli, VARIABLE: os.environ.get(VARIABLE), "the configuration": config}
    source, name = next((source, name) for source, name in asked.items() if name)
    if name == "auto":
        choice = automatic(probe_all())
    else:
        choice = Choice(name, f"{source} names it")
        _require(name, source)
    log.info("device %s: %s", choice.device, choice.reason)
    return backend_class(choice.device)()


def _require(name: str, source: str) -> None:
    probe = backend_class(name).probe()
    if not probe.available:
        origin = "" if source == "the command line" else f", which {source} names,"
        remedy = f". What helps: {'; '.join(probe.fixes)}" if probe.fixes else ""
        raise DeviceError(f"device '{name}'{origin} is not usable here: {probe.reason}{remedy}")
    for note in probe.notes:
        log.warning("device %s: %s", name, note)


def automatic(probes: dict[str, Probe]) -> Choice:
    """What `auto` stands for: the one usable accelerator, else the host.

    Accelerators that are there and not usable are worth a warning: a run on the host may take a thousand times longer.
    """
    usable = [name for name, probe in probes.items() if probe.available]
    accelerators = [name for name in usable if backend_class(name).is_accelerator()]
    if len(accelerators) > 1:
        raise RequestError(
            f"devices of several kinds are usable here, choose one with --device: {', '.join(accelerators)}"
        )
    if not usable:
        reasons = "; ".join(f"{name}: {probe.reason}" for name, probe in probes.items())
        raise DeviceError(f"no device is usable here: {reasons or f'no package fills the entry-point group {GROUP}'}")
    if accelerators:
        return Choice(accelerators[0], "the only kind of accelerator that is usable here")
    chosen = HOST if HOST in usable else usable[0]
    for name, probe in probes.items():
        if probe.present and not probe.available:
            log.warning("running on %s, for %s devices are here but not usable: %s", chosen, name, probe.reason)
    reasons = "; ".join(f"{name}: {probe.reason}" for name, probe in probes.items() if not probe.available)
    return Choice(chosen, f"no accelerator is usable here{f' ({reasons})' if reasons else ''}")


def probe_all() -> dict[str, Probe]:
    """Every installed back end's probe by its name. PyTorch is not imported."""
    probes = {}
    for name in _entry_points():
        try:
            probes[name] = backend_class(name).probe()
        except (DeviceError, RequestError) as error:  # of one package; the others are none the worse
            probes[name] = Probe(False, 0, str(error), problems=(str(error),))
    return probes


def names() -> list[str]:
    """The installed back ends, usable here or not."""
    return list(_entry_points())


def backend_class(name: str) -> type[Backend]:
    """The back end of that name. Raises RequestError when none or several have it, DeviceError for a broken package."""
    entries = _entry_points()
    if name not in entries:
        known = ", ".join(["auto", *entries])
        raise RequestError(f"unknown device '{name}', devices known here are {known}{did_you_mean(name, entries)}")
    return _the_one(name, entries[name])


def _load(entry: importlib.metadata.EntryPoint) -> type[Backend]:
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise DeviceError(f"the back end '{entry.name}' ({entry.value}) cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise DeviceError(f"the back end '{entry.name}' ({entry.value}) is not a siirl.device.Backend")
    if found.name != entry.name:
        raise DeviceError(f"the back end '{entry.name}' ({entry.value}) calls itself '{found.name}': one name for both")
    return found


def launch_environment(backend: Backend, role: Role = "trainer") -> dict[str, str]:
    """Variables a launcher adds to a worker's environment, so that it chooses this device and starts ready for it.

    Where the device needs an extension of PyTorch, a worker's own children find it as the user left it.
    """
    wanted = {key: value for key, value in backend.bootstrap_env(role).items() if key not in os.environ}
    autoload = {} if backend.torch_plugins else {AUTOLOAD: "0"}
    return {**wanted, **autoload, VARIABLE: backend.name}


def prepare(backend: Backend, role: Role = "trainer") -> None:
    """Make this process ready to import PyTorch for `backend`. What the user set in the environment stays.

    PyTorch, and libraries on top of it, import every device extension that is installed and fail as a whole when
    one of them lacks its driver. Extensions of other devices are therefore hidden from this process.
    """
    for key, value in backend.bootstrap_env(role).items():
        os.environ.setdefault(key, value)
    os.environ[AUTOLOAD] = "0"
    for entry in importlib.metadata.entry_points(group="torch.backends"):
        extension = entry.module.partition(".")[0]
        if extension not in backend.torch_plugins:
            sys.modules.setdefault(extension, None)  # type: ignore[arg-type]  # Python's mark for "not importable"
        elif sys.modules.get(extension, backend) is None:
            del sys.modules[extension]


def _the_one(name: str, entries: list[importlib.metadata.EntryPoint]) -> type[Backend]:
    """Of several packages' back ends of one name, the one that says it stands in for the others."""
    if len(entries) == 1:
        return _load(entries[0])
    replacing = [found for found in map(_load, entries) if found.replaces == name]
    if len(replacing) == 1:
        return replacing[0]
    packages = " and ".join(entry.value for entry in entries)
    raise RequestError(
        f"{len(entries)} packages call their back end '{name}': {packages}; uninstall all but one, "
        f'or let one say that it stands in for the others with replaces = "{name}"'
    )


def _entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    named: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        named.setdefault(entry.name, {}).setdefault(entry.value, entry)
    return {name: list(entries.values()) for name, entries in sorted(named.items())}
