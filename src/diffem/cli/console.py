"""What the commands print: lines, errors and progress."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from diffem.errors import printable

if TYPE_CHECKING:
    from diffem.loop import Progress

LONGEST = 1000  # letters of an error


def say(text: str) -> None:
    """Prints a line; if the reader has gone (`| head`) or the disk is full, prints nothing, and the work goes on."""
    try:
        print(printable(text), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Prints an error on one line; names in it may come from files of strangers."""
    line = printable(" ".join(text.split()))
    sys.stderr.write(
        f"diffem: {line if len(line) <= LONGEST else f'{line[:LONGEST]} ...'}\n"
    )  # at once: of several processes


class ProgressBar:
    """A progress bar with the current step, and the time left of the run; silent if standard error is not a terminal."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.what = ""

    def update(self, progress: Progress) -> None:
        from tqdm import tqdm

        from diffem.watch import time_left

        what = f"iteration {progress.iteration}, {progress.step}"
        if self.bar is None or self.what != what:
            self.clear()
            self.bar, self.what = tqdm(total=progress.total, leave=False, disable=not sys.stderr.isatty()), what
        loss = "" if progress.loss is None else f": loss {progress.loss:.3f}"
        left = "" if progress.left is None else f"; run: {time_left(progress.left)}"
        self.bar.set_description_str(what + loss + left, refresh=False)
        self.bar.update(progress.done - self.bar.n)

    def clear(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
