"""`ckptd drill`: proves for a script that interruptions change nothing, or names what they change.

- `plan`     where to interrupt (pure).
- `runs`     the runs: each in a copy of the working directory, under `ckptd launch`.
- `compare`  two recorded runs bit for bit: the first difference and its cause (pure).
"""
