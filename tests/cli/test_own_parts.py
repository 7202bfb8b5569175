"""The README's page on a norm, a dataset and a probe of one's own, run from a wheel in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text().partition("## Your own norm, dataset and probe\n")[2].partition("\n## ")[0]
RUN = """\
import json, sys
from bnexp.cli.main import main
print(__import__("bnexp").__file__)
sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
"""


def test_the_page_runs_from_a_wheel_in_an_empty_folder(tmp_path):
    wheels, site, empty = (tmp_path / name for name in ("wheels", "site", "empty"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("bnexp-*.whl")
    with ZipFile(wheel) as file:
        file.extractall(site)
    empty.mkdir()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (empty / "parts.py").write_text(next(text for kind, text in blocks if kind == "python"))
    lines = [line for kind, text in blocks if not kind for line in text.splitlines()]
    for line in lines:
        if not line.startswith("bnexp "):
            subprocess.run(line, shell=True, check=True, cwd=empty)
    # bnexp.yaml is there for the first command too, where the page has not made it yet; it changes nothing there.
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("bnexp ")]
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site)) and "perexample against library" in done.stdout
    assert "per_example against library" in done.stdout
    row = json.loads((empty / "own-parts/per_example-s0/metrics.jsonl").read_text().splitlines()[-1])
    assert (
        row["length/classifier.weight"] > 0
        and "eps: 0.001" in (empty / "own-parts/per_example-s0/config.yaml").read_text()
    )
