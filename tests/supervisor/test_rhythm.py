"""When a job is taken to hang: far beyond its own rhythm, by time in which it could run."""

from __future__ import annotations

from ckptd.supervisor.rhythm import LIMIT_S_MIN, Rhythm


class Job:
    """A simulated job that is looked at every second."""

    def __init__(self, hang_after_s: float | None = None) -> None:
        self.rhythm = Rhythm(hang_after_s)
        self.now_s, self.step, self.hung_at_s = 0.0, 0, []

    def runs(self, seconds: int, steps: int = 0, *, stopped: bool = False) -> Job:
        """Some seconds, with so many steps spread over them."""
        begin = self.step
        for second in range(1, seconds + 1):
            self.now_s += 1
            self.step = begin + steps * second // seconds
            first = self.step == 0
            self.rhythm.look(self.now_s, self.step, 0, first=first, stopped=stopped)
            if self.rhythm.hangs():
                self.hung_at_s.append(self.now_s)
        return self


def test_half_an_hour_at_least() -> None:
    """A fast job is left alone for half an hour; then it hangs."""
    job = Job().runs(100, 100)
    assert not job.runs(int(LIMIT_S_MIN) - 1).hung_at_s
    assert len(job.runs(10).hung_at_s) == 1


def test_twenty_times_the_longest() -> None:
    """A job whose evaluation took ten minutes has 200."""
    job = Job().runs(100, 100).runs(600, 1).runs(100, 100)
    assert job.rhythm.limit_s == 20 * 600
    assert not job.runs(20 * 600 - 10).hung_at_s
    assert job.runs(20).hung_at_s


def test_the_first_step_is_apart() -> None:
    """It has four times as long, and what it took says nothing about the others."""
    job = Job()
    assert not job.runs(4 * int(LIMIT_S_MIN) - 1).hung_at_s
    job.runs(10, 10)
    assert job.rhythm.limit_s == LIMIT_S_MIN
    job.rhythm.started()
    assert job.rhythm.limit_s == 4 * LIMIT_S_MIN


def test_the_next_time_twice_as_long() -> None:
    """What was killed in a long evaluation has longer, until it is through; then it counts anew."""
    job = Job().runs(100, 100)
    for times in (1, 2, 4):
        assert job.rhythm.limit_s == times * LIMIT_S_MIN
        job.runs(times * int(LIMIT_S_MIN) + 5)
        job.rhythm.started()
        job.step = 90  # from the newest snapshot it gets there again
        job.runs(10, 10)
    assert len(job.hung_at_s) == 3
    job.runs(5, 5)
    assert job.rhythm.limit_s == LIMIT_S_MIN


def test_what_could_not_run_does_not_hang() -> None:
    """SIGSTOP, a debugger; a machine or a supervisor that was suspended."""
    job = Job().runs(100, 100)
    assert not job.runs(10 * int(LIMIT_S_MIN), stopped=True).hung_at_s
    job.now_s += 10 * LIMIT_S_MIN
    assert not job.runs(10).hung_at_s
    assert job.runs(int(LIMIT_S_MIN)).hung_at_s


def test_signs_of_life() -> None:
    """A message of the worker is one."""
    job = Job().runs(100, 100).runs(1000)
    job.rhythm.alive()
    assert not job.runs(1000).hung_at_s


def test_what_the_user_set() -> None:
    """The limit is that; infinite: nothing ever hangs."""
    assert Job(60.0).runs(10, 10).runs(62).hung_at_s
    assert not Job(float("inf")).runs(10, 10).runs(100_000).hung_at_s
