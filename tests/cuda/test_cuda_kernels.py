"""Every CUDA kernel is correct in every regime that it supports, on the emulator and on a GPU.

A way through the kernels consists of a tile, a regime, the number of warps that share the K of a
unit, and whether all weights fit into registers. Each test forces one way, checks that it was
taken, and compares the results of activation, adjoint and tangent with the reference in float64. In
low precision the error may be twice torch's own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import Case
from engines import PASSES, REGIMES, TILES, Engine, Run, Tile, emulated
from gpus import H100, T4, TINY
from torch import Tensor

import fusedrnn
from fusedrnn import _C, reference

GPU = "gpu"  # the GPU of this machine, instead of a pretend device
HAS_GPU = torch.cuda.is_available() and _C.has_cuda
DEVICES = {"tiny": TINY, "h100": {**H100, "clusters": [132, 66, 32, 16, 8]}, "t4": T4, GPU: 0}


@dataclass(frozen=True)
class Way:
    """The kernels that a test forces. If it `spills`, shared memory holds some of the weights."""

    regime: str
    tile: int = 0
    split: int = 1
    spills: bool = False

    def __str__(self) -> str:
        shape = TILES[self.tile]
        name = f"{shape.arithmetic}-{shape.units}x{shape.rows}"
        name += f"/{self.split}" if shape.mma else ""
        return f"{self.regime}-{name}{'-spills' if self.spills else ''}"

    @property
    def shape(self) -> Tile:
        return TILES[self.tile]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.shape.dtype.replace("tf32", "float32"))

    @property
    def block_units(self) -> int:
        return self.shape.block_units // self.split

    @property
    def held(self) -> int:
        """The part of K whose weights fit into registers."""
        return self.shape.held * self.shape.chunk * self.split

    def spilled(self, run: Run) -> bool:
        return -(-run.chunks // run.split) > self.shape.held

    def plan(
        self,
        device: str,
        case: Case,
        fuse_input: bool | None,
        adjoint: bool,
        any_tile: bool = False,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the overrides, and the plan that results."""
        overrides: dict[str, Any] = {"regime": self.regime}
        if self.regime != "step" and not any_tile:
            overrides |= {"tile": self.tile, "split": self.split}
        if fuse_input is not None and not adjoint:
            overrides["fuse_input"] = fuse_input
        return overrides, _C.plan_cuda(
            T=case.T,
            B=len(case.lengths or ()) or case.B,
            I=0 if adjoint else case.I,
            H=case.H,
            dtype=str(self.dtype).removeprefix("torch."),
            tf32=self.shape.dtype == "tf32",
            adjoint=adjoint,
            leaky=case.alpha,
            device=DEVICES[device],
            **overrides,
        )

    def satisfied(self, *of: Any) -> bool:
        overrides, plan = self.plan(*of)
        return {name: plan[name] for name in overrides} == overrides

    def device(self, case: Case, fuse_input: bool | None) -> str | None:
        """Return the smallest pretend device on which all passes can take this way, or None."""
        for name in ("tiny", "h100"):
            if all(self.satisfied(name, case, fuse_input, adjoint) for adjoint in (False, True)):
                return name
        return None


WAYS = [
    Way(regime, tile, split)
    for regime in REGIMES[1:]
    for tile, shape in enumerate(TILES)
    for split in shape.splits
]


# ---- how a problem is run and checked ----


def with_rows_apart(tensor: Tensor, padding: int) -> Tensor:
    """Return the same numbers in rows whose starts are aligned to no more than the padding."""
    room = tensor.new_zeros(*tensor.shape[:-1], tensor.size(-1) + padding)
    room[..., padding:] = tensor
    return room[..., padding:]


def tensors_of(case: Case) -> list[Tensor]:
    """Return the arguments, and directions for h, h_n and the gradient of each argument."""
    arguments = case.arguments()
    rows = arguments["x"].shape[:-1]
    batch = len(case.lengths) if case.lengths else case.B
    shapes = [(*rows, case.H), (batch, case.H), *(v.shape for v in arguments.values())]
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(s, generator=generator).to(case.dtype) for s in shapes]
    return [*arguments.values(), *directions]


