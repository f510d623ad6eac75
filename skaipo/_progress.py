"""A progress bar when rich is installed, plain lines when it is not, nothing when not asked for."""

import sys
import time

__all__ = ["Progress"]


class Progress:
    """Context manager that shows how far a long job is, on standard error.

    Parameters
    ----------
    description : str
    total : float
        What ``done`` of :meth:`update` runs up to.
    enabled : bool, default=True
    interval : float, default=10
        Seconds between lines where rich is not installed.
    """

    def __init__(self, description, total, enabled=True, interval=10.0):
        self.description = description
        self.total = total
        self.enabled = enabled
        self.interval = interval
        self._bar = self._task = None

    def __enter__(self):
        self._start = self._last = time.monotonic()
        if self.enabled:
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return self
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[text]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.description, total=self.total, text="")
            self._bar.start()
        return self

    def __exit__(self, *exc_info):
        if self._bar is not None:
            self._bar.stop()

    def update(self, done, text=""):
        """Show that ``done`` of the total is behind us."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._last >= self.interval or done >= self.total:
            self._last = now
            spent = now - self._start
            left = spent * (self.total - done) / max(done, 1e-9)
            print(
                f"{self.description}: {done / self.total:.0%} {text} "
                f"({spent:.0f} s, about {left:.0f} s left)",
                file=sys.stderr,
            )
