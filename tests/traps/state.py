"""Every kind of state that training code was seen to lose, many cases in one run.

    python state.py FAMILY OUT

Run plainly or under `ckptd launch`, interrupted like structures.py. Each step of each case writes
its bits to OUT, so that a line that differs names the case.
"""

import copy
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from structures import Run

import ckptd

STEPS = 9


def bits(value):
    """A value's bits as a short text: any nest of tensors, arrays and numbers."""
    hasher = xxhash.xxh3_64()
    _update(hasher, value)
    return hasher.hexdigest()


def _update(hasher, value):
    hasher.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.layout is not torch.strided:
            value = value.to_dense()
        if value.is_quantized:
            per_tensor = value.qscheme() is torch.per_tensor_affine
            of = value.q_scale() if per_tensor else value.q_per_channel_scales().tolist()
            hasher.update(str((value.qscheme(), value.dtype, of)).encode())
            value = value.int_repr()
        hasher.update(f"{value.dtype} {tuple(value.shape)} {value.stride()}".encode())
        hasher.update(bytes(value.contiguous().view(-1).view(torch.uint8).tolist()))
    elif isinstance(value, np.ndarray):
        hasher.update(value.tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            hasher.update(str(key).encode())
            _update(hasher, item)
    elif isinstance(value, list | tuple | deque):
        for item in value:
            _update(hasher, item)
    elif isinstance(value, float):
        hasher.update(value.hex().encode())
    else:
        hasher.update(repr(value).encode())


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


# ------------------------------------------------------------------ optimizers


def optimizers(run):
    """All of torch.optim at once, with their variants; each trains its own model."""
    cases = {
        "adadelta": lambda p: torch.optim.Adadelta(p),
        "adafactor": lambda p: torch.optim.Adafactor(p),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1),
        "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        "adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
        "adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
        "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
        "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, t0=2),
        "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=3),
        "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
        "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
        "rprop": lambda p: torch.optim.Rprop(p),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        "bfloat16": lambda p: Float32Moments(p),
        "slow": lambda p: torch.optim.Adam(p, lr=0.1),
        "lazy": lambda p: torch.optim.Adam(p, lr=0.1),
        "rescheduled": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }
    if hasattr(torch.optim, "Muon"):
        cases["muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.1)
    models, made = {}, {}
    for name, make in cases.items():
        models[name] = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        if name == "bfloat16":
            models[name] = models[name].to(torch.bfloat16)
        made[name] = make(list(models[name].parameters()))
    embedding = nn.Embedding(6, 2, sparse=True)
    made["sparse"] = torch.optim.SparseAdam(list(embedding.parameters()), lr=0.1)
    loose = [torch.ones(3, requires_grad=True)]  # a parameter of no tracked module
    made["loose"] = torch.optim.Adam(loose, lr=0.1)
    run.job.track(embedding=embedding, loose=loose[0])
    for name, model in models.items():
        run.job.track(**{f"model_{name.replace(' ', '_')}": model})
    for name, optimizer in made.items():
        run.job.track(**{f"optimizer_{name.replace(' ', '_')}": optimizer})
    for step in run.job.loop(range(STEPS)):
        for name, optimizer in made.items():
            if name == "slow" and step % 3:
                continue
            if name == "lazy" and step < 5:  # its state is made in the middle of the run
                continue
            if name == "rescheduled":
                optimizer.param_groups[0]["lr"] *= 0.9  # by hand
            run.trace(name, step, bits(train(name, optimizer, models, embedding, loose)))
        run.tick()
    for name, optimizer in made.items():
        run.trace(name, bits(optimizer.state_dict()), bits(parameters_of(optimizer)))


def train(name, optimizer, models, embedding, loose):
    """One step of one case; its loss."""

    def loss_of():
        if name == "sparse":
            return embedding(torch.tensor([1, 4, 1])).pow(2).sum()
        if name == "loose":
            return (loose[0] - 2).pow(2).sum()
        return models[name](x).float().sub(x.float().sum(1, keepdim=True)).pow(2).mean()

    x = torch.rand(5, 3).to(parameters_of(optimizer)[0].dtype)

    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    if name == "lbfgs":
        return optimizer.step(closure)
    loss = closure()
    optimizer.step()
    return loss


class Float32Moments(torch.optim.Optimizer):
    """Momentum in float32 for bfloat16 parameters; `load_state_dict` would cast it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self):
        for p in parameters_of(self):
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
            state["momentum"].mul_(0.9).add_(p.grad.float())
            p.sub_((0.05 * state["momentum"]).to(p.dtype))


# ------------------------------------------------------------------ schedulers


class Warmup:
    """A callable with state of its own, for LambdaLR."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return 1 / (1 + self.calls)


def all_schedulers(run):
    """Each kind of scheduler on an optimizer of its own, and one that is made in the run."""
    cases = {
        "step": lambda o: schedulers.StepLR(o, 2),
        "multistep": lambda o: schedulers.MultiStepLR(o, [2, 5]),
        "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
        "constant": lambda o: schedulers.ConstantLR(o, total_iters=3),
        "linear": lambda o: schedulers.LinearLR(o, total_iters=5),
        "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
        "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=7),
        "cosine": lambda o: schedulers.CosineAnnealingLR(o, 5),
        "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, 2),
        "onecycle": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
        "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.5, step_size_up=3),
        "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.95**epoch),
        "callable": lambda o: schedulers.LambdaLR(o, Warmup()),
        "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
        "sequential": lambda o: schedulers.SequentialLR(
            o, [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.9)], [3]
        ),
        "chained": lambda o: schedulers.ChainedScheduler(
            [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.9)]
        ),
    }
    model = nn.Linear(2, 1)
    optimizers, made = {}, {}
    for name, make in cases.items():
        optimizers[name] = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1, momentum=0.9)
        # Tracked before its scheduler is made, which overwrites the learning rate once more.
        run.job.track(**{f"optimizer_{name}": optimizers[name]})
        made[name] = make(optimizers[name])
        run.job.track(**{f"scheduler_{name}": made[name]})
    swa_model, swa, late = (
        swa_utils.AveragedModel(model),
        None,
        torch.optim.SGD([*model.parameters()], lr=0.2),
    )
    run.job.track(model=model, swa_model=swa_model, late=late)
    for epoch in run.job.loop(range(3)):
        if epoch == 1:
            swa = swa_utils.SWALR(late, swa_lr=0.01, anneal_epochs=4)
            run.job.track(swa=swa)
        for step in run.job.loop(range(3)):
            loss = model(torch.rand(4, 2)).pow(2).mean()
            for name, optimizer in optimizers.items():
                for p in parameters_of(optimizer):
                    p.grad = torch.rand_like(p)
                optimizer.step()
                made[name].step(*([loss.item()] if name == "plateau" else []))
                state = optimizer.param_groups[0]
                run.trace(name, epoch, step, bits([state["lr"], state["momentum"]]))
            late.zero_grad()
            loss.backward()
            late.step()
            if swa is not None:
                swa.step()
                swa_model.update_parameters(model)
            run.trace("swa", bits(late.param_groups[0]["lr"]), bits(list(swa_model.parameters())))
            run.tick()
    for name, optimizer in optimizers.items():
        run.trace(name, bits(parameters_of(optimizer)))