def all_passes(
    rnn: Callable[..., tuple[Tensor, Tensor]], case: Case, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Run activation, adjoint and, backward through those, tangent and adjoint again."""
    names = list(case.arguments())
    given = [t.detach().requires_grad_() for t in tensors[: len(names)]]
    along, twice = tensors[len(names) :][:2], tensors[len(names) :][2:]
    h, h_n = rnn(**dict(zip(names, given)), **case.flags())
    first = torch.autograd.grad((h, h_n), given, along, create_graph=True)
    second = torch.autograd.grad(first, given, twice, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (h, h_n, *first, *second)]


@dataclass(frozen=True)
class Trial:
    """A problem and its way, whether the input product is fused, and how x is aligned."""

    way: Way
    case: Case
    fuse_input: bool | None = None
    x_padding: int = 0
    device: str | None = None  # None: the smallest pretend device that can

    def __str__(self) -> str:
        """Start with the words that the summary of a test run counts (conftest.py)."""
        where = "cuda" if self.device == GPU else "emulated"
        fused = {None: "", True: " fused", False: " separate"}[self.fuse_input]
        padded = f" x_padding={self.x_padding}" if self.x_padding else ""
        device = f" on {self.device}" if self.device else ""
        case = self.case.with_(dtype=torch.float64)
        return f"{where}:kernels {self.way} {case}{fused}{padded}{device}"

    @property
    def tf32(self) -> bool:
        return self.way.regime != "step" and self.way.shape.dtype == "tf32"

    def tensors(self) -> list[Tensor]:
        found = tensors_of(self.case.with_(dtype=self.way.dtype))
        for tensor in found if self.tf32 else ():
            tensor.copy_(tensor.half())
        return found

    def run(self) -> tuple[list[Tensor], list[Run]]:
        """Return the results of all passes, and the runs that were recorded."""
        way = self.way
        step = way.regime == "step"
        device = self.device or ("tiny" if step else way.device(self.case, self.fuse_input))
        assert device, f"no device can go this way: {self}"
        tile, split = (None, None) if step else (way.tile, way.split)
        kind, watched = (
            ("cuda", self.planned) if device == GPU else ("emulated", emulated(device).watched)
        )
        engine = Engine(kind, device, way.regime, tile, split, self.fuse_input)
        tensors = self.tensors()
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        try:
            seed = zlib.crc32(str(self).encode())  # another order of threads for each trial
            with engine.installed(seed), watched() as runs:
                x, *rest = (t.to(torch.get_default_device()) for t in tensors)
                if self.x_padding:
                    x = with_rows_apart(x, self.x_padding)
                found = all_passes(fusedrnn.rnn, self.case, [x, *rest])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        return [t.cpu() for t in found], runs

    @contextmanager
    def planned(self) -> Iterator[list[Run]]:
        """Yield the planned passes in place of recorded runs, because a GPU records none."""
        found = []
        for which in ("activation", "adjoint"):
            adjoint = which == "adjoint"
            if not self.way.satisfied(GPU, self.case, self.fuse_input, adjoint):
                pytest.skip(f"this GPU cannot go this way: {self}")
            _, plan = self.way.plan(GPU, self.case, self.fuse_input, adjoint)
            found.append(Run(which, *(plan[f.name] for f in fields(Run)[1:])))
        yield found

    def check(self) -> list[Run]:
        found, runs = self.run()
        tensors = self.tensors()
        if self.tf32:
            # Torch supports TF32 only on GPUs. The arguments are exact in float16, which is as
            # precise as TF32, so the error may be twice that of torch in float16.
            found, tensors = ([t.half() for t in several] for several in (found, tensors))
        assert_as_accurate_as_torch(
            found,
            lambda *tensors: all_passes(reference.rnn, self.case, tensors),
            tensors,
            floor=100 if found[0].dtype == torch.float64 else 4,  # the reference's own rounding
        )
        if self.device != GPU:
            assert sorted(r.which for r in runs) == ["activation", "adjoint", "adjoint", "tangent"]
        for r in runs:
            if r.which == "activation":
                assert self.fuse_input in (None, r.fuse_input)
        return runs

    def check_way(self) -> list[Run]:
        """Run `check`, and check that all passes took this way.

        The K of backward passes does not include I, so with a small H they need not spill.
        """
        runs = self.check()
        for r in runs:
            same = (r.regime, r.tile, r.split) == (self.way.regime, self.way.tile, self.way.split)
            assert same, (str(self), r)
            if r.which == "activation" or self.case.H > self.way.held:
                assert self.way.spilled(r) == self.way.spills
        return runs


# ---- every way, with sizes that fill nothing evenly ----


def small_cases(way: Way) -> list[Trial]:
    """Return cases that differ in kind, and together cover every option of a kernel."""
    trials = [
        Trial(way, Case(T=3, B=3, I=5, H=37), True),
        Trial(way, Case(lengths=(4, 3, 3, 1, 1), I=6, H=34, reset=True, alpha=True, reverse=True)),
        Trial(way, Case(T=2, B=70, I=3, H=33, h0=False), False),
        Trial(way, Case(T=3, B=9, I=16, H=40, alpha=True, reset=True), True),
        Trial(
            way, Case(lengths=(3,) * 30 + (2,) * 9 + (1,) * 3, I=8, H=21, reverse=True, reset=True)
        ),
        Trial(way, Case(T=2, B=5, I=7, H=65, bias=False, nonlinearity="softplus", reverse=True)),
        Trial(way, Case(T=9, B=2, I=4, H=18, reset=True)),  # barrier phases repeat
        Trial(way, Case(lengths=(3, 2, 2, 1), I=40, H=51, alpha=True, h0=False), True),
        Trial(way, Case(T=1, B=2, I=2, H=6)),
    ]
    if way.regime == "block":  # H must fit into one block
        most = way.block_units
        trials = [replace(t, case=t.case.with_(H=min(t.case.H, most - 1))) for t in trials]
    return trials


def on_gpu(trials: Sequence[Trial]) -> list[object]:
    """Return the same trials on the GPU, if there is one."""
    again = [replace(trial, device=GPU) for trial in trials if HAS_GPU]
    return [pytest.param(trial, id=str(trial)) for trial in again]


def fast_and_slow(trials: list[Trial], fast: Callable[[int], bool]) -> list[object]:
    return [
        pytest.param(t, id=str(t), marks=() if fast(i) else pytest.mark.slow)
        for i, t in enumerate(trials)
    ] + on_gpu(trials)


SMALL = [trial for way in WAYS for trial in small_cases(way)]


@pytest.mark.parametrize("trial", fast_and_slow(SMALL, lambda i: i % 4 == 0))
def test_small(trial):
    for r in trial.check_way():
        if trial.case.B > 32 and trial.device != GPU:  # several groups of rows, one after another
            assert r.rows > trial.way.shape.rows


# Before architecture 80, tensor cores do smaller products, and copies are synchronous.
ON_OLD = [
    replace(trial, device="t4")
    for trial in SMALL
    if trial.way.regime != "cluster" and trial.way.shape.dtype not in ("tf32", "bfloat16")
]


@pytest.mark.slow  # needs another build
@pytest.mark.parametrize("trial", ON_OLD, ids=str)
def test_small_on_an_old_device(trial):
    trial.check_way()


# plain.cuh handles problems without resets or leak, if a GEMM has computed the input product and
# there are no more rows than a tile has. In a cluster, units must also come in multiples of 16
# bytes, and every block must have units.


def plain_cases(way: Way) -> Iterator[Trial]:
    rows, per_16 = way.shape.rows, 16 // way.shape.number_size
    most = way.block_units if way.regime == "block" else way.held
    for case, fuse_input in (
        (Case(T=13, B=rows, I=5, H=3 * per_16), False),
        (Case(T=4, B=2 * rows, I=16, H=5 * per_16, reverse=True), False),
        (Case(T=5, B=1, I=7, H=9 * per_16, h0=False, nonlinearity="sigmoid"), False),
        (Case(T=1, B=rows, I=130, H=2 * per_16, reverse=True), True),
        (Case(T=2, B=2, I=3, H=most // per_16 * per_16, bias=False), False),
    ):
        trial = Trial(way, case.with_(H=min(case.H, most // per_16 * per_16)), fuse_input)
        if way.device(trial.case, fuse_input):
            yield trial
    if way.regime == "cluster" and way.block_units <= 64:
        for H in (16 * per_16, 16 * way.block_units):
            if H <= way.held:
                yield Trial(way, Case(T=3, B=rows, I=3, H=H), False, device="h100")


PLAIN = [trial for way in WAYS if way.regime in ("block", "cluster") for trial in plain_cases(way)]


@pytest.mark.parametrize("trial", fast_and_slow(PLAIN, lambda i: i % 2 == 0))
def test_plain_kernels_match_the_reference(trial):
    if trial.device == GPU:
        trial.check()
        return
    library = emulated(trial.device or trial.way.device(trial.case, trial.fuse_input))
    before = library.launched()
    runs = trial.check()
    plain = sum(n - before[name] for name, n in library.launched().items() if "5plain" in name)
    # the activation without inputs, and the adjoint of first derivatives
    passes = 1 if trial.fuse_input else 2
    assert plain == passes * all(r.units * (r.blocks - 1) < trial.case.H for r in runs)


# Blocks that use all their units, so that all warps are busy; of two blocks, the last has fewer.


def full_case(way: Way) -> Trial:
    units = way.block_units
    H = units if way.regime == "block" else min(2 * units - 3, way.held)
    return Trial(way, Case(T=2, B=way.shape.rows + 1, I=4, H=min(H, way.held)), False)


FULL = [full_case(way) for way in WAYS]


@pytest.mark.parametrize("trial", fast_and_slow(FULL, lambda i: i % 4 == 0))
def test_blocks_that_use_all_their_units(trial):
    trial.check_way()


# Clusters of 16 blocks: more than are allowed without opting in; the last block has no units.
SIXTEEN = [
    Trial(way, Case(T=3, B=3, I=3, H=way.block_units * 8 + 5, reset=True))
    for way in WAYS
    if way.regime == "cluster" and way.block_units <= 64
]


@pytest.mark.parametrize("trial", fast_and_slow(SIXTEEN, lambda i: SIXTEEN[i].case.H < 200))
def test_clusters_of_sixteen(trial):
    trial = replace(
        trial,
        way=replace(trial.way, spills=trial.case.H > trial.way.held),
        device=trial.device or "h100",
    )
    blocks = {r.blocks for r in trial.check_way()}
    assert blocks == {16} or trial.device == GPU


# ---- weights that do not fit into registers ----

SPILLING = [replace(way, spills=True) for way in WAYS]
# Many inputs that the step multiplies itself make activation spill, but no other pass.
WIDE = [
    Trial(way, Case(T=2, B=way.shape.rows + 1, I=way.held + 3, H=12, reset=True), True)
    for way in SPILLING
]


def large_cases() -> Iterator[Trial]:
    """Yield cases with many units, where all passes spill, if the regime allows so many units."""
    for way in SPILLING:
        trial = Trial(way, Case(T=2, B=way.shape.rows + 1, I=3, H=way.held + 5), None)
        if way.held <= 2048 and way.device(trial.case, None):
            yield trial


LARGE = list(large_cases())


@pytest.mark.parametrize("trial", fast_and_slow(WIDE, lambda i: i % 4 == 0))
def test_wide_inputs(trial):
    trial.check_way()


@pytest.mark.parametrize("trial", fast_and_slow(LARGE, lambda i: LARGE[i].case.H < 300))
def test_large(trial):
    for r in trial.check_way():
        assert trial.way.spilled(r)


# ---- memory with less alignment ----


def aligned_cases() -> Iterator[Trial]:
    """Yield cases that copy x by 16, 8 or 4 bytes, or by single 16-bit elements."""
    for way in WAYS:
        size = way.shape.number_size
        if way.split > 1 and way.split != 4:
            continue
        for bytes_ in (16, 8, 4, 2):
            if bytes_ >= size:
                padding = bytes_ // size if bytes_ < 16 else 0
                yield Trial(way, Case(T=2, B=3, I=48 // size, H=13), True, padding)


ALIGNED = list(aligned_cases())


@pytest.mark.parametrize("trial", fast_and_slow(ALIGNED, lambda i: i % 5 == 0))
def test_alignment_of_x(trial):
    trial.check_way()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("tile", [6, 8, 10], ids=lambda tile: TILES[tile].dtype)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_pairs_of_units_may_straddle_words(regime, tile, packed):
    """The kernels handle units in pairs. Here H is even, but rows start at odd elements."""
    way = Way(regime, tile)
    case = Case(T=3, B=5, H=14, lengths=(3, 3, 2) if packed else None, reverse=packed)
    arguments = case.with_(dtype=way.dtype).arguments()
    u = torch.randn(*arguments["x"].shape[:-1], case.H).to(way.dtype)
    tensors = [u, arguments["w_hh"], arguments["h0"], torch.randn_like(u), torch.randn_like(u)]
    if way.shape.dtype == "tf32":
        for tensor in tensors:
            tensor.copy_(tensor.half())
    results = []
    for apart in (0, 1):
        u, w_hh, h0, g, again = (with_rows_apart(t, apart) for t in tensors)
        u.requires_grad_()
        with Engine("emulated", "tiny", regime).installed():
            h, _ = fusedrnn.recurrence(u, h0, w_hh, **case.flags())
            (first,) = torch.autograd.grad(h, u, g, create_graph=True)
            (second,) = torch.autograd.grad(first, u, again)
        results.append([h, first, second])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


# ---- the step regime ----

STEPS = [
    Trial(Way("step", tile), case, fuse_input, padding)
    for tile in (0, 4, 6, 8)  # one of each dtype
    for case, fuse_input, padding in (
        (Case(T=3, B=3, I=5, H=37), True, 0),
        (Case(lengths=(4, 3, 3, 1, 1), I=6, H=34, reset=True, alpha=True, reverse=True), None, 1),
        (Case(T=2, B=70, I=3, H=33, h0=False), False, 0),
        (Case(T=3, B=33, I=40, H=130, alpha=True, reset=True), True, 1),
        (
            Case(lengths=(3,) * 30 + (2,) * 9 + (1,) * 3, I=8, H=64, reverse=True, reset=True),
            None,
            0,
        ),
        (Case(T=1, B=33, I=7, H=65, bias=False, nonlinearity="elu"), None, 0),
    )
]


@pytest.mark.parametrize("trial", fast_and_slow(STEPS, lambda i: True))
def test_step(trial):
    assert {r.regime for r in trial.check()} == {"step"}


# ---- every kernel runs ----


def kernel_name(run: Run) -> str:
    """Return a part of the mangled name of the kernel that a run should launch."""
    tile = TILES[run.tile]
    number = {"float32": "f", "tf32": "f", "float64": "d", "float16": "6__half"}
    number["bfloat16"] = "13__nv_bfloat16"
    of_pass = f"LNS_4PassE{PASSES.index(run.which)}E"
    if tile.mma:
        return f"3MmaI{number[tile.dtype]}Li{tile.units}EEE{of_pass}"
    return f"3FmaI{number[tile.dtype]}Li{tile.units}ELi{tile.rows}EEE{of_pass}"


def test_every_kernel_ran():
    """Each launch also uses the tile of its plan."""
    libraries = [emulated(name) for name in ("tiny", "h100")]
    ever: dict[str, int] = dict.fromkeys(libraries[0].kernels(), 0)
    taken = set()
    for way in WAYS:
        H = min(32, way.block_units)
        for case in (Case(T=2, B=2, I=3, H=9, reset=True), Case(T=2, B=1, I=3, H=H)):
            before = [library.launched() for library in libraries]
            _, runs = Trial(way, case, None if case.reset else False).run()
            launched = {
                name
                for library, earlier in zip(libraries, before)
                for name, count in library.launched().items()
                if count > earlier[name]
            }
            expected = {kernel_name(r) for r in runs}
            plain = {name for name in launched if "5plain" in name}
            assert len(launched - plain) == len(expected) == len(PASSES) or plain
            assert all(any(e in name for e in expected) for name in launched), (launched, expected)
            # plain ones for activation and adjoint, the others for second derivatives
            if case.reset or way.regime not in ("block", "cluster"):
                assert not plain
            else:
                assert len(plain) == len(launched - plain) == 2
                assert all(f"Lb{int(way.regime == 'cluster')}E" in name for name in plain)
            taken |= {(r.regime, r.tile, r.split, r.which) for r in runs}
            for name in launched:
                ever[name] += 1
    assert len(taken) == len(WAYS) * len(PASSES)
    for tile, lengths in ((0, (2, 1)), (4, None), (6, None), (8, None)):
        before = libraries[0].launched()
        Trial(Way("step", tile), Case(T=2, B=2, I=3, H=9, lengths=lengths)).run()
        for name, count in libraries[0].launched().items():
            ever[name] += count - before[name]
    assert [name for name, count in ever.items() if not count] == []
    steps = [name for name in ever if "10fused_step" in name]
    assert len(steps) == 4 * len(PASSES)
    kernels = (len(TILES) + 4) * len(PASSES)
    assert len(ever) == kernels + len(TILES) * 2 * 2 + 1  # plain ones, write_numbers
