"""The worker: the training process. The only code that imports torch.

- `job`         what `ckptd.attach` returns: the public face
- `loops`       resumable loops: where safe points are, and how a position is found again
- `feeds`       what a loop takes its items from, and how that is put back to item k
- `dataloader`  the feed for `torch.utils.data.DataLoader`, with its workers' random streams
- `state`       how each kind of tracked object is captured, checked and restored
- `tree`        any nest of plain values and tensors as JSON plus a list of tensors, and back
- `rng`         every random generator's state as JSON, and back
- `snapshot`    a captured state as one memfd of file images; a checkpoint read back
- `outputs`     files that are rolled back with the checkpoint
- `link`        the socket and the status page; what happens when the supervisor is gone
"""
