"""The fake worker (tests/supervisor/fake_worker.py) with a state of a mebibyte.

heavy_worker.py [options of fake_worker.py]
"""

import json
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "supervisor"))

import fake_worker

from ckptd import wire

BULK = 1 << 20


class HeavyWorker(fake_worker.Worker):
    def snapshot(self, asked):
        state = json.dumps({"step": self.step}).encode()
        descriptor = os.memfd_create("state")
        os.write(descriptor, state)
        os.pwrite(descriptor, os.urandom(BULK), BULK)
        self.generation += 1
        files = [
            wire.Extent("state.json", 0, len(state)),
            wire.Extent("bulk.bin", BULK, BULK),
        ]
        self.send_snapshot(descriptor, files, asked)


if __name__ == "__main__":
    # A limit on the size of files is the supervisor's trouble here: this one's file is memory.
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    fake_worker.Worker = HeavyWorker
    fake_worker.main()
