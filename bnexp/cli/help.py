"""Help, usage and shell completion, answered without importing torch or Hydra."""

import os
import textwrap

from bnexp.config.choices import GROUPS, choices

COMMANDS = {
    "train": "train one model and log it to TensorBoard; -m trains every combination of several values",
    "resume": "go on with an interrupted run from its last checkpoint",
    "rerun": "run a run folder's config again, with other values if you give any",
    "compare": "train variants in lockstep, with the same seeds, and say which is better and how sure that is",
    "study": "a published claim, from its settings to whether it holds; alone it lists them",
    "report": "the same verdict, tables and figure from run folders that are finished",
    "inspect": "a trained model looked at again: statistics of its norms, mistakes, feature maps",
    "summary": "a table of the model: layers, shapes, parameters and where norms sit",
    "bench": "compare every implementation of batch norm with float64, then time those that agree",
    "completion": "print the bash script that completes commands, groups and values",
}
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
        # Hydra completes "program overrides"; it must not see the command's word.
        os.environ["COMP_LINE"] = line = line.replace(f" {words[1]}", "", 1)
        os.environ["COMP_POINT"] = str(len(line))
        complete()
    return 0


def complete() -> None:
    """Print what Hydra offers where COMP_LINE ends."""
    from hydra.core.global_hydra import GlobalHydra

    from bnexp.config.compose import session

    with session():
        GlobalHydra.instance().hydra.shell_completion("train", ["query=bash"])
