"""The operating system, a module a thing: small protocols, so that tests can simulate them.

- `clock`     durations and the time of day
- `disk`      the file operations of the store, each of which can fail
- `children`  the command's process, its tree, and the end of both
- `signals`   signals as facts in a queue
- `sockets`   packets with descriptors riding on them
- `host`      what started us: a scheduler or nobody; how to come back after an interruption
- `slurm`     a Slurm job
- `memory`    memory that is shared between processes
"""
