"""Mutation testing: change one line of the code at a time, and expect a test to fail.

    python tests/tooling/mutants.py --count 200             # after `make build`; two at once
    python tests/tooling/mutants.py --files csrc/checks.h --count 50 --seed 1
    python tests/tooling/mutants.py --only tests/tooling/fixed_mutants.txt  # as .ci/run does

Each mutant is compiled and tested in a copy of the checkout. The sample depends on the seed and on
the text of the lines, so that an edit replaces only the mutants of the edited lines. Mutants that
no test can be expected to kill are listed, each with the reason, in
``tests/tooling/equivalent_mutants.txt``. The exit status is 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")

# The tests for a file, the most likely to fail first. The first pattern that matches applies.
TESTS = {
    "csrc/cpu/plan.h": "plan recurrence threads gradients",
    "csrc/cpu/run.h": "recurrence gradients threads explain numerics",
    "csrc/cpu/*": "recurrence numerics gradients threads",
    "csrc/epilogues.h": "recurrence gradients numerics derivatives",
    "csrc/cuda/plan.*": "plan_cuda explain",
    "csrc/cuda/*.cu*": "recurrence gradients",  # on the emulator, which takes minutes to build
    "csrc/bptt.cpp": "gradients ops vmap func derivatives arguments",
    "csrc/*": "arguments ops recurrence gradients modules",
    "fusedrnn/ops/autograd.py": "gradients derivatives func autograd_features ops compile",
    "fusedrnn/ops/autocast.py": "autocast",
    "fusedrnn/ops/expanded_weights.py": "expanded_weights",
    "fusedrnn/ops/onnx.py": "onnx",
    "fusedrnn/ops/vmap.py": "vmap func ops",
    "fusedrnn/ops/*": "ops gradients compile export",
    "fusedrnn/__main__.py": "cli",
    "fusedrnn/checks.py": "arguments ops modules ragged",
    "fusedrnn/dropout.py": "recurrent_dropout",
    "fusedrnn/directions.py": "directions modules",
    "fusedrnn/explain.py": "explain",
    "fusedrnn/forms.py": "ops recurrence gradients arguments reset leaky",
    "fusedrnn/functional.py": "recurrence ops explain modules autocast export compile ragged",
    "fusedrnn/dynamics.py": "dynamics",
    "fusedrnn/leaky.py": "leaky outputs streaming recurrent_dropout",
    "fusedrnn/parametrizations.py": "parametrizations",
    "fusedrnn/modules.py": "modules outputs streaming ragged reset replace autocast export compile "
    "recurrent_dropout",
    "fusedrnn/reference.py": "recurrence gradients",
    "fusedrnn/plots.py": "plots",
    "fusedrnn/torch_state.py": "torch_state directions func",
    "fusedrnn/ragged.py": "ragged",
    "fusedrnn/trace.py": "trace plots",
    "fusedrnn/unmask/*.py": "unmask",
    "fusedrnn/*.py": "cli modules",
}
# The sources to recompile after a header is mutated. Other sources that include it take long to
# compile and use neither its arithmetic nor its checks. Every source that uses one of its inline
# functions must be listed: the linker keeps a single copy, from the object that comes first.
SOURCES = {
    "csrc/epilogues.h": ("csrc/cpu/kernels_*.cpp",),
    "csrc/checks.h": ("csrc/bptt.cpp", "csrc/cpu/recurrence_cpu.cpp"),
}
# Files that need neither a GPU nor its emulator.
FILES = ("csrc/*.h", "csrc/bptt.cpp", "csrc/cpu/*", "csrc/cuda/plan.*", "fusedrnn/*.py")


# ---- mutants ----


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    original: str  # lines without indentation
    mutated: str

    def rank(self, seed: int) -> str:
        text = "\0".join((str(seed), self.file, self.original, self.mutated))
        return hashlib.sha256(text.encode()).hexdigest()

    def reason(self, known: dict[tuple[str, str, str], str]) -> str | None:
        """Return the listed reason why no test can be expected to kill the mutant, or None."""
        exact = known.get((self.file, self.original, self.mutated))
        return exact or known.get((self.file, self.original, "*"))


STRING = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
PYTHON_TEXT = re.compile(rf'(?P<string>"""[\s\S]*?"""|{STRING})|#.*')
CPP_TEXT = re.compile(rf"//.*|/\*[\s\S]*?\*/|^ *#(?:.*\\\n)*.*|(?P<string>{STRING})", re.M)
TOKEN = re.compile(r"\d[\w.]*|\w+|->|::|<<|>>|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|\S")
# Operators of the lowest precedence come first.
LEVELS = ("? if else for = return", "|| or", "&& and", "== != is in", "< > <= >=", "+ -", "* / %")
LEVEL = {word: level for level, words in enumerate(LEVELS) for word in words.split()}
BINARY = {word for words in LEVELS[1:] for word in words.split()} | {"&"}
DROPPED = {"+", "-", "*", "/", "&&", "||", "and", "or"}
OTHERS = {
    "<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"),
    "==": ("!=",), "!=": ("==",), "+": ("-",), "-": ("+",), "*": ("/",), "/": ("*",), "%": ("/",),
    "&&": ("||",), "||": ("&&",), "and": ("or",), "or": ("and",), "&": ("|",),
    "true": ("false",), "false": ("true",), "True": ("False",), "False": ("True",),
    "min": ("max",), "max": ("min",), "minimum": ("maximum",), "maximum": ("minimum",),
}  # fmt: skip
CALL = r"[\w.\[\]>:-]+\(.*\)"


def code_of(text: str, python: bool) -> list[str]:
    """Return the lines, of unchanged length, with comments and the contents of strings blanked."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", "_" if match["string"] else " ", match[0])

    return (PYTHON_TEXT if python else CPP_TEXT).sub(blank, text).split("\n")


