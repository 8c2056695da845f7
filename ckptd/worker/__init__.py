"""The worker: the training process. The only code that imports torch.

- `job`         what `ckptd.attach` returns: the public face
- `loops`       resumable loops: where safe points are, and how a position is found again
- `feeds`       what a loop takes its items from, and how that is put back to item k
- `dataloader`  the feed for `torch.utils.data.DataLoader`, with its workers' random streams
- `state`       how each kind of tracked object is captured, checked and restored
- `tree`        any nest of plain values and tensors as JSON plus a list of tensors, and back
- `rng`         every random generator's state as JSON, and back
- `peek`        the same for loader workers, read from memory
- `tape`        the random streams as a replayed iterable found them
- `settings`    switches of torch that decide about bits
- `snapshot`    a captured state as file images in one memory; read back from there or from disk
- `arena`       that memory, used again
- `copies`      the one copy that a snapshot is
- `outputs`     files that are rolled back with the checkpoint
- `link`        the socket and the status page; what happens when the supervisor is gone
- `environment` versions, devices, thread counts: compared over the attempts
- `callsite`    where in the user's code a call came from
- `drilled`     the job of a drilled run, with `digests` and the script's `variables`
"""
