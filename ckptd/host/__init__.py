"""The operating system, a module a thing: small protocols, so that tests can simulate them.

- `clock`     durations and the time of day
- `disk`      the file operations of the store, each of which can fail
- `children`  the command's process, its tree, and the end of both
- `signals`   signals as facts in a queue
- `sockets`   packets with descriptors riding on them
- `memory`    memory that is shared between processes, and how much of it is left
- `stacks`    what the processes of a job that hangs are doing
- `host`      what started us: what it knows, and how to come back after an interruption
- `slurm`, `systemd`, `kubernetes`   hosts; `hosts` tells which one this is
- `clouds`    notices that a machine will be taken away
"""