def changes(line: str, code: str, python: bool) -> Iterator[tuple[int, int, str]]:
    """Yield the mutations of a line: two columns, and the text that replaces the part between."""
    tokens = [(m[0], m.start(), m.end()) for m in TOKEN.finditer(code)]

    def spaced(i: int) -> bool:  # as formatters write a binary operator
        _, a, b = tokens[i]
        return code[max(a - 1, 0)] == " " and code[b : b + 1] in ("", " ")

    def operand(i: int, step: int) -> int | None:
        """Return where the operand on one side of operator i ends, if it ends in this line."""
        level, depth, j = LEVEL.get(tokens[i][0], 0), 0, i + step
        opening, closing = ("([{", ")]}")[::step]
        while 0 <= j < len(tokens):
            word = tokens[j][0]
            if depth == 0:
                ends = spaced(j) and LEVEL.get(word, 9) <= level
                if ends or word in closing or word in (",", ";", ":", "return"):
                    break
            depth += (word in opening) - (word in closing)
            j += step
        _, begin, end = tokens[j - step]
        return None if depth or j == i + step else end if step == 1 else begin

    for i, (word, a, b) in enumerate(tokens):
        before, after = (tokens[j][0] if 0 <= j < len(tokens) else "" for j in (i - 1, i + 1))
        if word in BINARY and not spaced(i):
            if word == "-" and (before in LEVEL or before in ("(", "[", "{", ",", ":")):
                yield a, b, ""
            continue
        for other in OTHERS.get(word, ()):
            yield a, b, other
        if word == "!" or (word == "not" and before != "is" and after != "in"):
            yield a, b + (word == "not"), ""
        if word == "is":
            yield (a, tokens[i + 1][2], "is") if after == "not" else (a, b, "is not")
        if word == "not" and after == "in":
            yield a, b + 1, ""
        if word.isdigit():
            for number in {int(word) + 1, max(int(word) - 1, 0)} - {int(word)}:
                yield a, b, str(number)
        elif re.fullmatch(r"\d+\.\d+", word):
            yield a, b, str(2 * float(word))
        if word not in DROPPED | {"?", "if"}:
            continue

        left, right = operand(i, -1), operand(i, 1)
        if word in DROPPED:
            if left is not None:
                yield left, b + 1, ""
            if right is not None:
                yield max(a - 1, 0), right, ""
            if word in "-/" and left is not None and right is not None:
                yield left, right, f"{line[b + 1 : right]} {word} {line[left : a - 1]}"
            continue
        middle = "else" if python else ":"
        split = next((j for j in range(i, len(tokens)) if tokens[j][0] == middle), None)
        end = None if split is None else operand(split, 1)
        if split is None or end is None or left is None:
            continue
        yield left, end, line[left : a - 1] if python else line[b + 1 : tokens[split][1] - 1]
        yield left, end, line[tokens[split][2] + 1 : end]

    if python:
        condition = re.match(r"( *(?:el)?if )(.*):\s*$", code)
        statement = rf"{CALL}|[\w.]+ [-+*/|&]= .*|\w+\.[\w.]+ = .*"
    else:
        condition = re.match(
            r"( *(?:\} else )?if )(\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))", code
        )
        statement = rf"{CALL};|[\w.\[\]>-]+ [-+*/|&]?= [^;]*;"
    if condition:
        a, b = condition.span(2)
        yield a, b, f"not ({line[a:b]})" if python else f"(!{line[a:b]})"
    if re.fullmatch(statement, code.strip()) and code.count("(") == code.count(")"):
        yield len(code) - len(code.lstrip()), len(code), "pass" if python else ";"


