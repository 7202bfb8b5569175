"""A study runs its variants, writes what a comparison writes, and says whether what it expects holds."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bnexp.cli.study import make_grid
from bnexp.config import check
from bnexp.config.choices import choices
from bnexp.config.compose import composed, session
from bnexp.config.study import choose, load
from bnexp.report.expectations import judge
from bnexp.report.records import read_runs

TINY = """\
title: A network that is trained knows more than one that is not
source: common sense
takes: 2 s
settings: [model=mlp, data=digits, "model.hidden=[16]", epochs=3, quiet=true, threads=1]
seeds: 3
first_seed: 0
variants:
  untrained: optimizer.lr=1e-9
  trained: [optimizer.lr=0.01, norm=library]
expect:
  - {says: it knows more, of: trained, minus: untrained, tag: accuracy/test, above: 0.3}
forms:
  quick:
    settings: [epochs=1]
    expect: [{says: it knows a bit more, of: trained, minus: untrained, tag: accuracy/test, above: 0.1}]
"""


@pytest.fixture
def tiny(tmp_path):
    """A study of our own: the name of its file."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    return "tiny.yaml"


@pytest.mark.parametrize("key", ["seed", "norm", "steps", "''"])
def test_a_study_whose_best_setting_is_not_swept_is_refused_before_any_work(key, bnexp, tmp_path, capsys):
    sweep = "sweep: {norm: [none, library], optimizer.lr: [0.1, 1]}"
    (tmp_path / "own.yaml").write_text(f"{TINY}best_over: {key}\n{sweep}\n")
    assert bnexp("study", "own.yaml", "out=s") == 2
    assert "not a setting that the study sweeps; choose among optimizer.lr" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["own.yaml"]


def test_a_study_may_choose_on_some_seeds_and_judge_on_others(bnexp, tmp_path, capsys):
    tuned = f"{TINY}best_over: lr\nsweep: {{optimizer.lr: [0.01, 0.001]}}\nchoose_on: 1\n"
    tuned = tuned.replace("untrained: optimizer.lr=1e-9", "untrained: norm=none").replace("optimizer.lr=0.01, ", "")
    tuned = tuned.replace("seeds: 3", "seeds: 2")
    (tmp_path / "own.yaml").write_text(tuned)
    assert bnexp("study", "own.yaml", "seed=0", "out=few") == 2
    assert "choose_on=1: one or more seeds have to choose" in capsys.readouterr().err
    assert not (tmp_path / "few").exists(), "before any work"
    assert bnexp("study", "own.yaml", "quick=true", "seed=0,1", "data.limit=100", "out=s") in (0, 3)
    content = json.loads((tmp_path / "s" / "comparison.json").read_text())
    assert (content["chosen_on"], content["judged_on"]) == ([0], [1])


def test_texts_of_a_study_are_those_that_were_typed_and_its_values_are_words_of_hydra(tmp_path):
    text = TINY.replace("title: A network that is trained knows more than one that is not", "title: 1e5")
    sweep = (
        "sweep: {data.root: [2026_11_28, yes], model.hidden: [[8, 1_0], null], model.bias: [yes], optimizer.lr: [1e-2]}"
    )
    (tmp_path / "own.yaml").write_text(f"{text.replace('it knows more', 'yes')}{sweep}\n")
    study = load(str(tmp_path / "own.yaml"))
    assert (study.title, study.takes, study.expect[0]["says"]) == ("1e5", "2 s", "yes")
    with session():
        words = make_grid(study, ["seed=0"])[0].points[0].overrides
    assert {"data.root='2026_11_28'", "model.hidden=[8,10]", "model.bias=true", "optimizer.lr=0.01"} <= {*words}


@pytest.mark.parametrize("name", choices("study"))
@pytest.mark.parametrize("form", ["", "quick=true", pytest.param("full=true", marks=pytest.mark.long)])
def test_every_study_can_be_run_as_far_as_can_be_told_without_running_it(name, form, monkeypatch):
    monkeypatch.setenv("BNEXP_DATA", "/nonexistent")  # nothing here reads data
    study, overrides = choose(load(name), [form] if form else [])
    assert study.expectations()
    assert study.title and study.source and study.takes
    assert study.seeds >= 3
    with session():
        grid, roles = make_grid(study, overrides)
        assert [point.name for point in grid.points] == list(roles)
        for role in study.variants:  # one point of each: the others differ by numbers
            number = list(roles.values()).index(role)
            check.check(composed(grid.points[number].overrides))


