"""Compile .cu files for the emulator: nvcc, translation, g++ and linking. All results are cached.

nvcc runs once for each file, as in a real build. It leaves the host object and, with --keep, the
PTX that it passed to ptxas; `ptxas -v` prints the number of registers of each kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .translate import Resources, translate

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "runtime"
CACHE = HERE.parents[2] / "build" / "emulator"
CXX = os.environ.get("CXX", "g++")

# Flags for the translated kernels. -Og compiles kernels of thousands of instructions in two thirds
# of the time of -O1, and they run a tenth slower; with -O0 they run seven times slower. As on a
# GPU, integers wrap around, multiplications and additions are fused only if the PTX says so, and
# memory has no types. The stacks of fibers have no guard pages, so a frame of nearly a whole stack
# is an error.
KERNEL_FLAGS = (
    *("-std=c++20", "-Og", "-g1", "-fPIC", "-w", "-mfma", "-mf16c", "-mavx2"),
    *("-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing", "-fno-exceptions"),
    *("-fno-math-errno", "-fvisibility=hidden", "-Werror=frame-larger-than=98304"),
)
RUNTIME_FLAGS = (
    *("-std=c++20", "-O3", "-g1", "-fPIC", "-Wall", "-Wextra", "-mfma", "-mf16c", "-mavx2"),
    *("-ffp-contract=off", "-fvisibility=hidden"),
)


# The files that translated kernels depend on, besides their PTX.
TRANSLATION = (
    *("ptx.py", "rules.py", "arithmetic.py", "memory.py", "threads.py", "translate.py"),
    *("runtime/machine.h", "runtime/device_code.h"),
)


class BuildError(Exception):
    """A tool failed; its command and output are in the text."""


def cuda_home() -> Path | None:
    """Return the CUDA toolkit's folder, or None.

    nvcc on PATH may be a script that calls the nvcc of another folder.
    """
    nvcc = shutil.which("nvcc")
    places = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    for home in (*places, nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"):
        files = ("bin/nvcc", "include/cuda_runtime.h")
        if home and all(Path(home, file).exists() for file in files):
            return Path(home).resolve()
    return None


def require_cuda_home() -> Path:
    home = cuda_home()
    if home is None:
        raise BuildError("no nvcc: set CUDA_HOME to the CUDA toolkit's folder")
    return home


def environment() -> dict[str, str]:
    """Return the environment without preloaded sanitizers: only the tests need them."""
    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}


def run(command: Sequence[object], **options: object) -> str:
    """Run a tool and return its output."""
    words = [str(c) for c in command]
    result = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        errors="replace",
        **options,  # type: ignore[call-overload]
    )
    if result.returncode:
        raise BuildError(f"{' '.join(words)}\nfailed ({result.returncode}):\n{result.stdout}")
    return result.stdout


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock: one process builds, and the others wait and then find the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, changed_ns: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:20]


def file_digest(path: str | Path) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return "missing"
    return _file_digest(str(path), stat.st_size, stat.st_mtime_ns)


@functools.cache
def tool_version(tool: str) -> str:
    return run([tool, "--version"])


def system_file(path: str) -> bool:
    """Return whether a file belongs to a compiler or library, and changes only with its version."""
    home = cuda_home()
    return path.startswith(("/usr/", "/lib/")) or (home is not None and path.startswith(f"{home}/"))


def read_dependencies(path: Path, folder: Path) -> list[str]:
    """Return the project's own files in a make rule that a compiler wrote."""
    text = path.read_text().replace("\\\n", " ")
    names = text.partition(":")[2].split()
    found = {os.path.realpath(folder / n) for n in names}
    return sorted(f for f in found if not system_file(f))


def cached(key: str, make: Callable[[Path], None], sources: Path | None = None) -> Path:
    """Return the folder of results for a key and for the contents of the files they were made from.

    The key covers everything except the included headers, because only the compiler can list them.
    `make(folder)` may write a make rule of these headers to rule.d, with names relative to
    `sources`. A record for each key lists its latest results, each with the files that were read
    and their digests.
    """
    objects = CACHE / "objects"
    record = objects / f"{key}.json"
    with locked(objects / f"{key}.lock"):
        entries = json.loads(record.read_text()) if record.exists() else []
        for entry in entries:
            result = objects / entry["result"]
            if result.exists() and all(
                file_digest(path) == was for path, was in entry["files"].items()
            ):
                os.utime(result)  # for `prune`
                return result
        with tempfile.TemporaryDirectory(dir=objects, prefix=f"{key}.") as work:
            made = Path(work, "made")
            made.mkdir()
            start = time.time()
            make(made)
            rule = made / "rule.d"
            read = read_dependencies(rule, sources or made) if rule.exists() else []
            # A file edited meanwhile may have been read before or after the edit: never reuse this.
            files = {
                path: file_digest(path) if os.stat(path).st_mtime < start else "edited meanwhile"
                for path in read
            }
            result = objects / f"{key}-{digest(*files.items())}"
            shutil.rmtree(result, ignore_errors=True)
            made.replace(result)
        entries = [e for e in entries if e["result"] != result.name]
        entries = [{"result": result.name, "files": files}, *entries][:8]
        record.write_text(json.dumps(entries, indent=1))
    return result


