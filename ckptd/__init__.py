"""ckptd: PyTorch jobs that continue, bitwise, as if they had never been interrupted.

In a training script:

    import ckptd

    job = ckptd.attach(model=model, optimizer=optimizer, scheduler=scheduler)
    for epoch in job.loop(range(30)):
        for x, y in job.loop(train_loader):
            ...

and on the command line: `ckptd launch -- python train.py`.

The map of the house:

- `worker/`      in the training process: what is tracked, loops, loaders, snapshots. Imports torch.
- `supervisor/`  beside it: decides when to flush, stop, relaunch and give up. Never imports torch.
- `wire`         how the two talk: messages and a page of shared memory.
- `agree`        at which safe point several ranks flush.
- `store/`       checkpoints on disk: published whole or not at all, verified when loaded.
  FORMAT.md.
- `drill/`       `ckptd drill`: a script run undisturbed and interrupted, compared bit for bit.
- `record`       what a drilled run writes down at each safe point.
- `host/`        the operating system behind small protocols, so that tests can simulate it.
- `cli/`         one file a command.
- `errors`       every error a user can meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptd import errors

if TYPE_CHECKING:
    from ckptd.worker.job import Job

__all__ = ["attach", "errors", "seed_everything", "track"]
__version__ = "0.1.0"


def attach(**named: Any) -> Job:
    """Join the job that `ckptd launch` started, and carry these objects through interruptions.

    Without `ckptd launch` the script runs as it always did: no files, no cost.

    Args:
        **named: modules, optimizers, schedulers, GradScalers, samplers, anything with `state_dict`
            and `load_state_dict`; random generators; tensors and arrays (restored in place); dicts,
            lists, sets, deques; plain objects (their attributes).

    Returns:
        The job: `loop`, `stream`, `vars`, `track`, `open`, `log`.

    Raises:
        ckptd.errors.CannotCarryError: an object, or a value inside it, can't be carried.
        ckptd.errors.MismatchError: the checkpoint holds no object of one of these names.
    """
    from ckptd.worker import job  # imports torch, which the command line must not

    return job.attach(named)


def track(**named: Any) -> None:
    """Carry random generators, in this process and in the workers of its DataLoaders.

    Call it where they are made, at the level of the module: then it is also called in workers that
    import the module anew (multiprocessing's "spawn" and "forkserver").

    Args:
        **named: random generators (`random.Random`, numpy's, `torch.Generator`). Those that lie on
            a dataset, or are globals of the dataset's module, are found without it. Other objects
            are given to `attach`, or to `job.track`.

    Raises:
        ckptd.errors.CannotCarryError: an object is no random generator.
    """
    from ckptd.worker import job

    job.track_generators(named)


def seed_everything(seed: int, *, deterministic: bool = True) -> None:
    """Seed python, numpy, torch and every CUDA device.

    Args:
        seed: the seed.
        deterministic: also choose deterministic algorithms (torch, cuDNN, the cuBLAS workspace). An
            operation that has none then raises an error that names it.
    """
    from ckptd.worker import seeds

    seeds.seed_everything(seed, deterministic=deterministic)
