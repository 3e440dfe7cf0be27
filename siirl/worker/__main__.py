"""One worker process: ``python -m siirl.worker RUN_DIR``, its place in the environment."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from siirl.errors import SiirlError, WorkerLost


def main() -> int:
    """Run this worker to its end; its exit status."""
    directory, resume = Path(sys.argv[1]), "--resume" in sys.argv[2:]
    from siirl.worker.processes import worker_log, write_error

    rank = int(os.environ["RANK"])
    _end_with_launcher(int(os.environ["SIIRL_LAUNCHER"]))
    with worker_log(directory, rank, redirect=True):
        try:
            return _run(directory, resume)
        except SiirlError as error:
            write_error(directory, rank, str(error), error.exit_code, isinstance(error, WorkerLost))
            traceback.print_exc()
            return error.exit_code
        except Exception as error:
            write_error(directory, rank, _where(error))
            traceback.print_exc()
            return 1


def _run(directory: Path, resume: bool) -> int:
    from siirl.config import load
    from siirl.device import select
    from siirl.worker.place import Place
    from siirl.worker.processes import device_role

    resolved = load(directory / "config.yaml", pipeline_defaults=False)
    backend = select(None, resolved.main.device, device_role(resolved.main))
    from siirl.worker.run import run_worker

    stopped = run_worker(resolved, directory, backend, Place.from_environment(os.environ), resume)
    return 128 + stopped if stopped else 0


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def _end_with_launcher(launcher: int) -> None:
    """Leave at once when the launcher is gone: nobody would read the results or pass on a signal."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _leave(status: int) -> None:
    """End without tearing the interpreter down, in which a thread that wants its lock aborts the process."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _leave(main())