def test_a_study_that_holds_ends_with_0_and_leaves_what_a_comparison_leaves(bnexp, tiny, tmp_path, capsys):
    assert bnexp("study", tiny, "out=s", "quiet=false") == 0
    printed = capsys.readouterr().out
    assert "common sense" in printed
    assert "holds  it knows more" in printed
    assert "> 0.3, the" in printed and "a new seed" in printed
    assert printed.rstrip().endswith("s")
    folder = tmp_path / "s"
    assert {"comparison.png", "comparison.json", "comparison.md", "sweep.json", "study.json", "bands"} <= {
        each.name for each in folder.iterdir()
    }
    assert {"untrained-s0", "untrained-s1", "trained-s0", "trained-s1"} <= {each.name for each in folder.iterdir()}
    said = json.loads((folder / "study.json").read_text())
    assert said["holds"] is True
    finals = {
        name: json.loads((folder / name / "status.json").read_text())["metrics"]["accuracy/test"]
        for name in ("trained-s0", "untrained-s0")
    }
    assert said["findings"][0]["numbers"][0] == finals["trained-s0"] - finals["untrained-s0"]


@pytest.mark.parametrize("how", ["compare", "sweep"])
def test_swapping_the_variants_makes_it_exit_with_3(bnexp, tiny, tmp_path, how):
    path = tmp_path / tiny
    path.write_text(path.read_text().replace("takes: 2 s\nsettings", f"takes: 2 s\nhow: {how}\nsettings"))
    swapped = ["variants.trained=optimizer.lr=1e-9", "variants.untrained=optimizer.lr=0.01 norm=library"]
    assert bnexp("study", tiny, "out=s", *swapped) == 3
    assert json.loads((tmp_path / "s/study.json").read_text())["holds"] is False


def test_the_quick_form_changes_settings_and_expectations(bnexp, tiny, tmp_path):
    assert bnexp("study", tiny, "quick=true", "out=s") == 0
    assert OmegaConf.load(tmp_path / "s/trained-s0/config.yaml").epochs == 1
    assert json.loads((tmp_path / "s/study.json").read_text())["findings"][0]["expectation"]["above"] == 0.1


def test_fewer_seeds_than_its_own_are_too_few_to_judge_a_study(bnexp, tiny, tmp_path, capsys):
    assert bnexp("study", tiny, "quick=true", "seed=0,1", "quiet=false", "out=s") == 4
    told = capsys.readouterr()
    assert "too few seeds to judge: the study has 3" in told.err and "holds" not in told.out and "too few" in told.out
    assert json.loads((tmp_path / "s/study.json").read_text())["holds"] is None


def test_expectations_are_not_tested_on_the_seeds_that_they_were_settled_on(bnexp, tiny, tmp_path, capsys):
    path = tmp_path / tiny
    path.write_text(path.read_text() + "settled_on: [7, 2]\namended: the rate was too large\n")
    assert bnexp("study", tiny, "out=s") == 2
    assert "seeds: 2 is one that the expectations were settled on" in capsys.readouterr().err
    path.write_text(path.read_text().replace("[7, 2]", "[7, 8]"))
    assert bnexp("study", tiny, "quick=true", "quiet=false", "out=s") == 0
    assert "amended: the rate was too large" in capsys.readouterr().out
    assert json.loads((tmp_path / "s/study.json").read_text())["settled_on"] == [7, 8]


def test_a_variant_is_changed_in_a_form_that_has_variants_of_its_own_too(tiny, tmp_path):
    path = tmp_path / tiny
    path.write_text(path.read_text() + "    variants: {untrained: optimizer.lr=1e-9, trained: optimizer.lr=0.1}\n")
    chosen, _ = choose(load(str(path)), ["variants.trained=norm=none seed=1", "quick=true"])
    assert chosen.variants == {"untrained": "optimizer.lr=1e-9", "trained": ["norm=none", "seed=1"]}


def test_a_repeated_study_trains_nothing_again_and_says_the_same(bnexp, tiny, tmp_path):
    assert bnexp("study", tiny, "quick=true", "out=s") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s/*/metrics.jsonl")}
    first = (tmp_path / "s/study.json").read_text()
    assert bnexp("study", tiny, "quick=true", "out=s") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("s/*/metrics.jsonl")} == before
    assert (tmp_path / "s/study.json").read_text() == first


