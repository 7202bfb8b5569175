"""The house's floors: who may import whom, through which door a library comes in, and how light the front door is."""

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bnexp"
FLOORS = (
    "errors readings stats distributed foreign signals process",
    "norms kernels models data optim",
    "run meter device engines fold checkpoint folder files",
    "writer progress probes",
    "loop compare report records bench parity shapes timing summary variants verdict figure advice expectations epochs"
    " probe_figure page inspection diagnosis findings featuremaps journal",
    "cli config build compose replicas targets commands explain sweep threads job multirun studies resuming __main__",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
PARTS = FLOORS[1].split()
# Parts never import each other but for these; nor anything of the ground but these.
BETWEEN_PARTS = {("norms", "kernels")}
GROUND_OF_PARTS = {"data": {"errors"}, "models": {"errors"}, "optim": {"errors"}}
DOORS = {
    "hydra": FLOORS[5].split(),
    "omegaconf": FLOORS[5].split(),
    "tensorboard": ["writer"],
    "torch.utils.tensorboard": ["writer"],
    "rich": ["progress", "report", "bench", "summary", "commands", "multirun", "studies", "epochs",
             "inspection", "findings", "featuremaps"],
    "triton": ["kernels"],
    "matplotlib": ["figure", "probe_figure", "page", "report", "featuremaps"],
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str, package: str = "bnexp") -> set[str]:
    """Dotted names of all that ``source`` imports, at its top or inside functions; ``from a import b`` is a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def unit(path: Path) -> str:
    """The folder or file directly under bnexp/ that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(here: str, names: set[str]) -> list[str]:
    """What ``here``, a unit of the house, must not import."""
    found = []
    for name in sorted(names):
        first, *rest = name.split(".")
        if first == "bnexp" and rest and rest[0] in FLOOR and rest[0] != here:
            there = rest[0]
            if FLOOR[there] > FLOOR[here]:
                found.append(f"{here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]}) above it")
            if here in PARTS and there in PARTS and (here, there) not in BETWEEN_PARTS:
                found.append(f"{here} imports {there}: parts do not know each other")
            if there not in GROUND_OF_PARTS.get(here, {there}) and there not in PARTS:
                found.append(f"{here} imports {there}: of the ground it may use only the errors")
        for library, doors in DOORS.items():
            if (name + ".").startswith(library + ".") and here not in doors:
                found.append(f"{here} imports {library}, whose door is {', '.join(doors)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_floor_and_below_and_libraries_through_their_door(path):
    here = unit(path)
    if here == "__init__":
        assert not imported(path.read_text()), "the package itself imports nothing, so that --help stays fast"
        return
    assert here in FLOOR, f"{here} has no floor yet: decide where it lives and name it in FLOORS of {__file__}"
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    assert violations(here, imported(path.read_text(), package)) == []


@pytest.mark.parametrize(
    "here, source",
    [
        ("models", "from bnexp.norms.scratch import BatchNorm"),
        ("models", "from bnexp import norms"),
        ("models", "from ..norms import scratch"),
        ("kernels", "import bnexp.norms.base"),
        ("optim", "from bnexp.stats import mean"),
        ("run", "def f():\n    from bnexp import loop"),
        ("writer", "from bnexp.build import build"),
        ("loop", "from omegaconf import OmegaConf"),
        ("norms", "import triton.language as tl"),
        ("loop", "from torch.utils.tensorboard import SummaryWriter"),
        ("loop", "from torch.utils import tensorboard"),
        ("run", "import rich"),
    ],
)
def test_what_the_floors_forbid_is_found(here, source):
    assert len(violations(here, imported(source, f"bnexp.{here}"))) == 1


def test_what_the_floors_allow_passes():
    assert violations("norms", imported("from bnexp.kernels import forward\nfrom bnexp.norms import base")) == []
    assert violations("loop", imported("import torch\nfrom bnexp import run, compare\nimport richer")) == []


def run_bnexp(*arguments, **environment):
    """(stdout, modules it imported) of the command line in a fresh interpreter."""
    code = (
        "import sys, bnexp.cli\n"
        "code = bnexp.cli.main(sys.argv[1:])\n"
        "print('\\n'.join(sorted(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout, set(done.stderr.split())


@pytest.mark.parametrize("arguments, line", [(["--help"], ""), (["completion", "query"], "bnexp tr")])
def test_help_and_completion_of_the_command_import_neither_torch_nor_hydra(arguments, line):
    out, modules = run_bnexp(*arguments, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert "train" in out
    heavy = {"torch", "hydra", "omegaconf", "numpy", "rich", "tensorboard", "yaml"}
    assert not modules & heavy


def test_help_answers_at_once():
    seconds = []
    for _ in range(5):
        began = perf_counter()
        subprocess.run([sys.executable, "-m", "bnexp", "--help"], capture_output=True, check=True)
        seconds.append(perf_counter() - began)
    # 0.3 s is the promise, and it takes about 0.05; the fastest of five, because other work on the machine only
    # ever adds. Importing torch alone takes more than a second.
    assert min(seconds) < 0.3, f"median {statistics.median(seconds):.2f} s"