def prune(most: int = 1 << 30) -> None:
    """Delete the least recently used results, so that the cache stays below a gigabyte."""
    with locked(CACHE / "prune.lock"):
        found = [*(CACHE / "objects").glob("*-*-*"), *(CACHE / "linked").glob("*-*")]
        found = [p for p in found if p.suffix not in (".json", ".lock")]
        total = 0
        for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
            files = path.iterdir() if path.is_dir() else [path]
            total += sum(f.stat().st_size for f in files)
            if total > most and time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def compile_cpp(source: Path, flags: Sequence[str], folder: Path) -> list[Path]:
    key = digest("object", source, flags, folder, file_digest(source), tool_version(CXX))

    def make(result: Path) -> None:
        command = [CXX, *flags, "-c", source, "-o", result / "object.o"]
        output = run([*command, "-MD", "-MF", result / "rule.d"], cwd=folder)
        if output.strip():
            print(output, end="")

    return [cached(f"{source.stem}-{key}", make, folder) / "object.o"]


def read_resources(ptxas_output: str) -> dict[str, Resources]:
    """Return the registers and the stack of each kernel, from the output of `ptxas -v`."""
    found = {}
    for match in re.finditer(
        r"Compiling entry function '([^']+)'.*?(?=Compiling entry function|\Z)", ptxas_output, re.S
    ):
        registers = re.search(r"Used (\d+) registers", match[0])
        stack = re.search(r"(\d+) bytes stack frame", match[0])
        found[match[1]] = Resources(
            int(registers[1]) if registers else 0, int(stack[1]) if stack else 0
        )
    return found


def sanitizer_flags(sanitizer: str | None) -> tuple[str, ...]:
    return (f"-fsanitize={sanitizer}",) if sanitizer else ()


def compile_cu(
    source: Path, arch: int | str, flags: Sequence[str], sanitizer: str | None
) -> list[Path]:
    """Compile a .cu file to two objects: its translated kernels, then its host code.

    cuda_runtime.cpp relies on this order.
    """
    home = require_cuda_home()
    nvcc = home / "bin" / "nvcc"
    command: list[object] = [
        *(nvcc, "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-lineinfo"),
        *("-cudart", "none", "-Xcompiler", "-fPIC", "-Xptxas", "-v", *flags, "-c", source),
    ]

    def compile_by_nvcc(result: Path) -> None:
        with tempfile.TemporaryDirectory(dir=result) as kept:
            keep = ["--keep", "--keep-dir", kept, "-MD", "-MF", result / "rule.d"]
            output = run([*command, "-o", result / "host.o", *keep], cwd=source.parent)
            (ptx,) = Path(kept).glob("*.ptx")
            ptx.replace(result / "kernels.ptx")
        (result / "ptxas.txt").write_text(output)

    key = digest("nvcc", *command, file_digest(source), tool_version(str(nvcc)))
    compiled = cached(f"{source.stem}-{key}", compile_by_nvcc, source.parent)

    kernel_flags = [*KERNEL_FLAGS, *sanitizer_flags(sanitizer), "-I", str(RUNTIME)]
    if sanitizer == "thread":
        kernel_flags.append("-DEMULATOR_TSAN")
    if sanitizer == "address":  # scopes exist only in the translation; takes 1/4 of the time
        kernel_flags.append("-fno-sanitize-address-use-after-scope")
    ptx, ptxas = compiled / "kernels.ptx", compiled / "ptxas.txt"

    def compile_translated(result: Path) -> None:
        text = translate(
            ptx.read_text(errors="replace"),
            source,
            read_resources(ptxas.read_text()),
            foreign=("/usr/", str(home)),
        )
        (result / "kernels.cpp").write_text(text)
        output = ["-c", result / "kernels.cpp", "-o", result / "kernels.o"]
        run([CXX, *kernel_flags, *output])

    key = digest(
        *("kernels", source, file_digest(ptx), file_digest(ptxas), kernel_flags),
        *(tool_version(CXX), *(file_digest(HERE / name) for name in TRANSLATION)),
    )
    translated = cached(f"{source.stem}-{key}", compile_translated)
    return [translated / "kernels.o", compiled / "host.o"]


def runtime_objects(sanitizer: str | None) -> list[Callable[[], list[Path]]]:
    """Return the jobs that compile the emulator's own C++."""
    flags = [*RUNTIME_FLAGS, "-I", str(RUNTIME), "-isystem", str(require_cuda_home() / "include")]
    if sanitizer == "thread":
        flags.append("-DEMULATOR_TSAN")  # not instrumented: see scheduler.h
    else:
        flags += sanitizer_flags(sanitizer)
    return [
        functools.partial(compile_cpp, source, flags, RUNTIME)
        for source in sorted(RUNTIME.glob("*.cpp"))
    ]


