"""A Slurm job: until when it may run, and how it comes back into the queue.

Rules:

1. `scontrol show job` is believed, the environment is not: $SLURM_JOB_END_TIME is wrong after a
   preemption or an extension.
2. EndTime is when Slurm sends SIGTERM; SIGKILL follows after KillWait. When a preemption has a
   grace, EndTime is moved to that grace's end. PreemptTime is when the preemption *began*, and no
   deadline.
3. A job is put back into the queue only when it runs, when it ran into its time limit, or when it
   was preempted for good (PreemptMode=CANCEL). What a user cancelled looks like this until it is
   gone: COMPLETING, no reason, no more restarts than when we were started, and no PreemptTime since
   then. It is left alone. One thing can't be told apart: what a user cancels during a preemption's
   grace has a PreemptTime, and is put back; cancel it once more.
4. Slurm may be faster: a job that was preempted without a grace, or requeued by somebody else, has
   one restart more than when we were started, and there is nothing left to ask for. Within a grace
   it is still RUNNING, and then asking is right: older versions take a job that ends within it for
   one that is done.
5. A job that was given up on and that Slurm puts back by itself (4) is held in the queue: `scontrol
   hold` for one that is back already, `requeuehold` for one within a grace, of which nobody knows
   what Slurm will make of it. `scontrol release` lets it go on.
6. A task of an array is called ARRAY_TASK. The number of its last task is the array's own, and
   asking for that would requeue them all.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from typing import Final

from ckptd.host.host import Notice, Plain

JOB_VARIABLE: Final = "SLURM_JOB_ID"

#: Within a stop signal's grace there is no time to lose; at the end there is nothing else to do.
_LOOK_BOUND_S: Final = 5.0
_ASK_BOUND_S: Final = 20.0
_TRIES: Final = 3
_PAUSE_S: Final = 1.0
#: A flush that takes more than this of KillWait is better warned of before.
_KILL_WAIT_SHARE: Final = 0.5
_WARNING_MIN_S: Final = 120.0
#: A signal that comes so long before the time limit is one of `--signal`, as a rule.
_LIMIT_IS_NEAR_S: Final = 900.0

_FIELD: Final = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)")
_KILL_WAIT: Final = re.compile(r"^KillWait\s*=\s*(\d+)", re.MULTILINE)


class Slurm(Plain):
    """The Slurm job of this environment.

    Args:
        environment: with SLURM_JOB_ID.
    """

    restarts = True
    returns = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._id = job_id(environment)
        self.job = f"Slurm job {self._id}"
        self.restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
        count = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES")
        self.nodes = int(count or 1)
        self.address = node(environment) or self.address
        self._partition = environment.get("SLURM_JOB_PARTITION")
        # Seconds since 1970 instead of a local time, of which there are two in an autumn night.
        self._environment = {**environment, "SLURM_TIME_FORMAT": "%s"}
        self._kill_wait_s: float | None = None

    def described(self) -> str:
        """See `Host`."""
        words = [f"Slurm job {self._id}"]
        if self.restart:
            words.append(f"restart {self.restart}")
        if self._partition:
            words.append(f"partition {self._partition}")
        try:
            shown = self._show(_LOOK_BOUND_S)
            self._kill_wait_s = self._read_kill_wait_s()
        except _NoAnswerError as error:
            words.append(f"until nobody knows when: {error}")
            return ", ".join(words)
        end = _seconds(shown.get("EndTime"))
        if end is not None:
            words.append(f"until {time.strftime('%Y-%m-%d %H:%M', time.localtime(end))}")
        return ", ".join(words)

    def doubts(self, flush_s: float | None) -> list[tuple[str, str]]:
        """See `Host`."""
        try:
            shown = self._show(_LOOK_BOUND_S)
            kill_wait_s = self._read_kill_wait_s()
        except _NoAnswerError as error:
            why = f"scontrol: {error}; the job can't be put back into the queue"
            return [(why, "ask your site why scontrol does not work on this node")]
        found = []
        if shown.get("Requeue") == "0":
            found.append(("requeue: Slurm will not put this job back", "#SBATCH --requeue"))
        if shown.get("BatchFlag") == "0":
            what = "interactive: Slurm does not start an interactive job again"
            found.append((what, "submit a batch script: ckptd slurm-script -- COMMAND | sbatch"))
        # Slurm does not tell whether a warning was asked for.
        if flush_s is not None and flush_s > _KILL_WAIT_SHARE * kill_wait_s:
            what = (
                f"time: without a warning there are {kill_wait_s:g} s from SIGTERM to SIGKILL, "
                f"and a checkpoint took {flush_s:.3g} s"
            )
            warning_s = max(2 * flush_s, _WARNING_MIN_S)
            found.append((what, f"#SBATCH --signal=B:USR1@{warning_s:.0f}"))
        return found

    def notice(self) -> Notice:
        """See `Host`."""
        asked_s = time.time()  # the time that the question takes is not left
        try:
            shown = self._show(_LOOK_BOUND_S)
            if self._kill_wait_s is None:
                self._kill_wait_s = self._read_kill_wait_s()
        except _NoAnswerError:
            return Notice()
        end = _seconds(shown.get("EndTime"))
        if shown.get("JobState") != "RUNNING":  # SIGTERM was sent; EndTime may be the next run's
            return Notice(self._kill_wait_s, self._why_ended(shown))
        why = "it is preempted" if _is_preempted(shown) else None
        if end is None:
            return Notice(None, why)
        left_s = max(end - asked_s, 0.0)
        if why is None and left_s < _LIMIT_IS_NEAR_S:
            why = "its time limit comes"
        return Notice(left_s + self._kill_wait_s, why)

    def _why_ended(self, shown: Mapping[str, str]) -> str:
        if shown.get("Reason") == "TimeLimit":
            return "its time limit is over"
        if _is_preempted(shown):
            return "it was preempted"
        return "it was requeued" if self._is_back(shown) else "it was cancelled"

    def again(self) -> str | None:
        """See `Host`."""
        by_hand = f"put it back by hand with `scontrol requeue {self._id}`"
        why = "scontrol did not answer"
        for number in range(_TRIES):
            if number:
                time.sleep(_PAUSE_S)
            try:
                shown = self._show(_ASK_BOUND_S)
                said = self._needs_nothing(shown)
                if said is not None:
                    return said
                self._ask("requeue", self._id, bound_s=_ASK_BOUND_S)
            except _NoAnswerError as error:
                why = str(error)
                continue
            return f"asked Slurm to put job {self._id} back into the queue"
        return f"job {self._id} is not back in the queue ({why}): {by_hand}"

    def never_again(self) -> str | None:
        """See `Host`."""
        try:
            shown = self._show(_ASK_BOUND_S)
            if self._is_back(shown):
                self._ask("hold", self._id, bound_s=_ASK_BOUND_S)
            elif shown.get("JobState") == "RUNNING" and _is_preempted(shown):
                self._ask("requeuehold", self._id, bound_s=_ASK_BOUND_S)
            else:
                return None
        except _NoAnswerError as error:
            return (
                f"Slurm may start job {self._id} again all the same, it could not be held "
                f"({error}): end it with `scancel {self._id}`"
            )
        return (
            f"Slurm puts preempted jobs back by itself: job {self._id} is held in the queue. "
            f"`scontrol release {self._id}` lets it go on, `scancel {self._id}` ends it"
        )

    def _is_back(self, shown: Mapping[str, str]) -> bool:
        return int(shown.get("Restarts", "0")) > self.restart

    def _needs_nothing(self, shown: Mapping[str, str]) -> str | None:
        """Why no requeue is to be asked for; None: it is."""
        state = shown.get("JobState", "unknown")
        if shown.get("BatchFlag") == "0":
            return f"job {self._id} is interactive, Slurm does not requeue it: start it again"
        if self._is_back(shown):
            return f"Slurm has put job {self._id} back into the queue"
        if shown.get("Requeue") == "0" and state == "RUNNING":
            return (
                f"job {self._id} was submitted with --no-requeue: it is not put back. "
                "Submit it again to go on"
            )
        if state == "RUNNING" or shown.get("Reason") == "TimeLimit" or _is_preempted(shown):
            return None
        return f"job {self._id} was cancelled ({state}): it is not put back into the queue"

    def _show(self, bound_s: float) -> dict[str, str]:
        text = self._ask("--oneliner", "show", "job", self._id, bound_s=bound_s)
        return dict(_FIELD.findall(text))

    def _read_kill_wait_s(self) -> float:
        found = _KILL_WAIT.search(self._ask("show", "config", bound_s=_LOOK_BOUND_S))
        return 0.0 if found is None else float(found[1])

    def _ask(self, *words: str, bound_s: float) -> str:
        try:
            done = subprocess.run(
                ["scontrol", *words],  # noqa: S607  # found on the PATH, as a user would
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=bound_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _NoAnswerError(f"scontrol did not answer within {bound_s:g} s") from None
        except OSError as error:
            raise _NoAnswerError(f"scontrol could not be started: {error.strerror}") from error
        if done.returncode != 0:
            said = done.stderr.strip() or f"exit status {done.returncode}"
            raise _NoAnswerError(f"scontrol {words[0]}: {said}")
        return done.stdout


class _NoAnswerError(Exception):
    """Slurm did not say; the text says why."""


def job_id(environment: Mapping[str, str]) -> str:
    """What Slurm calls this job, and no other: ID, or ARRAY_TASK."""
    array, task = (environment.get(f"SLURM_ARRAY_{key}") for key in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else environment[JOB_VARIABLE]


def task(environment: Mapping[str, str]) -> str | None:
    """Which task of several that one `srun` started; None: it is the only one."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return environment.get("SLURM_PROCID")
    return None


def node(environment: Mapping[str, str] = os.environ) -> str | None:
    """The node's name in Slurm; several nodes may share a machine."""
    return environment.get("SLURMD_NODENAME")


def _is_preempted(shown: Mapping[str, str]) -> bool:
    """Whether this start of the job was preempted, and not an earlier one."""
    preempted, started = _seconds(shown.get("PreemptTime")), _seconds(shown.get("StartTime"))
    return preempted is not None and (started is None or preempted >= started)


def _seconds(value: str | None) -> float | None:
    """A time that scontrol printed as seconds since 1970; None for "Unknown" and "None"."""
    return float(value) if value is not None and value.isdecimal() else None
