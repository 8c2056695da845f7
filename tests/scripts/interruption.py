"""A script that interrupts its own job at an exact moment, once.

INTERRUPT="moment:signal" chooses both; INTERRUPT_ONCE names a file that remembers that it was done.
Signals: TERM and USR1 go to the supervisor, "KILL worker" and "KILL supervisor" to whom they say.
"WAIT" sends nothing: it waits for somebody else's interruption.
"the flush" is the moment at which a flush, asked for by a SIGTERM in mid-epoch, captures the state.
"""

import os
import signal
import sys
import time
from pathlib import Path

_BOUND_S = 60
_WAIT_BOUND_S = 200


def wait_until(happened, what, bound_s=_BOUND_S):
    """Wait for an event; the script ends with an error when it does not come."""
    bound = time.monotonic() + bound_s
    while not happened():
        if time.monotonic() > bound:
            sys.exit(f"{what} never came")
        time.sleep(0.001)


def signal_and_see(job, send):
    """Send a signal, and return when the request that it leads to has arrived at this process."""
    before = job.words[0]
    send()
    wait_until(lambda: job.words[0] != before, "a request")


class Interruption:
    """A tracked object: its `state_dict` is called by every flush."""

    def __init__(self):
        moment, _, self.signal = os.environ.get("INTERRUPT", ":").partition(":")
        self.moment = moment
        self.once = Path(os.environ.get("INTERRUPT_ONCE", "/nonexistent/marker"))
        self.job = None
        self.flushing = False

    def state_dict(self):
        if self.flushing:
            self.flushing = False
            self._strike()
        return {}

    def load_state_dict(self, state):
        pass

    def checkpoint_first(self):
        """Have one durable checkpoint, so that a kill has something to come back to."""
        if self.moment and not self.once.exists():
            self._signal_and_see(signal.SIGUSR2)

    def at(self, moment):
        """The script is at a moment; interrupt there if it was chosen and not done yet."""
        if self.once.exists() or self.moment not in (moment, "the flush"):
            return
        if self.moment == "the flush":
            if moment == "mid-epoch":
                self.once.touch()
                self._signal_and_see(signal.SIGTERM)
                self.flushing = True
        elif self.moment == moment:
            self.once.touch()
            self._strike()

    def _strike(self):
        print("striking:", self.moment, self.signal, file=sys.stderr, flush=True)
        if self.signal == "KILL worker":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.signal == "WAIT":
            self._wait()
        elif self.signal == "KILL supervisor":
            self._signal_and_see(signal.SIGKILL)
        elif self.flushing_already():
            os.kill(self.job._link.supervisor_pid(), getattr(signal, f"SIG{self.signal}"))
        else:
            self._signal_and_see(getattr(signal, f"SIG{self.signal}"))

    def _wait(self):
        """Until a request arrives, or the supervisor is gone."""
        before = self.job.words[0]
        wait_until(
            lambda: self.job.words[0] != before or self.job._link.orphaned,
            "an interruption",
            _WAIT_BOUND_S,
        )

    def flushing_already(self):
        return self.moment == "the flush"

    def _signal_and_see(self, number):
        """Send it to the supervisor, and go on when the request has arrived at this process."""
        signal_and_see(self.job, lambda: os.kill(self.job._link.supervisor_pid(), number))