def build_objects(
    sources: Iterable[str | Path],
    *,
    arch: int | str,
    include: Sequence[str | Path],
    nvcc_flags: Sequence[str],
    cxx_flags: Sequence[str],
    cpp_sources: Iterable[str | Path],
    sanitizer: str | None,
) -> list[Path]:
    """Compile everything, as many files at a time as there are cores."""
    includes = [word for path in include for word in ("-I", str(Path(path).resolve()))]
    home = str(require_cuda_home() / "include")
    cpp_flags = ["-std=c++17", "-fPIC", *cxx_flags, *includes, "-isystem", home]
    cpp_flags += sanitizer_flags(sanitizer)
    jobs: list[Callable[[], list[Path]]] = [
        functools.partial(compile_cu, Path(s).resolve(), arch, (*nvcc_flags, *includes), sanitizer)
        for s in sources
    ]
    jobs += [
        functools.partial(compile_cpp, p, cpp_flags, p.parent)
        for p in (Path(s).resolve() for s in cpp_sources)
    ]
    jobs += runtime_objects(sanitizer)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(job) for job in jobs]
        objects = [path for future in started for path in future.result()]
    prune()
    return objects


def link(
    objects: Sequence[Path], flags: Sequence[str], name: str, suffix: str, out_dir: Path | None
) -> Path:
    """Link objects into one file, whose name contains a digest of them and the flags."""
    folder = out_dir or CACHE / "linked"
    folder.mkdir(parents=True, exist_ok=True)
    key = digest(*(file_digest(o) for o in objects), flags)
    result = folder / f"{name}-{key}{suffix}"
    with locked(folder / f"{name}.lock"):
        if not result.exists():
            made = Path(f"{result}.making")
            run([CXX, *objects, *flags, "-o", made])
            made.replace(result)
            if not out_dir:
                old = sorted(folder.glob(f"{name}-*{suffix}"), key=lambda p: p.stat().st_mtime)
                for path in old[:-16]:
                    path.unlink(missing_ok=True)
    return result


def split_sanitizer(flags: Sequence[str]) -> tuple[list[str], str | None]:
    """Separate -fsanitize=, which applies to all code, from the flags for `cpp_sources` alone."""
    rest = [f for f in flags if not f.startswith("-fsanitize=")]
    chosen = [f.partition("=")[2] for f in flags if f.startswith("-fsanitize=")]
    return rest, chosen[-1] if chosen else None


def build_library(
    sources: Iterable[str | Path],
    *,
    name: str,
    arch: int | str = 90,
    include: Sequence[str | Path] = (),
    nvcc_flags: Sequence[str] = (),
    cxx_flags: Sequence[str] = (),
    cpp_sources: Iterable[str | Path] = (),
    link_flags: Sequence[str] = (),
    out_dir: str | Path | None = None,
) -> Path:
    """Build a shared library in which the launchers of `sources` run their kernels emulated.

    Args:
        sources: The .cu files.
        name: The library's name, for readability.
        arch: The architecture to compile for: 75, 80, 86, 89, 90, "90a", 100 ...
        include: Folders of headers, for the .cu files and `cpp_sources`.
        nvcc_flags: More flags for the .cu files.
        cxx_flags: More flags for `cpp_sources`. -fsanitize=address also applies to the kernels.
        cpp_sources: C++ to link with, such as the glue to torch.
        link_flags: More flags for the linker.
        out_dir: The library's folder; by default, a folder of the cache.
    """
    rest, sanitizer = split_sanitizer(cxx_flags)
    objects = build_objects(
        sources,
        arch=arch,
        include=include,
        nvcc_flags=nvcc_flags,
        cxx_flags=rest,
        cpp_sources=cpp_sources,
        sanitizer=sanitizer,
    )
    # -Bsymbolic: the library calls its own cudaMalloc, whatever else is loaded.
    flags = ["-shared", "-Wl,-Bsymbolic", *sanitizer_flags(sanitizer), *link_flags]
    return link(objects, flags, name, ".so", Path(out_dir) if out_dir else None)


def build_program(
    sources: Iterable[str | Path],
    driver: str | Path,
    *,
    name: str,
    sanitizer: str | None = None,
    arch: int | str = 90,
    include: Sequence[str | Path] = (),
    nvcc_flags: Sequence[str] = (),
    cxx_flags: Sequence[str] = (),
    cpp_sources: Iterable[str | Path] = (),
    link_flags: Sequence[str] = (),
) -> Path:
    """Build an executable. `driver` has main() and calls the launchers. Mostly for sanitizers.

    ThreadSanitizer must be part of the executable. Run the result with `run_program`.
    """
    objects = build_objects(
        sources,
        arch=arch,
        include=include,
        nvcc_flags=nvcc_flags,
        cxx_flags=cxx_flags,
        cpp_sources=[driver, *cpp_sources],
        sanitizer=sanitizer,
    )
    flags = [*sanitizer_flags(sanitizer), *link_flags]
    return link(objects, flags, name, "", None)


def run_program(
    program: Path, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a program that `build_program` made.

    setarch -R turns off address randomisation: otherwise ThreadSanitizer cannot place its shadow
    memory.
    """
    env = environment() | {
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 second_deadlock_stack=1",
    }
    return subprocess.run(
        ["setarch", os.uname().machine, "-R", str(program), *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=timeout,
        check=False,
    )
