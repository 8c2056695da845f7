"""A Kubernetes pod: SIGTERM, and after terminationGracePeriodSeconds SIGKILL.

Rules:

1. A pod is not told its grace. Where the user does not give it (`--grace`), the documented default
   of 30 s holds; a preStop hook has used up a part of it.
2. Starting again is Kubernetes': a Job makes a new pod, on this machine or on another one, and goes
   by our exit code (podFailurePolicy can tell 75 from 70).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from ckptd.host.host import Notice, Plain

#: Set by the kubelet in every container.
SERVICE_VARIABLE: Final = "KUBERNETES_SERVICE_HOST"
_GRACE_S: Final = 30.0


class Pod(Plain):
    """The pod that this container is of.

    Args:
        environment: with KUBERNETES_SERVICE_HOST, and the pod's name in HOSTNAME.
    """

    returns = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._name = environment.get("HOSTNAME", "?")
        self._noticed_s: float | None = None

    def described(self) -> str:
        """See `Host`."""
        return (
            f"Kubernetes pod {self._name}, {_GRACE_S:g} s from SIGTERM to SIGKILL unless --grace "
            "says how many (less than terminationGracePeriodSeconds)"
        )

    def notice(self) -> Notice:
        """See `Host`."""
        now_s = time.monotonic()
        if self._noticed_s is None:
            self._noticed_s = now_s
        left_s = max(0.0, self._noticed_s + _GRACE_S - now_s)
        return Notice(left_s, "the pod is to end", assumed=True)
