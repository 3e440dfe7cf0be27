"""Live progress of a run in the terminal, or as plain lines where there is none; it only reads `metrics.jsonl`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from siirl.telemetry.metrics import FILE_NAME
from siirl.telemetry.progress import StageProgress, sparkline

_POLL_S = 0.2
_PLAIN_INTERVAL_S = 2.0


class ProgressDisplay:
    """A background thread that shows a run's progress while `metrics.jsonl` grows.

    Args:
        run_dir: the run's directory; the file may appear later.
        total_steps: the steps of every stage, in the order they run.
        stream: where to show it; a terminal gets a live display, anything else plain lines.
    """

    def __init__(self, run_dir: Path | str, total_steps: Mapping[str, int], stream: TextIO) -> None:
        self._tail = _Tail(Path(run_dir) / FILE_NAME)
        self._stages = {name: StageProgress(name, total) for name, total in total_steps.items()}
        console = Console(file=stream)
        on_terminal = console.is_terminal and not console.is_dumb_terminal
        self._view: _View = _LiveView(console, self._stages) if on_terminal else _LineView(stream)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        """Begin to show; a resumed run's earlier steps count as done and are not shown one by one."""
        for record in self._tail.read():
            self._stage_of(record).add(record)
        self._view.open()
        self._thread.start()

    def stop(self) -> None:
        """Show what is left and end; the last state stays on the screen."""
        self._stopping.set()
        self._thread.join()
        self._view.close()

    def __enter__(self) -> ProgressDisplay:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stopping.wait(_POLL_S)
            for record in self._tail.read():
                stage = self._stage_of(record)
                stage.add(record)
                self._view.show(stage)
            self._view.refresh()

    def _stage_of(self, record: Mapping[str, Any]) -> StageProgress:
        return self._stages.setdefault(record["stage"], StageProgress(record["stage"], record["step"]))


class _Tail:
    """Reads the records that were appended since the last call.

    A resumed run replaces the file by a shorter one and goes on in that: the lines it kept are known by their hashes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = -1
        self._hashes: list[int] = []

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            replaced = inode != self._inode
            file.seek(0 if replaced else self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset = len(whole) + (0 if replaced else self._offset)
        self._inode = inode
        lines = whole.splitlines()
        if replaced:
            lines = self._forget_dropped(lines)
        self._hashes += map(hash, lines)
        return [json.loads(line) for line in lines]

    def _forget_dropped(self, lines: list[bytes]) -> list[bytes]:
        same = 0
        while same < min(len(lines), len(self._hashes)) and hash(lines[same]) == self._hashes[same]:
            same += 1
        del self._hashes[same:]
        return lines[same:]


class _View(Protocol):
    def open(self) -> None: ...
    def show(self, stage: StageProgress) -> None: ...
    def refresh(self) -> None: ...
    def close(self) -> None: ...


class _LineView:
    """Plain lines: the first and the last step of every stage, and between them one every two seconds at most."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage: StageProgress | None = None
        self._held_back: str | None = None
        self._shown_at = 0.0
        self._reader_left = False

    def open(self) -> None:
        pass

    def show(self, stage: StageProgress) -> None:
        first = stage is not self._stage
        if first:
            self._release()
        self._stage = stage
        self._held_back = stage.line()
        if first or stage.step >= stage.total or time.monotonic() - self._shown_at >= _PLAIN_INTERVAL_S:
            self._release()

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        self._release()

    def _release(self) -> None:
        line, self._held_back = self._held_back, None
        if line is None or self._reader_left:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except BrokenPipeError:  # the run goes on without a reader
            self._reader_left = True
        self._shown_at = time.monotonic()


class _LiveView:
    """A bar for every stage, and below the running one its latest values."""

    def __init__(self, console: Console, stages: Mapping[str, StageProgress]) -> None:
        self._stages = stages
        self._running: StageProgress | None = None
        self._unicode = console.encoding.lower().startswith("utf")
        # What is printed meanwhile goes above the display, unless it goes somewhere else.
        self._live = Live(
            console=console,
            auto_refresh=False,
            get_renderable=self._render,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def open(self) -> None:
        self._live.start()

    def show(self, stage: StageProgress) -> None:
        self._running = stage

    def refresh(self) -> None:
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        width = max(len(name) for name in self._stages)
        rows: list[RenderableType] = []
        for stage in self._stages.values():
            rows.append(self._bar(stage, width))
            if stage is self._running:
                rows.append(self._values(stage, width + 2))
        return Group(*rows)

    def _bar(self, stage: StageProgress, width: int) -> Table:
        counts = max(len(str(other.total)) for other in self._stages.values())
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(width=width, no_wrap=True, style="bold" if stage is self._running else "dim")
        row.add_column(ratio=1)
        row.add_column(width=2 * counts + 1, no_wrap=True, justify="right")
        row.add_column(width=13, no_wrap=True, justify="right", style="cyan")
        bar = ProgressBar(total=stage.total, completed=stage.step, complete_style="cyan", finished_style="green")
        row.add_row(stage.name, bar, f"{stage.step}/{stage.total}", stage.clock())
        return row

    def _values(self, stage: StageProgress, indent: int) -> Text:
        parts = stage.values()
        room = self._live.console.width - sum(map(len, parts)) - 2 * len(parts) - indent
        recent = list(stage.recent_rewards)[-room:]
        if self._unicode and room > 1 and len(recent) > 1:
            parts[0] += f" {sparkline(recent)}"
        return Text(" " * indent + "  ".join(parts), no_wrap=True, overflow="ellipsis")
