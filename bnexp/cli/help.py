"""Help, usage and shell completion; imports no torch, and Hydra only to complete settings."""

import os
import textwrap

from bnexp.config.choices import GROUPS, choices

COMMANDS = {
    "train": "train one model and log it to TensorBoard; -m trains every combination of several values",
    "resume": "continue an interrupted run from its last checkpoint",
    "rerun": "train again with the settings of an earlier run, some of them changed if you like",
    "compare": "train variants with the same seeds and report which is better, and how certain that is",
    "study": "test a published claim: train its variants and report whether it holds; alone: list the studies",
    "report": "compare finished runs: the tables, verdict and figure of compare",
    "plan": "how many seeds a comparison needs, from the spread over the seeds that have finished",
    "inspect": "examine a trained model: statistics of its norms, mistakes, feature maps",
    "summary": "print the layers of a model, with shapes and parameters, and where its norms are",
    "bench": "compare every implementation of batch norm with float64, then time those that agree",
    "completion": "print the bash script that completes commands, groups and values",
}
EXAMPLES = """\
bnexp train                                          LeNet with batch norm on small digits, in seconds
bnexp train model=resnet norm=scratch                a ResNet with the textbook batch norm
bnexp train data=mnist optimizer=sgd optimizer.lr=0.1 schedule=cosine epochs=10
bnexp summary model=densenet data.size=224           layers, shapes, parameters
bnexp compare norm=none,library 'seed=range(5)'      does batch norm help, and how certain is that?"""
SEE_TRAIN = "bnexp train --help lists the settings."
USAGE = {
    "resume": """\
usage: bnexp resume RUN [device=NAME] [data.root=DIR] [threads=N] [setting=value]

Continues an interrupted run from its last checkpoint, in its own folder and with its own settings.
Only settings of the place can be given: where the data are, which device, how many threads.
bnexp train ... out=RUN resume=true starts the run if there is none in RUN yet, and otherwise continues it.""",
    "rerun": f"""\
usage: bnexp rerun RUN [setting=value] ... [out=DIR]

Trains again with the settings of a run, in a new folder. Settings given here replace those of the run.
{SEE_TRAIN}""",
    "plan": """\
usage: bnexp plan RUN_OR_SWEEP... [difference=0.5] [baseline=norm=none] [primary=METRIC]

Says how many seeds find a difference, in points of accuracy or nats of loss, with a power of 80%, and which difference
the seeds find that have finished. The runs have to hold two variants of at least two seeds.""",
    "summary": f"""\
usage: bnexp summary [model=NAME] [norm=NAME] [setting=value] ...

Prints the layers of a model with their shapes and parameters, and where its norms are.
Reads no data and writes nothing. {SEE_TRAIN}""",
    "compare": f"""\
usage: bnexp compare norm=none,library 'seed=range(5)' [setting=value] ... [baseline=norm=none] [out=DIR]

Trains every combination of the values in lockstep, and reports how each variant differs from the baseline.
The baseline is the first variant, unless baseline= names another.
{SEE_TRAIN}""",
    "study": f"""\
usage: bnexp study [NAME [quick=true | full=true] [setting=value] ... [variants.ROLE=override] [out=DIR]]

Without a name, lists the studies. NAME can also be a yaml file of your own.
Trains the variants of the study with its seeds, five as a rule, writes what compare writes, and then prints each
expectation, what was measured and whether the expectation holds. The exit code is 3 if one does not hold, and 4 if you
gave fewer seeds than the study has.

  quick=true, full=true   the short form of the study, or the one at full size, if it has one
  variants.ROLE=override  train this instead of the variant that has this role in the study

{SEE_TRAIN}""",
    "completion": """\
usage: eval "$(bnexp completion)"

Prints the bash script that completes commands, groups and values.""",
}  # train, report, inspect and bench print their own


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
    groups += f"\n  {'probe=':<12}[{','.join(choices('probe'))}], one or more of these"
    return (
        "bnexp: what does batch normalization do to this network?\n\n"
        "usage: bnexp COMMAND [group=choice] [setting=value] ...\n\n"
        f"commands\n{commands}\n\ngroups\n{groups}\n\nexamples\n{textwrap.indent(EXAMPLES, '  ')}\n\n"
        "bnexp train --help lists every setting; tensorboard --logdir outputs shows the curves."
    )


def completion(arguments: list[str]) -> int:
    """Print the bash script or, with ``query``, the words that complete COMP_LINE."""
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
        # Hydra completes "program overrides", so the command's word is taken out.
        os.environ["COMP_LINE"] = line = line.replace(f" {words[1]}", "", 1)
        os.environ["COMP_POINT"] = str(len(line))
        from hydra.core.global_hydra import GlobalHydra

        from bnexp.cli.flags import own_entries
        from bnexp.config.compose import Source, session

        with session(Source(own_entries(None))):
            GlobalHydra.instance().hydra.shell_completion("train", ["query=bash"])
    return 0