def test_the_command_line_changes_settings_and_seeds_but_not_what_a_variant_is(bnexp, tiny, tmp_path):
    bnexp("study", tiny, "epochs=1", "seed=5", "optimizer.lr=0.5", "out=s")
    configs = {path.parent.name: OmegaConf.load(path) for path in tmp_path.glob("s/*/config.yaml")}
    assert {name: config.optimizer.lr for name, config in configs.items()} == {"untrained": 1e-9, "trained": 0.01}
    assert {config.seed for config in configs.values()} == {5}


def test_a_run_that_fails_ends_the_study_with_1(bnexp, tiny, tmp_path, monkeypatch):
    from bnexp.train.run import Run

    step = Run.step

    def fail(run):
        if run.optimizer.param_groups[0]["base_lr"] == 0.01:
            raise RuntimeError("broken")
        step(run)

    monkeypatch.setattr(Run, "step", fail)
    assert bnexp("study", tiny, "quick=true", "out=s") == 1
    assert "has finished or diverged" in json.loads((tmp_path / "s/study.json").read_text())["findings"][0]["problem"]


def test_alone_it_lists_every_study_with_its_source_and_time(bnexp, capsys):
    assert bnexp("study") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in choices("study"):
        assert name in printed
        assert load(name).takes in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mnist_lba"], "did you mean mnist_lab?"),
        (["nowhere.yaml"], "there is no such study"),
        (["mnist_lab", "quick=yes"], "true or false is expected"),
        (["mnist_lab", "variants.nnoe=norm=none"], "no such variant; its variants are none, none_tuned, batch_norm"),
        (["mnist_lab", "-m"], "takes settings only"),
        (["mnist_lab", "epohcs=3"], "did you mean epochs?"),
        (["mnist_lab", "variants.batch_norm=norm=group norm.groups=3"], "32 channels cannot be split into 3 groups"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(bnexp, capsys, tmp_path, arguments, complaint):
    assert bnexp("study", *arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("of: trained", "of: winner", "winner is no variant"),
        ("above: 0.3", "abvoe: 0.3", "abvoe"),
        ("source:", "sauce:", "sauce"),
        ("takes: 2 s", "takes: 2 s\nhow: slowly", "how: slowly"),
        ("title: A network", "title: [A network", "tiny.yaml"),
    ],
)
def test_a_study_that_says_nonsense_is_refused_before_any_run(bnexp, tiny, tmp_path, capsys, old, new, complaint):
    path = tmp_path / tiny
    path.write_text(path.read_text().replace(old, new, 1))
    assert bnexp("study", tiny, "out=s") == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


SWAPPED = {  # a study, and the roles whose runs change places
    "gradient_explosion": ("none", "batch_norm"),
    "only_norm": ("norms", "classifier"),
    "shifted_test": ("running", "batch"),
    "skipinit_depth": ("none", "skipinit"),
    "equilibrium": ("none", "batch_norm"),
    "precise_statistics": ("fast", "slow"),
}


def holds(name, arguments, folder, swap=None):
    """Whether every expectation holds for the runs in ``folder``, with the runs of two roles swapped if given."""
    study, _ = choose(load(name), arguments)
    runs = {role: read_runs(Path(folder).glob(f"{role}-s*"))[0] for role in study.variants}
    if swap:
        runs[swap[0]], runs[swap[1]] = runs[swap[1]], runs[swap[0]]
    return all(judge(each, runs).holds for each in study.expectations())


@pytest.mark.usefixtures("mnist_root")
def test_the_explosion_of_gradients_is_seen_and_swapped_sides_fail(bnexp):
    words = ["data.limit=512", "quiet=true", "threads=1", "out=g"]
    assert bnexp("study", "gradient_explosion", *words) == 0
    assert holds("gradient_explosion", [], "g")
    assert not holds("gradient_explosion", [], "g", SWAPPED["gradient_explosion"])


@pytest.mark.long
@pytest.mark.usefixtures("mnist_root")
@pytest.mark.parametrize("name", SWAPPED)
def test_a_study_holds_on_seeds_of_its_own_and_fails_with_two_sides_swapped(name, bnexp):
    assert bnexp("study", name, "quick=true", "quiet=true", "out=s") == 0
    assert not holds(name, ["quick=true"], "s", SWAPPED[name])
