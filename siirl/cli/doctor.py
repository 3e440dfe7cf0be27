"""``siirl doctor``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from siirl.cli.options import json_option
from siirl.cli.tables import print_table


@click.command(short_help="Show what this machine offers, and what is missing and why.")
@json_option
def doctor(as_json: bool) -> None:
    """Show which devices are usable here, what each can do, and, of those that are not, why and what to do about it."""
    from siirl.device.doctor import collect

    found = collect()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    print_table("machine", ("", ""), _machine(found))
    columns = ("device", "usable", "found", "to use it", "engines", "kernels")
    print_table("devices", columns, [_device(name, facts) for name, facts in found["devices"].items()])
    for name, facts in found["devices"].items():
        if "opened" in facts:
            print_table(f"device {name}", ("", ""), _opened(facts))
    auto = found["auto"]
    click.echo(f"--device auto {'is ' + auto['device'] if auto['device'] else 'fails'}: {auto['reason']}")
    for variable, name in found["environment"].items():
        click.echo(f"{variable} is set: without --device a run takes {name}, whatever its configuration says")


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


def _opened(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "back end", facts["back_end"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield from (("device", text) for text in facts["devices"])
    yield from (("note", text) for text in facts["notes"])
    opened = facts["opened"]
    if "error" in opened:
        yield "cannot be opened", opened["error"]
        return
    yield from ((key.replace("_", " "), _words(value)) for key, value in opened["capabilities"].items())
    communication = opened["communication"]
    yield "collectives", communication["torch_backend"]
    yield from ((f"  {name}", ", ".join(dtypes)) for name, dtypes in communication["dtypes"].items())
    providers = opened["kernels"]
    for provider in dict.fromkeys(providers.values()):
        yield f"kernels by {provider}", ", ".join(op for op, by in providers.items() if by == provider)
    yield from ((f"no kernels by {provider}", why) for provider, why in opened["kernels_left_out"].items())
    yield from ((f"no {pair}", f"fails its self-test: {why}") for pair, why in opened["kernels_failed"].items())


def _words(value: Any) -> str:
    """A fact as a person reads it; what is not known is a dash."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:.4g}" for key, number in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
