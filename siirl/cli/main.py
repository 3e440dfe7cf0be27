"""The command ``siirl``: its verbs, and the one place where an error becomes a sentence and an exit status.

Importing the verbs imports click and nothing heavier; each imports what it runs when it runs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from siirl import __version__
from siirl.cli.bench import bench
from siirl.cli.doctor import doctor
from siirl.cli.generate import generate
from siirl.cli.plan import plan
from siirl.cli.report import report
from siirl.cli.simulate import simulate
from siirl.cli.train import train
from siirl.cli.validate import validate
from siirl.errors import RequestError, SiirlError, did_you_mean

INTERRUPTED = 130

EPILOG = """\b
Exit status:
  0    done
  1    failed while running
  2    wrong request
  3    the device is not usable here
  4    a validation or a comparison failed
  130  interrupted, after saving a checkpoint (143: terminated)
"""


class _Verbs(click.Group):
    """The verbs in the order they were added; an unknown one is answered with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verb = args[0]
        if verb not in self.commands and not verb.startswith("-"):
            hint = did_you_mean(verb, self.commands) or f"; the verbs are {', '.join(self.commands)}"
            raise RequestError(f"unknown verb '{verb}'{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, epilog=EPILOG, invoke_without_command=True, context_settings={"max_content_width": 100})
@click.version_option(__version__, message="siirl %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Reinforcement-learning post-training for language models, on any accelerator."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _verb in (train, plan, simulate, generate, validate, bench, report, doctor):
    cli.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit status.

    What goes wrong is one line on standard error; ``SIIRL_DEBUG=1`` shows the traceback before it.
    """
    try:
        status = cli.main(arguments, prog_name="siirl", standalone_mode=False)
    except SiirlError as error:
        status = _fail(str(error), error.exit_code)
    except click.ClickException as error:
        status = _fail(_in_our_words(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        status = _fail("interrupted", INTERRUPTED)
    sys.exit(status)


def _fail(sentence: str, status: int) -> int:
    """Report the exception that is being handled."""
    if os.environ.get("SIIRL_DEBUG") == "1":
        traceback.print_exc()
    click.echo(f"siirl: error: {' '.join(sentence.splitlines())}", err=True)
    return status


def _in_our_words(error: click.ClickException) -> str:
    """Click's complaint as our sentences are: lower case, no full stop, the nearest right name."""
    if isinstance(error, click.NoSuchOption):
        known = [name for parameter in error.ctx.command.params for name in parameter.opts] if error.ctx else []
        return f"no such option '{error.option_name}'{did_you_mean(error.option_name, known)}"
    message = error.format_message().strip()
    return message[:1].lower() + message[1:].rstrip(".")
