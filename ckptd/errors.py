"""Every error that a user can meet.

A class says whose fault it is and whether trying again helps; the message names the object, what
was found, what was expected and what happens next. `exit_code` is what `ckptd` exits with when the
error ends it (sysexits.h; the table is in the README).
"""

from __future__ import annotations


class CkptdError(Exception):
    """Anything that ckptd reports to its user."""

    exit_code = 70


class UsageError(CkptdError):
    """The command line or a call is wrong. Trying again does not help; changing it does."""

    exit_code = 64


class JobChangedError(UsageError):
    """A run of this name exists, with another command or working directory."""


class CannotCarryError(CkptdError, TypeError):
    """A tracked object, or a value inside it, is of a kind that a checkpoint can't hold."""


class DuplicateNameError(CkptdError, ValueError):
    """Two different objects were tracked under one name."""


class MismatchError(CkptdError, ValueError):
    """The checkpoint does not fit what the script built. Nothing was changed."""


class LoopChangedError(CkptdError, ValueError):
    """A loop is resumed over something else than it was interrupted in."""


class ResumePointMissedError(CkptdError, RuntimeError):
    """The script ended without coming back to the loop in which it was interrupted."""


class LockedError(CkptdError):
    """Another supervisor holds this job. Trying again helps when that one has ended."""

    exit_code = 69


class FencedError(CkptdError):
    """A newer attempt of this job exists, so this one may not publish any more."""

    exit_code = 69


class NotDurableError(CkptdError, OSError):
    """The newest state could not be made durable. Older checkpoints are untouched."""

    exit_code = 74


class SilentRanksError(CkptdError):
    """The ranks of a job whose supervisor is gone could not save together."""

    exit_code = 74


class DamagedError(CkptdError, ValueError):
    """A checkpoint is torn, edited or corrupt: it must not be loaded."""

    exit_code = 74


class ProtocolError(CkptdError):
    """The worker and the supervisor do not understand each other (two versions of ckptd?)."""
