"""The supervisor: decides when to flush, stop, relaunch and give up. Never imports torch.

- `policy`   numbers and choices: backoff, giving up, exit codes (pure)
- `machine`  what happens next: `step(state, fact, now_s) -> (state, actions)` (pure)
- `loop`     feeds the machine facts and carries out its actions
- `run`      a run's directory: what to run, who runs it, where things lie
- `server`   the socket that the worker and the command line talk to
- `writer`   the thread that publishes snapshots
- `journal`  everything that happened, append-only
"""
