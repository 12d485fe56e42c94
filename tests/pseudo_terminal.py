"""A terminal to run a command in, as a user does: typed into and read from."""

import fcntl
import os
import pty
import select
import subprocess
import termios
import time

from training_runs import REPOSITORY


class Terminal:
    """A command in a terminal of its own; the command ends with the `with`."""

    def __init__(self, words, cwd=REPOSITORY, environment=os.environ):
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            words,
            cwd=cwd,
            env=environment | {"OMP_NUM_THREADS": "1", "TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is a signal from the controlling terminal
        )
        os.close(theirs)
        self.ours, self.shown = ours, ""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def until(self, awaited, seconds=180):
        """What is shown next, up to and with `awaited`; all that is left for None."""
        deadline = time.monotonic() + seconds
        while awaited is None or awaited not in self.shown:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{awaited!r} is not in {self.shown!r}"
            try:
                self.shown += os.read(self.ours, 4096).decode(errors="replace")
            except OSError:  # the command has ended
                assert awaited is None, f"{awaited!r} is not in {self.shown!r}"
                break
        end = len(self.shown) if awaited is None else self.shown.index(awaited) + len(awaited)
        seen, self.shown = self.shown[:end], self.shown[end:]
        return seen.replace("\r\n", "\n")

    def type(self, keys):
        time.sleep(0.5)  # what is typed in the instant in which a prompt sets up the terminal is thrown away
        os.write(self.ours, keys.encode())

    def press(self, key, awaited):
        """Types a key, again where nothing came of it: a busy machine takes longer to set up the terminal."""
        for _ in range(4):
            self.type(key)
            try:
                return self.until(awaited, seconds=15)
            except AssertionError:
                continue
        return self.until(awaited)

    def ended(self):
        """The exit status, and what was shown last."""
        rest = self.until(None)
        return self.process.wait(timeout=30), rest