# ------------------------------------------------------------------ models


class Recurrent(nn.Module):
    """State outside of the state_dict: hidden state, counters, a non-persistent buffer, a hook."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(2, 3)
        self.hidden = torch.zeros(1, 3)
        self.seen = 0
        self.register_buffer("running", torch.zeros(3), persistent=False)
        self.calls = Counter()
        self.cell.register_forward_hook(self._count)

    def _count(self, module, inputs, output):
        self.calls["cell"] += 1

    def forward(self, x):
        self.hidden = self.cell(x, self.hidden.detach())
        self.seen += 1
        self.running.mul_(0.9).add_(self.hidden.detach()[0])
        return self.hidden * self.calls["cell"] + self.running


class Tied(nn.Module):
    """Tied weights, and parameters that are views of one flat buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("flat", torch.rand(8))
        self.views = [self.flat[:4], self.flat[4:].view(2, 2)]

    def forward(self, codes):
        self.views[0].mul_(1.01)
        return self.head(self.embedding(codes)) * self.flat.sum() + self.views[1].sum()


def models(run):
    """Modules whose state is more than their state_dict, or lies unusually."""
    cases = {
        "recurrent": Recurrent(),
        "tied": Tied(),
        "norm": nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)),
        "lazy": nn.Sequential(nn.LazyLinear(3), nn.Tanh()),
        "spectral": parametrizations.spectral_norm(nn.Linear(2, 3)),
        "weight norm": parametrizations.weight_norm(nn.Linear(2, 3)),
        "pruned": nn.Linear(2, 3),
        "channels_last": nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last),
        "converted": nn.Conv2d(3, 4, 3, padding=1),
        "compiled": torch.compile(nn.Linear(2, 3), backend="eager"),
        "ema": swa_utils.AveragedModel(
            nn.Linear(2, 3), multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)
        ),
        "frozen": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)),
    }
    cases["lazy"](torch.rand(1, 2))
    prune.random_unstructured(cases["pruned"], "weight", 0.5)
    tensors = nn.Module()
    for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"):
        tensors.register_buffer(f"as_{dtype}", torch.rand(3).to(getattr(torch, dtype)))
    tensors.register_buffer("scalar", torch.tensor(1.5))
    tensors.register_buffer("empty", torch.empty(0, 3))
    tensors.register_buffer("strided", torch.rand(4, 6)[:, ::2])
    tensors.register_buffer("coo", torch.eye(3).to_sparse())
    tensors.register_buffer("csr", torch.eye(3).to_sparse_csr())
    tensors.register_buffer("nan", torch.tensor([float("nan"), -0.0, float("inf")]))
    quantised = torch.quantize_per_tensor(torch.rand(3), 0.01, 3, torch.quint8)
    tensors.register_buffer("per_tensor", quantised)
    scales, zeros = torch.rand(3) / 9, torch.tensor([1, 2, 3])
    tensors.register_buffer(
        "per_channel", torch.quantize_per_channel(torch.rand(3, 2), scales, zeros, 0, torch.qint8)
    )
    source = nn.Linear(2, 3)
    optimizers = {
        name: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for name, model in cases.items()
    }
    run.job.track(tensors=tensors, source=source)
    for name, model in cases.items():
        run.job.track(**{f"m_{name.replace(' ', '_')}": model})
        run.job.track(**{f"o_{name.replace(' ', '_')}": optimizers[name]})
    for step in run.job.loop(range(STEPS)):
        if step == 4:
            cases["frozen"][0].requires_grad_(requires_grad=False)
            cases["norm"].eval()
            cases["converted"].to(memory_format=torch.channels_last)
        for name, model in cases.items():
            if name == "ema":
                source.weight.data.add_(torch.rand(3, 2))
                model.update_parameters(source)
            x = torch.rand(1, 2)
            if name == "channels_last":
                x = torch.rand(2, 3, 5, 5).to(memory_format=torch.channels_last)
            elif name == "converted":
                x = torch.rand(2, 3, 5, 5)
            elif name == "tied":
                x = torch.randint(5, (3,))
            elif name == "norm":
                x = torch.rand(6, 2)
            loss = model(x).pow(2).mean()
            optimizers[name].zero_grad()
            if loss.requires_grad:
                loss.backward()
                optimizers[name].step()
            run.trace(name, step, bits(loss), bits(list(model.parameters())))
            run.trace(name, [p.requires_grad for p in model.parameters()], model.training)
        for name, buffer in tensors.named_buffers():
            if buffer.is_floating_point() and buffer.layout is torch.strided:
                setattr(tensors, name, (buffer.float() * 1.25).to(buffer.dtype))
            elif name == "per_tensor":
                tensors.per_tensor = torch.quantize_per_tensor(
                    torch.rand(3), buffer.q_scale() * 1.1, 3, torch.quint8
                )
            elif name == "per_channel":
                tensors.per_channel = torch.quantize_per_channel(
                    torch.rand(3, 2), buffer.q_per_channel_scales() * 1.1, zeros, 0, torch.qint8
                )
            elif name == "coo":
                tensors.coo = (tensors.coo * 1.5).coalesce()
        run.trace("tensors", step, *(f"{n}={bits(b)}" for n, b in tensors.named_buffers()))
        run.trace("recurrent", cases["recurrent"].seen, bits(cases["recurrent"].running))
        run.trace(
            "views",
            bits(cases["tied"].views),
            cases["tied"].head.weight is cases["tied"].embedding.weight,
        )
        run.tick()


