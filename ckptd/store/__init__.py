"""Checkpoints on disk: published whole or not at all, verified when read.

- `FORMAT.md`   the public specification of what is written, and its invariants
- `manifest`    names, lengths and sums of a checkpoint's files (pure)
- `image`       how tensors lie in a safetensors file (pure)
- `retention`   names of checkpoints, and which to drop (pure)
- `fence`       which attempt of a job may publish
- `store`       publish, newest, verify, prune
"""