def mutants_of(file: str) -> Iterator[Mutant]:
    python, text = file.endswith(".py"), (ROOT / file).read_text()
    for number, (line, code) in enumerate(zip(text.split("\n"), code_of(text, python)), 1):
        if re.match(r"\s*(from|import|using|static_assert|template|@)\b", line):
            continue
        for a, b, new in changes(line, code, python):
            mutant = Mutant(file, number, line.strip(), (line[:a] + new + line[b:]).strip())
            if mutant.mutated != mutant.original:
                yield mutant


def files_named(patterns: Iterable[str]) -> list[str]:
    found = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    return [file for file in found if any(fnmatch.fnmatch(file, p) for p in patterns)]


def shuffled(files: Iterable[str], seed: int) -> list[Mutant]:
    every = {mutant for file in files for mutant in mutants_of(file)}
    return sorted(every, key=lambda mutant: (mutant.rank(seed), mutant.line))


def records(path: Path) -> Iterator[tuple[tuple[str, str, str], str]]:
    """Yield the records of a list, which empty lines separate.

    A record has the file, ``- line``, ``+ mutated line`` and a reason.
    """
    for record in path.read_text().strip().split("\n\n"):
        if not record.startswith("#"):
            file, original, mutated, *reason = record.split("\n")
            assert (original[:2], mutated[:2]) == ("- ", "+ "), record
            yield (file, original[2:], mutated[2:]), " ".join(reason)


def listed(path: Path) -> Iterator[Mutant]:
    for (file, original, mutated), _ in records(path):
        lines = [line.strip() for line in (ROOT / file).read_text().split("\n")]
        if original not in lines:
            raise SystemExit(f"{path.name}: {file} no longer has the line: {original}")
        yield Mutant(file, lines.index(original) + 1, original, mutated)


# ---- a copy of the checkout, in which mutants are compiled and tested ----


def includes(path: Path) -> set[Path]:
    """Return a source of csrc and all headers of csrc that it includes."""
    found: set[Path] = set()
    left = [path]
    while left:
        file = left.pop()
        if file not in found and file.exists():
            found.add(file)
            names = re.findall(r'#include "(.*)"', file.read_text())
            left += [(file.parent / name).resolve() for name in names]
    return found


