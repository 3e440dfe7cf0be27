"""``siirl doctor``."""

from __future__ import annotations

import json
from typing import Any

import click

from siirl.cli.options import json_option
from siirl.cli.tables import print_table


@click.command(short_help="Show what this machine offers, and what is missing and why.")
@json_option
def doctor(as_json: bool) -> None:
    """Show which devices are usable here and, of those that are not, why and what to do about it."""
    from siirl.device.doctor import collect

    found = collect()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    print_table("machine", ("", ""), _machine(found))
    columns = ("device", "usable", "found", "to use it", "engines", "kernels")
    print_table("devices", columns, [_device(name, facts) for name, facts in found["devices"].items()])
    auto = found["auto"]
    click.echo(f"--device auto is {auto['device']}" if auto["device"] else f"--device auto: {auto['reason']}")


def _machine(found: dict[str, Any]) -> list[tuple[str, str]]:
    host = found["host"]
    versions = [f"{name} {version}" for name, version in found["packages"].items() if version]
    missing = [name for name, version in found["packages"].items() if not version]
    free, total = (host[key] / 2**30 for key in ("memory_available_bytes", "memory_bytes"))
    return [
        ("system", found["platform"]),
        ("processor", f"{host['cpu']}, {host['cores']} cores usable"),
        ("memory", f"{total:.1f} GiB, {free:.1f} GiB of it free"),
        ("python", f"{found['python']['version']} ({found['python']['executable']})"),
        ("packages", ", ".join(versions)),
        ("not installed", ", ".join(missing)),
    ]


def _device(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    count = f"yes, {facts['count']}" if facts["count"] > 1 else "yes"
    engines = ", ".join(dict.fromkeys(engine["name"] for engine in facts.get("engines", [])))
    kernels = " > ".join(facts.get("kernel_order", []))
    return (name, count if facts["available"] else "no", facts["reason"], "; ".join(facts["fixes"]), engines, kernels)
