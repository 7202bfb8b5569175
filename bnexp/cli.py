"""The front door: a table of commands, answered without importing torch or Hydra until one of them runs."""

import errno
import os
import re
import sys
import textwrap
from pathlib import Path

from bnexp import process
from bnexp.errors import UserError
from bnexp.foreign import printable

COMMANDS = {
    "train": "train one model and log it to TensorBoard; -m trains every combination of several values",
    "resume": "go on with an interrupted run from its last checkpoint",
    "rerun": "run a run folder's config again, with other values if you give any",
    "compare": "train variants in lockstep, with the same seeds, and say which is better and how sure that is",
    "study": "a published claim, from its settings to whether it holds; alone it lists them",
    "report": "the same verdict, tables and figure from run folders that are finished",
    "inspect": "a trained model looked at again: statistics of its norms, mistakes, feature maps",
    "summary": "a table of the model: layers, shapes, parameters and where norms sit",
    "bench": "time every batch norm that equals float64's (norms), or our loop beside others (loop)",
    "completion": "print the bash script that completes commands, groups and values",
}
GROUPS = ("model", "norm", "data", "optimizer", "schedule", "engine")
EXAMPLES = """\
bnexp train                                          LeNet with batch norm on embedded digits, seconds
bnexp train model=resnet norm=scratch                the textbook batch norm in a ResNet
bnexp train data=mnist optimizer=sgd optimizer.lr=0.1 schedule=cosine epochs=10
bnexp summary model=densenet data.size=224           layers, shapes, parameters
bnexp compare norm=none,library 'seed=range(5)'      does batch norm help, and how sure is that"""
USAGE = {
    "resume": """\
usage: bnexp resume RUN

Goes on with an interrupted run from its last checkpoint, in its own folder and with its own settings.
bnexp train ... out=RUN resume=true begins the run if there is none yet, and else does the same.""",
    "rerun": """\
usage: bnexp rerun RUN [setting=value] ... [out=DIR]

Trains once more with the settings of a run, but for those given, in a folder of its own.
Settings are those of bnexp train --help.""",
    "summary": """\
usage: bnexp summary [model=NAME] [norm=NAME] [setting=value] ...

Prints the layers of a model with their shapes and parameters, and where norms sit; reads no data and writes nothing.
Settings are those of bnexp train --help.""",
    "compare": """\
usage: bnexp compare norm=none,library 'seed=range(5)' [setting=value] [baseline=norm=none] [out=DIR]

Trains every combination in lockstep and says how each variant differs from the baseline, the first.
Settings are those of bnexp train --help.""",
    "study": """\
usage: bnexp study [NAME [quick=true | full=true] [setting=value] [variants.ROLE=override] [out=DIR]]

Without a name, lists the studies. A study trains its variants with at least three seeds, writes what compare writes,
and ends with each expectation, the number found, and whether it holds; exit code 3 if one does not. NAME may
also be a yaml file of your own.""",
    "completion": """\
usage: eval "$(bnexp completion)"

Prints the bash script that completes commands, groups and values.""",
}  # the other commands build theirs from what they take
BASH = """\
# bash completion for bnexp; load it with: eval "$(bnexp completion)"
_bnexp() {
    COMPREPLY=($(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" bnexp completion query 2>/dev/null))
    [[ ${COMPREPLY[0]} == *[=/.] ]] && compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o default -F _bnexp bnexp"""


def conf_dir() -> Path:
    """The folder of the configuration: inside the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def choices(group: str) -> list[str]:
    """What a group offers: the yaml files in its folder."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def help_text() -> str:
    commands = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    groups = "\n".join(f"  {group + '=':<12}{' | '.join(choices(group))}" for group in GROUPS)
    groups += f"\n  {'probe=':<12}[{','.join(choices('probe'))}], any of them"
    return (
        "bnexp: what does batch normalization do to this network?\n\n"
        "usage: bnexp COMMAND [group=choice] [setting=value] ...\n\n"
        f"commands\n{commands}\n\ngroups\n{groups}\n\nexamples\n{textwrap.indent(EXAMPLES, '  ')}\n\n"
        "bnexp train --help lists every setting; tensorboard --logdir outputs shows the curves."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a run that failed, 2 for bad input, 130 when interrupted."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if command in ("--version", "-V"):
        from importlib.metadata import version  # takes as long as all else here together

        print(f"bnexp {version('bnexp')}")
        return 0
    if command in USAGE and {"-h", "--help"} & set(rest):
        print(USAGE[command])
        return 0
    try:
        if command == "completion":
            return completion(rest)
        if odd := [word for word in arguments or sys.argv if re.search("[\0\ud800-\udfff]", word)]:
            raise UserError(f"{odd[0]}: not UTF-8 text; give what is meant by it another name")
        if command not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise UserError(f"{command}: not a command{nearest(command, COMMANDS)}; choose one of {known}")
        process.settle()
        from bnexp import commands

        return getattr(commands, command)(rest)
    except UserError as error:
        complain(error)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            where = f"{error.filename}: " if error.filename else ""
            complain(where + (error.strerror or str(error)))
            return 1
        # Whoever read our output has gone, or its disk is full. What lies in run folders is not touched by that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        complain(f"cannot write the output: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        print("bnexp: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("hydra", "omegaconf"):  # a value looked up only now
            from bnexp.explain import explain

            complain(explain(error, " ".join(rest)))
            return 2
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if isinstance(error, MemoryError) or re.search("allocate memory|[Oo]verflow", what):
            complain(f"too large for the memory here ({what}); try something smaller")
        else:
            complain(f"{what}; the traceback is in {keep_traceback(error)}")
        return 1


def complain(what: object) -> None:
    print(f"bnexp: error: {printable(what)}", file=sys.stderr)


def keep_traceback(error: Exception) -> str:
    """Write down for whoever mends it where an error came from, in a file of which the name is returned."""
    import tempfile
    import traceback

    options = {"prefix": "bnexp-", "suffix": ".txt", "delete": False, "errors": "backslashreplace"}
    with tempfile.NamedTemporaryFile("w", **options) as file:
        traceback.print_exception(error, file=file)
    return file.name


def nearest(word: str, known) -> str:
    """`` (did you mean X?)`` if something known looks like ``word``."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def completion(arguments: list[str]) -> int:
    """Print the bash script, or with ``query`` what can stand where COMP_LINE ends."""
    if arguments != ["query"]:
        print(BASH)
        return 0
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", 10**6))]
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        typed = words[1] if len(words) == 2 else ""
        print("\n".join(name for name in (*COMMANDS, "--help", "--version") if name.startswith(typed)))
    elif words[1] == "study":
        typed = "" if line.endswith(" ") else words[-1]
        if len(words) - bool(typed) == 2:
            print("\n".join(name for name in choices("study") if name.startswith(typed)))
    elif words[1] in ("train", "summary"):
        from bnexp import commands

        # Hydra completes "program overrides"; it must not see the command's word.
        os.environ["COMP_LINE"] = line = line.replace(f" {words[1]}", "", 1)
        os.environ["COMP_POINT"] = str(len(line))
        commands.complete()
    return 0