class Copy:
    """A copy that links the checkout's objects and recompiles those that a mutant changes."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self.root, self.timeout = folder, timeout
        ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "build", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
        (self.library,) = (folder / "fusedrnn").glob("_C*.so")
        (build,) = {path.parent for path in (ROOT / "build").glob("temp*/build.ninja")}
        ninja = [sys.executable, "-m", "ninja", "-t", "compdb", "compile"]
        commands = json.loads(subprocess.check_output(ninja, cwd=build))
        self.commands = {Path(c["file"]): shlex.split(c["command"]) for c in commands}

    def compile(self, file: str, level: str) -> dict[str, Path] | None:
        """Compile the objects that depend on a file.

        Return the new objects by the objects that they replace, or None after an error.
        """
        objects = {}
        for source, command in self.commands.items():
            name = str(source.relative_to(ROOT))
            chosen = any(fnmatch.fnmatch(name, pattern) for pattern in SOURCES.get(file, "*"))
            if not chosen or ROOT / file not in includes(source):
                continue
            built = self.root / f"{source.stem}.o"
            words = [word for word in command if word != "-MMD"]
            del words[words.index("-MF") : words.index("-MF") + 2]
            words[words.index(str(source))] = str(self.root / source.relative_to(ROOT))
            place = words.index("-o") + 1
            replaced, words[place] = words[place], str(built)
            if subprocess.run([*words, level, "-w"], capture_output=True).returncode:
                return None
            objects[replaced] = built
        return objects

    def link(self, objects: dict[str, Path]) -> None:
        every = [command[command.index("-o") + 1] for command in self.commands.values()]
        libraries = [f"-l{name}" for name in ("c10", "torch", "torch_cpu", "torch_python")]
        subprocess.run(
            [
                *(os.environ.get("CXX", "g++"), "-shared", "-fopenmp", "-o", self.library),
                *(objects.get(path, path) for path in every),
                *(f"-L{find_torch().parent / 'lib'}", *libraries),
            ],
            check=True,
        )

    def test(self, *what: str) -> str | None:
        """Run tests; return the first that fails, or another outcome, or None if all pass."""
        words = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        output = self.root / "output.txt"
        pid = os.fork()  # so that a mutant need not import torch again
        if pid == 0:
            os.setsid()
            with output.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(self.root)
            sys.path.insert(0, str(self.root))
            sys.dont_write_bytecode = True
            settings = {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
            os.environ.update(settings)
            status = pytest.main([*words, *what])
            sys.stdout.flush()
            os._exit(status)
        end = time.monotonic() + self.timeout
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "time out"
            time.sleep(0.02)
        status = os.waitstatus_to_exitcode(ended[1])
        if status == 0:
            return None
        text = output.read_text()
        if "emulator.build.BuildError" in text:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::.*?)?)(?: - |$)", text, re.M)
        return failed[1] if failed else f"exit status {status}"

    def outcome(self, mutant: Mutant, tests: Sequence[str]) -> str | None:
        """Return what kills the mutant, or None if nothing does.

        Return "" if the mutant does not compile or compiles to the same code.
        """
        place = self.root / mutant.file
        original = place.read_text()
        lines = original.split("\n")
        line = lines[mutant.line - 1]
        assert line.strip() == mutant.original, mutant
        lines[mutant.line - 1] = line.replace(mutant.original, mutant.mutated)
        mutated = "\n".join(lines)
        place.write_text(mutated)
        try:
            if mutant.file.endswith((".cu", ".cuh")):
                return self.test("-k", "emulated:tiny", *tests)
            tests = ["-k", "not emulated:", *tests]  # the colon excludes the mark slow_emulated
            if mutant.file.endswith(".py"):
                compile(mutated, mutant.file, "exec")
                return self.test(*tests)
            objects = self.compile(mutant.file, "-O0")
            if not objects:
                return ""
            self.link(objects)
            killer = self.test(*tests)
            if killer is None:
                codes = self.optimized(mutant.file)
                place.write_text(original)
                killer = "" if codes == self.optimized(mutant.file) else None
            return killer
        except SyntaxError:
            return ""
        finally:
            place.write_text(original)
            shutil.copy(ROOT / "fusedrnn" / self.library.name, self.library)

    def optimized(self, file: str) -> list[bytes]:
        return [path.read_bytes() for path in (self.compile(file, "-O2") or {}).values()]


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec
    assert spec.origin
    return Path(spec.origin)


def tests_of(file: str) -> list[str]:
    names = next(tests for pattern, tests in TESTS.items() if fnmatch.fnmatch(file, pattern))
    found = {path.stem: path for path in (ROOT / "tests").glob("*/test_*.py")}
    return [str(found[f"test_{name}"].relative_to(ROOT)) for name in names.split()]


_copy: Copy  # the copy of this worker process


def _prepare(folder: str, timeout: float) -> None:
    global _copy
    import hypothesis, torch.utils.cpp_extension  # noqa: E401, F401, I001

    _copy = Copy(Path(tempfile.mkdtemp(dir=folder)), timeout)


def outcome(mutant: Mutant, tests: Sequence[str]) -> tuple[str | None, float]:
    """Return ``Copy.outcome`` and the seconds that it took."""
    began = time.monotonic()
    return _copy.outcome(mutant, tests), time.monotonic() - began


def test(tests: Sequence[str]) -> str | None:
    return _copy.test(*tests)


@contextlib.contextmanager
def workers(count: int, timeout: float) -> Iterator[ProcessPoolExecutor]:
    """Start processes that run ``outcome`` and ``test``, each in its own copy."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), _prepare, (folder, timeout)
        ) as pool,
    ):
        yield pool