# ------------------------------------------------------------------ training


def training(run):
    """Gradient accumulation, scaler, autocast, forked streams, best weights, early stopping."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    labels = torch.zeros(6)  # pseudo-labels, written into the data
    run.job.track(model=model, optimizer=optimizer, scaler=scaler, average=average, labels=labels)
    run.job.vars(best=float("inf"), best_weights=None, patience=0, micro=0)
    for epoch in run.job.loop(range(3)):
        for index in run.job.loop(torch.randperm(6).tolist()):
            with torch.random.fork_rng():
                torch.manual_seed(index)
                x = torch.rand(3, 4)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (model(x).float() - labels[index]).pow(2).mean()
            scaler.scale(loss / 2).backward()
            run.job.vars.micro += 1
            if run.job.vars.micro % 2 == 0:  # an interruption comes between two micro-steps as well
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            for name, p in model.named_parameters():
                average[name].mul_(0.9).add_(p.detach(), alpha=0.1)
            labels[index] += loss.item()
            run.trace(epoch, index, bits(loss), bits(average), scaler.get_scale(), bits(labels))
            run.tick()
        with torch.no_grad():
            model.eval()
            score = model(torch.rand(8, 4)).mean().item()
            model.train()
        if score < run.job.vars.best:
            run.job.vars.best, run.job.vars.patience = score, 0
            run.job.vars.best_weights = copy.deepcopy(model.state_dict())
        else:
            run.job.vars.patience += 1
        run.trace("epoch", bits(score), run.job.vars.patience, bits(run.job.vars.best_weights))


def unfreezing(run):
    """Groups added while it trains, a second optimizer made late, groups that share nothing."""
    body, head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 1)
    body.requires_grad_(requires_grad=False)
    optimizer = torch.optim.Adam([{"params": head.parameters(), "lr": 0.1, "name": "head"}])
    run.job.track(body=body, head=head, optimizer=optimizer)
    second = None
    for epoch in run.job.loop(range(4)):
        if epoch in (1, 2):
            layer = body[2 - epoch]
            layer.requires_grad_(requires_grad=True)
            optimizer.add_param_group({"params": [*layer.parameters()], "lr": 0.01 * epoch})
        if epoch == 3:  # replaced by another kind, under a name of its own
            second = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
            run.job.track(second=second)
        for step in run.job.loop(range(3)):
            used = second or optimizer
            loss = head(body(torch.rand(4, 3))).pow(2).mean()
            used.zero_grad()
            loss.backward()
            used.step()
            run.trace(epoch, step, bits(loss), [p.requires_grad for p in body.parameters()])
            run.trace([(g["lr"], g.get("name"), len(g["params"])) for g in optimizer.param_groups])
            run.tick()
    run.trace(
        bits(optimizer.state_dict()), bits(second.state_dict()), bits(list(body.parameters()))
    )


# ------------------------------------------------------------------ Python objects


class Statistics:
    """A plain object, with a slot and with objects inside."""

    __slots__ = ("__dict__", "count")

    def __init__(self):
        self.count = 0
        self.values = deque(maxlen=4)
        self.rng = np.random.default_rng(4)
        self.nested = {"best": (0.0, "none"), 3: [torch.zeros(2)]}


def objects(run):
    """Generators of every kind, containers, replay buffers, plain objects."""
    kinds = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
    generators = {name: np.random.Generator(getattr(np.random, name)(3)) for name in kinds}
    spawning = np.random.default_rng(8)
    run.job.track(**generators, spawning=spawning)
    own = {
        "python": random.Random(1),
        "legacy": np.random.RandomState(2),
        "torch": torch.Generator().manual_seed(3),
    }
    sobol = torch.quasirandom.SobolEngine(3, scramble=True, seed=5)
    counts, ordered, grouped = Counter(), OrderedDict(), defaultdict(list)
    replay = deque(maxlen=5)
    ring = np.zeros((4, 3), dtype=np.float32)
    statistics = Statistics()
    run.job.track(
        **own,
        counts=counts,
        ordered=ordered,
        grouped=grouped,
        replay=replay,
        ring=ring,
        sobol=sobol,
    )
    boxed = {"numpy": np.random.default_rng(11), "python": [random.Random(12)]}
    first, second = boxed["numpy"], boxed["python"][0]  # the script's own names for them
    run.job.track(statistics=statistics, boxed=boxed)
    run.job.vars(history=[], nothing=None, infinite=float("-inf"), big=2**80, pair=(1, "x"))
    for step in run.job.loop(range(STEPS)):
        drawn = [float(g.random()) for g in generators.values()]
        child = spawning.spawn(1)[0]
        drawn += [float(child.random()), own["python"].gauss(0, 1), own["legacy"].standard_normal()]
        drawn += [torch.rand(1, generator=own["torch"]).item(), *sobol.draw(1)[0].tolist()]
        drawn += [float(first.random()), second.random()]
        run.trace("drawn", step, *(x.hex() for x in drawn))
        counts[step % 3] += 1
        ordered[step] = step
        ordered.move_to_end(0)
        grouped[step % 2].append(drawn[0])
        replay.append((np.full(3, step, dtype=np.float32), torch.rand(2), step % 2 == 0))
        ring[step % 4] = np.random.rand(3)
        statistics.count += 1
        statistics.values.append(statistics.rng.random())
        statistics.nested["best"] = max(statistics.nested["best"], (drawn[1], str(step)))
        statistics.nested[3][0].add_(1)
        run.job.vars.history.append((step, drawn[2]))
        run.job.vars.big += step
        run.trace("held", counts, list(ordered), dict(grouped), bits(list(replay)), bits(ring))
        run.trace("object", statistics.count, bits(statistics.values), bits(statistics.nested))
        run.trace("vars", bits(run.job.vars.history), run.job.vars.big, run.job.vars.pair)
        run.tick()


# ------------------------------------------------------------------ settings


def settings(run):
    """Flags of torch that a run changes while it goes on: the resumed one has them as they were."""
    for step in run.job.loop(range(STEPS)):
        if step == 1:
            torch.set_default_dtype(torch.float64)
        if step == 2:
            torch.set_flush_denormal(True)  # takes no keyword
        if step == 3:
            torch.set_float32_matmul_precision("high")
            torch.use_deterministic_algorithms(mode=True, warn_only=True)
        if step == 4:
            torch.backends.mkldnn.enabled = False
            torch.backends.cudnn.benchmark = True
        if step == 5:
            torch.set_num_threads(2)
        run.trace(
            step,
            torch.rand(1).dtype,
            (torch.tensor(1e-310, dtype=torch.float64) * 1).item() == 0,
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.get_num_threads(),
        )
        run.tick()


def main():
    family, out = globals()[sys.argv[1]], sys.argv[2]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    family(Run(ckptd.attach(), out))


if __name__ == "__main__":
    main()