# ---- the command ----


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="of mutants that compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", default=FILES, help="patterns of paths")
    parser.add_argument("--only", type=Path, metavar="FILE", help="the mutants that it lists")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for the tests of one")
    parser.add_argument("--workers", type=int, default=2, help="mutants at once")
    parser.add_argument("--list", action="store_true", help="print the sample, and test nothing")
    options = parser.parse_args()

    if options.only:
        left = list(listed(options.only))
    else:
        left = shuffled(files_named(options.files), options.seed)
    if options.list:
        for mutant in left[: options.count]:
            print(f"{mutant.file}\n- {mutant.original}\n+ {mutant.mutated}\n")
        return 0
    known = dict(records(EQUIVALENT))
    began = time.monotonic()
    survivors: list[Mutant] = []
    killers: set[str] = set()
    counts: Counter[str] = Counter()
    with workers(options.workers, options.timeout) as pool:
        while left and counts.total() < options.count:
            missing = options.count - counts.total()
            batch, left = left[:missing], left[missing:]
            futures = {
                mutant: pool.submit(outcome, mutant, tests_of(mutant.file))
                for mutant in batch
                if mutant.reason(known) is None
            }
            for mutant in batch:
                reason = mutant.reason(known)
                result, seconds = (
                    (f"equivalent: {reason}", 0.0) if reason else futures[mutant].result()
                )
                if result == "":
                    continue
                print(f"{mutant.file}:{mutant.line}: {mutant.original}  ->  {mutant.mutated}")
                print(f"    {result or 'SURVIVED'}  ({seconds:.0f} s)", flush=True)
                counts["equivalent" if reason else "killed" if result else "survived"] += 1
                if result is None:
                    survivors.append(mutant)
                elif result.startswith("tests/"):
                    killers.add(result)
        # A test that also fails without a mutant has killed nothing.
        broken = pool.submit(test, sorted(killers)).result() if killers else None

    minutes = (time.monotonic() - began) / 60
    print(f"{counts.total()} mutants in {minutes:.0f} minutes:", end=" ")
    print(", ".join(f"{counts[what]} {what}" for what in ("killed", "equivalent", "survived")))
    for mutant in survivors:
        print(f"\n{mutant.file}\n- {mutant.original}\n+ {mutant.mutated}")
    if broken:
        print(f"\n{broken} fails without a mutant, too")
    return bool(survivors or broken)


if __name__ == "__main__":
    sys.exit(main())
