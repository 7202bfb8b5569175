"""What each setting decides, that text stays text, and that rerun is train with the stored overrides and the new."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bnexp.config.check import check
from bnexp.config.compose import Source, composed, hparams, session, values_of
from bnexp.config.explain import parse_words, quoted, unreadable
from bnexp.config.schema import Train
from bnexp.config.stored import moved, rerun_config, stored_config
from bnexp.errors import UserError
from bnexp.store.settings import COMMAND, DECIDES, LOOKING, NUMBERS, PERSON, PLACE, SEED, decides, numbers, select

TINY = ("model=mlp", "data.limit=64", "batch_size=16", "steps=1", "threads=1")


def test_every_run_level_setting_has_a_line_in_the_table():
    assert {key for key in DECIDES if "." not in key} == {field.name for field in fields(Train)}


def test_every_setting_is_of_the_numbers_the_seed_the_looking_the_place_or_one_start():
    assert all(what & (NUMBERS | SEED | LOOKING | PLACE | COMMAND) for what in DECIDES.values())
    assert {key for key, what in DECIDES.items() if what & PERSON} == {"out", "resume", "allow"}


def test_two_gpus_are_one_variant_and_a_gpu_and_a_cpu_are_two():
    cfg = OmegaConf.to_container(composed(["device=cpu"]))
    variants = [numbers(cfg | {"device": device}) for device in ("cuda:0", "cuda:1", "cuda", "cpu")]
    assert variants[0] == variants[1] == variants[2] != variants[3]
    assert decides("optimizer.lr") == NUMBERS and "seed" not in variants[0] and "probe" not in variants[0]


def test_where_data_lie_is_a_place_and_which_images_a_folder_holds_are_numbers():
    cfg = OmegaConf.to_container(composed(["data=mnist"]))
    assert "data.root" in numbers(cfg) and "data.root" not in select(cfg, NUMBERS, but=PLACE)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    "word, text",
    [
        ("out=2026_11_28", "2026_11_28"),
        ("out=1e5", "1e5"),
        ("out=007", "007"),
        ("out=true", "true"),
        ("out=0x10", "0x10"),
        ("out='1e5'", "1e5"),
        ("out=null", None),
        ("out=runs/a", "runs/a"),
        ("threads=2", "2"),
        ("precision=1e1", "1e1"),
        ("device=1_0", "1_0"),
    ],
)
def test_a_setting_of_type_text_gets_the_text_that_was_typed(word, text):
    assert composed([word])[word.partition("=")[0]] == text


@pytest.mark.parametrize("word", ["model.activation=1e3", "data.augment=1_0", "norm.running_var=1e3"])
def test_so_does_an_option_that_is_text(word):
    key, _, text = word.partition("=")
    assert OmegaConf.select(composed(["norm=scratch", word]), key) == text


def test_a_folder_of_data_may_be_called_by_a_number():
    assert composed(["data=folder", "data.root=1e3"]).data.root == "1e3"
    assert composed(["data=mnist", "++data.root=2026_11"]).data.root == "2026_11"


@pytest.mark.parametrize("text", ["1e5", "2026_11_28", "yes", "0x10", "12:30:45", "007", "1.50"])
def test_so_does_one_in_a_file_of_the_users(text, tmp_path, train):
    lines = f"out: {text}\nkeep: {text}\nseed: 1_0\nnorm: {{eps: 1e-3}}\nmodel: {{activation: {text}}}\n"
    (tmp_path / "mine.yaml").write_text(f"defaults: [train, override data: mine, _self_]\n{lines}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text(f"_target_: bnexp.data.folder.Folder\nroot: {text}\nlimit: 1_0\n")
    with session(Source(tmp_path, "mine")):
        cfg = composed([])
    assert (cfg.out, cfg.keep, cfg.data.root, cfg.model.activation) == (text, text, text, text)
    assert (cfg.seed, cfg.norm.eps, cfg.data.limit) == (10, 0.001, 10)
    folder = train(*TINY)
    config = (folder / "config.yaml").read_text().replace("activation: relu", f"activation: {text}")
    (folder / "config.yaml").write_text(config.replace("eps: 1.0e-05", "eps: 1e-3"))
    assert (stored_config(folder).model.activation, stored_config(folder).norm.eps) == (text, 0.001)


def test_numbers_stay_numbers():
    cfg = composed(["optimizer.lr=1e-2", "data.limit=1_0", "seed=1_000", "norm=group", "norm.groups=2"])
    assert (cfg.optimizer.lr, cfg.data.limit, cfg.seed, cfg.norm.groups) == (0.01, 10, 1000, 2)


def test_a_tilde_inside_a_path_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("./~/x", "./~root/x"):
        assert composed([f"out='{text}'"]).out == f"{tmp_path}/{text[2:]}"
    assert composed([f"out='{tmp_path}/a/~/x'"]).out == f"{tmp_path}/a/~/x"
    for text in ("a/~/x", "a/../~/x"):
        with pytest.raises(UserError, match=f"^out={text}: ~ is the home folder at the beginning only"):
            composed([f"out='{text}'"])
    assert composed(["out=new/../x"]).out == f"{tmp_path}/x"


@pytest.mark.parametrize("home", [None, "", "here"])
def test_a_tilde_without_a_home_is_refused(home, monkeypatch):
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    with pytest.raises(UserError, match="^out=~/x: there is no home folder"):
        composed(["out=~/x"])


def test_each_tilde_of_a_list_is_a_home():
    (override,) = parse_words(["data.root=~/a,~/b"])
    assert values_of(override) == ["'~/a'", "'~/b'"]


def test_a_tilde_is_the_home_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert composed(["out='~/x'"]).out == composed(["out=~/x"]).out == "/home/somebody/x"
    assert composed(["data=mnist", "data.root=~/photos"]).data.root == "~/photos", "which the data expand"


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("value", [
    "lr=0.1", "it's", "a b", 'say "x"', "a,b", "{x}", "(x", "é", "x\\", "'", '"', "'\"", "a'\\",
])  # fmt: skip
def test_what_hydra_cannot_read_is_proposed_in_quotes_that_it_can(value):
    (override,) = parse_words([f"out={quoted(value)}"])
    assert override.value() == value


def test_the_sign_is_named_and_the_proposal_is_for_a_shell():
    assert unreadable("out=lr=0.1") == (
        "out=lr=0.1: the sign = in its value is read only in quotes; write \"out='lr=0.1'\""
    )
    assert unreadable("steps") == "steps: not a setting; write it as name=value"
    assert """write "out=\\"it's\\"\"""" in unreadable("out=it's")


@pytest.mark.parametrize(
    "word, words",
    [
        ("lr=0.1", "lr: there is no such setting (did you mean optimizer.lr?)"),
        ("momentum=0.1", "did you mean"),
        ("optimizer.momentum=0.9", "optimizer.momentum: there is no such setting in the chosen entries"),
        ("hydra.run.dir=x", "name one with out=DIR"),
        ("hydra.job.chdir=true", "name one with out=DIR"),
        ("norm={a:1}", "a name is expected"),
    ],
)
def test_a_wrong_word_is_answered_before_hydra_sees_it(word, words):
    with pytest.raises(UserError) as caught:
        composed([word])
    assert words in str(caught.value)


# ---------------------------------------------------------------- rerun, resume

CHANGES = [
    ["optimizer.lr=0.5", "optimizer=sgd"],
    ["optimizer=sgd", "optimizer.lr=0.5"],
    ["norm=library", "~norm.momentum"],
    ["++optimizer.amsgrad=true"],
    ["+optimizer.amsgrad=true"],
    ["hydra.verbose=false", "norm=none"],
    ["seed=3", "norm=group", "norm.groups=1"],
    ["schedule=cosine", "schedule.final=0.1", "steps=3"],
    ["probe=[gradients]", "probe.gradients.every=7"],
    ["data.valid=0.2", "++data.size=8"],
]


@pytest.mark.parametrize("before", [["norm=scratch", "norm.eps=1e-3"], ["optimizer.lr=0.2"]], ids=str)
@pytest.mark.parametrize("new", CHANGES, ids=str)
def test_rerun_is_train_with_the_stored_overrides_and_the_new_ones(before, new, train):
    folder = train(*TINY, *before)
    lost = ["norm.eps=1e-3"] * ("norm=none" in new)  # an option that the entry chosen anew does not have
    words = [word for word in [*TINY, *before, *new] if word not in lost]
    assert rerun_config(folder, new)[0] == composed(words)


def test_rerun_keeps_the_overrides_beside_one_with_a_reference_or_a_resolver(train, monkeypatch):
    monkeypatch.setenv("WIDTH", "9")
    lr = ("optimizer.eps=0.37", "optimizer.lr=${optimizer.eps}")
    folder = train(*TINY, *lr, "log_every='${oc.decode:${oc.env:WIDTH}}'")
    assert rerun_config(folder, ["optimizer=adamw"])[0].optimizer.lr == 0.37
    assert rerun_config(folder, ["optimizer.eps=0.1"])[0].optimizer.lr == 0.1
    assert rerun_config(folder, ["seed=2"])[0].log_every == 9


@pytest.mark.parametrize(
    "words, key",
    [
        (["lr=1"], "optimizer.lr"),
        (["+lr=1"], "optimizer.lr"),
        (["~lr"], "optimizer.lr"),
        *[([f"{name}=1"], "optimizer.lr") for name in ("LR", "learning_rate", "learningrate")],
        *[([f"{name}=1"], "optimizer.weight_decay") for name in ("wd", "weight_decay", "WD")],
        *[([f"{name}=1"], "batch_size") for name in ("bs", "batch", "model.bs")],
        *[([f"{name}=1"], "model") for name in ("net", "network", "arch")],
        *[([f"{name}=1"], "norm") for name in ("bn", "normalization")],
        (["gpu=0"], "device"),
        (["eta=1"], "optimizer.betas"),
        (["dataset=mnist"], "data"),
        (["opt=sgd"], "optimizer"),
        (["batch=32"], "batch_size"),
        (["norm_eps=1"], "norm.eps"),
        (["norm.momentun=1"], "norm.momentum"),
        (["stem=cifar"], "model.stem"),
        (["model=resnet", "widths=[8]"], "model.widths"),
    ],
    ids=str,
)
def test_a_setting_that_is_proposed_exists(words, key):
    with pytest.raises(
        UserError, match=rf"there is no such setting \(did you mean {key}(, with model=resnet)?\?\)"
    ) as error:
        composed(words)
    entry = ["model=resnet"] if "with" in str(error.value) else []
    assert OmegaConf.select(composed([*words[:-1], *entry]), key) is not None


@pytest.mark.parametrize(
    "words, text",
    [
        (["model.depth=18"], "model.depth: there is no such setting; the chosen model has activation, bias"),
        (["model=mlp", "model.depth=18"], "the chosen model has hidden, activation, bias, init, weight_init_std"),
        (
            ["norm=none", "norm.decay=1"],
            "in the chosen entries, it belongs to norm=scratch; the chosen norm has no opt",
        ),
        (
            ["~norm.momentum", "norm.momentum=0.3"],
            "norm.momentum: taken out by ~norm.momentum; leave that out, or write +norm.momentum=... after it",
        ),
        (["norm.momentum='0.1'"], "norm.momentum='0.1': a number or null is expected, without quotes"),
        (["out=a,b"], "write \"out='a,b'\" for this name"),
        (["out=a\n=b"], "control characters in the name"),
        (["allow=[1e3,0_1]"], "allow=[1e3]: there is no package 1e3 here"),
        (["allow=[ 'a,b' ,true]"], "allow=[a,b]: there is no package a,b here"),
        (["vary=[seed,1e3]"], "vary=[seed,1e3]: not known"),
        (["probe=[activations]", "probe.activations.layers=[1e3,0010]"], "layers=['1e3', '0010']: 1e3 is no norm"),
        (["optimizer.lr=0.1.2"], "optimizer.lr=0.1.2: a number is expected"),
        (["optimizer.lr=."], "optimizer.lr=.: a number is expected"),
        (["optimizer.lr=0010"], "optimizer.lr=0010: a number is expected"),
        (["data.limit='64'"], "data.limit='64': a whole number is expected, without quotes"),
        (["data.normalize='false'"], "data.normalize='false': true or false is expected, without quotes"),
        (["out='  '"], "out='  ': names no folder"),
        (["data=mnist", "data.root=' '"], "data.root=' ': names no folder"),
        (["seeds=0,1"], "seeds: there is no such setting (did you mean seed?)"),
        (["optimizer.lrr=0,1"], "optimizer.lrr: there is no such setting (did you mean optimizer.lr?)"),
        (["optimizer.learning_rate=1"], "(did you mean optimizer.lr?); the chosen optimizer has lr"),
        (["hydra.callbacks={a:1}"], "hydra.callbacks: Hydra has no such setting; correct the name, or write +hydra."),
        (["hydra.job.env_set.FOO=1"], "or write +hydra.job.env_set.FOO=... for a new one"),
        (["norm=dyt", "norm.alpha_init=1e-50"], "norm.alpha_init=1e-50: the tanh would be the same"),
        (["data=mnist", "data.root="], "data.root=: names no folder"),
        (["~norm.foo"], "norm.foo: there is no such setting; the chosen norm has eps, momentum"),
        (["norm.momentum.x=1"], "norm.momentum.x: there is no such setting (did you mean norm.momentum?)"),
        (["probe.shapes.layers=1"], "the probe shapes is not chosen; choose it by probe=[shapes]"),
        (["probe.shape.layers=1"], "there is no such probe (did you mean shapes?)"),
    ],
    ids=str,
)
def test_what_is_wrong_with_an_option_is_said_of_the_chosen_entry(words, text):
    with pytest.raises(UserError) as caught:
        check(composed(words))
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["~nosuchuser/q", "~'x"])
def test_the_path_that_is_proposed_for_a_name_with_a_tilde_can_be_given(name):
    with pytest.raises(UserError) as caught:
        composed([f"out={name}"])
    proposed = re.search("write (.*) for a folder", str(caught.value))[1]
    assert composed([f"out={shlex.split(proposed)[0]}"]).out == str(Path(name).absolute())


def test_the_entries_of_a_main_config_are_the_chosen_ones(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [train, override model: resnet, _self_]\n")
    with session(Source(tmp_path, "mine")):
        assert composed(["model.widths=[4,4,4,4]"]).model.widths == [4, 4, 4, 4]
        with pytest.raises(UserError, match="the chosen model has stem, blocks"):
            composed(["model.depth=3"])


@pytest.mark.parametrize(
    "before, new",
    [
        (["~norm.momentum", "+norm.momentum=0.2"], ["~norm.momentum"]),
        (["+optimizer.amsgrad=true"], ["~optimizer.amsgrad", "+optimizer.amsgrad=true"]),
        (["steps=3", "steps=2"], ["steps=3", "steps=2"]),
        (["seed=1", "seed=2"], ["seed=1"]),
        ([], ["~optimizer", "+optimizer=sgd"]),
        ([], ["~model"]),
    ],
    ids=str,
)
def test_rerun_is_train_also_where_a_word_is_repeated_or_a_group_is_taken_out(before, new, train):
    assert rerun_config(train(*TINY, *before), new)[0] == composed([*TINY, *before, *new])


@pytest.mark.parametrize("word", ["~norm.momentum", "+optimizer.amsgrad=true"])
def test_rerun_takes_a_stored_word_that_can_be_given_once_again(word, train):
    folder = train(*TINY, word)
    assert rerun_config(folder, [word])[0] == stored_config(folder)


@pytest.mark.parametrize("key", ["seed", "quiet", "device", "steps", "out"])
def test_a_setting_of_every_run_is_not_taken_out(key):
    with pytest.raises(UserError, match=f"^~{key}: a setting of every run, which cannot be taken out"):
        composed([f"~{key}"])


@pytest.mark.parametrize(
    "before, new",
    [
        (["norm=ghost", "norm.virtual_batch=4", "norm.eps=1e-3"], ["norm=library"]),
        (["~norm.momentum", "norm.eps=1e-3"], ["norm=rms"]),
        (["probe=[activations,gradients]", "probe.activations.every=1"], ["probe=[]"]),
        (["probe=[activations,gradients]", "probe.activations.every=1"], ["probe=[gradients]"]),
    ],
    ids=str,
)
def test_a_rerun_leaves_out_stored_options_that_the_entry_chosen_anew_lacks(before, new, train):
    cfg, words = rerun_config(train(*TINY, *before), new)
    assert cfg == composed([*TINY, *[word for word in before if "norm.eps" in word], *new])
    assert before[1 if "~" not in before[0] else 0] not in words


def test_rerun_keeps_what_somebody_wrote_into_the_folders_config(train):
    folder = train(*TINY, "optimizer.lr=0.2")
    text = (folder / "config.yaml").read_text(encoding="utf-8").replace("lr: 0.2", "lr: 0.3")
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    assert rerun_config(folder, [])[0].optimizer.lr == 0.3
    assert rerun_config(folder, ["optimizer.lr=0.7"])[0].optimizer.lr == 0.7
    assert rerun_config(folder, ["optimizer=sgd"])[0].optimizer._target_ == "torch.optim.SGD"


def test_rerun_without_a_status_repeats_the_config(train):
    folder = train(*TINY, "norm=scratch", "norm.eps=1e-3", "optimizer=sgd")
    (folder / "status.json").unlink()
    cfg, words = rerun_config(folder, ["seed=5"])
    assert words == ["seed=5"]
    assert (cfg.norm, cfg.optimizer, cfg.seed) == (stored_config(folder).norm, stored_config(folder).optimizer, 5)


def test_a_strangers_overrides_look_nothing_up_and_trust_nobody(train, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    folder = train(*TINY)
    status = (folder / "status.json").read_text(encoding="utf-8")
    for words in (
        ["allow=[os]"], ["out=/elsewhere"], ["hydra.verbose=true"],
        ["+model.a=${oc.env:SECRET}"], [r"+model.a=$\{oc.env:SECRET\}"],
        ["+model.a=$", "+model.b='${model.a}{oc.env:SECRET}'"],
        ["+model.a=$", "+model.b='{oc.env:SECRET}'", "+model.c='${model.a}${model.b}'"],
    ):  # fmt: skip
        text = status.replace('"steps=1"', ", ".join(map(json.dumps, words)))
        (folder / "status.json").write_text(text, encoding="utf-8")
        cfg, _ = rerun_config(folder, [])
        assert (cfg.allow, cfg.out) == ([], None) and "told" not in OmegaConf.to_yaml(cfg, resolve=True)


def test_a_run_may_be_resumed_where_data_and_devices_are_others(train):
    folder = train(*TINY)
    cfg = moved(folder, ["threads=2", "++deterministic=true", "allow=[numpy]"], "resume")
    assert (cfg.threads, cfg.deterministic, cfg.allow) == ("2", True, ["numpy"])


@pytest.mark.parametrize("word, told", [
    ("seed=1", "resume keeps the settings of the run and takes only device, data.root, data.resident, threads, "
               "deterministic, allow"),
    ("out=y", "resume keeps the settings of the run"),
    ("~threads", "resume keeps the settings of the run"),
    ("allow=mymod", r"a list of texts, written allow=\[a,b\], is expected"),
    ("allow=null", "a list of texts"),
    ("allow={a:1}", "a list of texts"),
    ("deterministic=maybe", "true or false is expected"),
    ("deterministic=null", "true or false is expected"),
    ("threads=null", "text is expected"),
    ("data.root=1e3", "the data of this run have no such option; leave it out"),
    ("allow=${seed}", r"\$\{...\} is not looked up by resume"),
    ("device=cpu,cuda", "one value is expected"),
])  # fmt: skip
def test_a_setting_that_resume_cannot_take_is_refused_in_words(word, told, tmp_path):
    (tmp_path / "config.yaml").write_text("{seed: 3, data: {_target_: bnexp.data.digits.Digits}}\n")
    with pytest.raises(UserError, match=f"^{re.escape(word)}: {told}"):
        moved(tmp_path, [word], "resume")


@pytest.mark.parametrize("name", ["nosuchpackage", "1", "torch.nn", "os:path"])
@pytest.mark.parametrize("command", ["train", "summary"])
def test_a_package_that_is_not_here_cannot_be_trusted(command, name, bnexp, capsys, tmp_path):
    assert bnexp(command, "model=mlp", f"allow=[{name}]") == 2
    assert f"allow=[{name}]: there is no package {name} here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_hparams_are_what_makes_the_variant():
    found = hparams(composed(["norm=group", "seed=4", "out=x"]))
    assert found["norm"] == "group" and found["norm.groups"] == 2
    assert not {"seed", "out", "quiet", "log_every"} & set(found)


def test_the_stored_config_is_utf8_whatever_the_locale(bnexp, tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "latin-1")
    assert bnexp("train", *TINY, "quiet=true", "out='läufe'") == 0
    assert "läufe" in (tmp_path / "läufe/config.yaml").read_bytes().decode("utf-8")
    assert stored_config(tmp_path / "läufe").batch_size == 16


@pytest.mark.parametrize(
    "word, text",
    [
        ("norm.=3", "norm. cannot be the name of a setting"),
        (".lr=3", ".lr cannot be the name of a setting (did you mean optimizer.lr?)"),
        ("optimizer..lr=3", "optimizer..lr cannot be the name of a setting (did you mean optimizer.lr?)"),
        ("out:=3", "out: cannot be the name of a setting (did you mean out?)"),
        ("a=b=c", "a: there is no such setting"),
        ("optimizer.lr=1e-3=", "optimizer.lr=1e-3=: a number is expected"),
        ("seed=0;", "seed=0;: a whole number"),
        ("norm=a=b", "norm=a=b: there is no such norm"),
        ("out=${x", "out=${x: what begins with ${ is not the name of a setting; write ${NAME}"),
        ("optimizer.betas=(0.9,0.999)", "a list is expected, as in optimizer.betas=[0.9,0.999]"),
        ("optimizer.betas=[0.9,0.99", "a list is expected, as in optimizer.betas=[0.9,0.999]"),
        ("schedule.milestones=(0.5,0.75)", "a list is expected, as in schedule.milestones=[0.5,0.75]"),
        ("data.limit=(5)", "a number or null is expected"),
        ("schedule.warmup_steps=a=b", "a whole number or null is expected"),
        ("out=x='${y}'", "${...} would be looked up; give another value"),
        ("out=a~", "the sign ~ in its value is read only in quotes; write \"out='a~'\""),
        ("out=file:~/x", "the sign ~ in its value is read only in quotes; write \"out='file:~/x'\""),
        ("data.root=a=b", "write \"data.root='a=b'\""),
        ("+optimizer.mine=a=b", "write \"+optimizer.mine='a=b'\""),
    ],
)
def test_only_a_word_that_can_work_is_proposed(word, text):
    assert text in unreadable(word)
    assert ('write "' in unreadable(word)) == ('write "' in text)


@pytest.mark.parametrize("key", ["out", "data.root"])
def test_no_quotes_are_proposed_for_a_path_that_is_refused_in_them(key):
    with pytest.raises(UserError, match=f"{key}=a/~/x: ~ is the home folder at the beginning only"):
        composed([f"{key}=a/~/x"])


def test_the_word_whose_lookup_fails_is_named():
    with pytest.raises(UserError, match=r"^cannot use out=\$\{nope\}: "):
        composed([*TINY, "out=${nope}"])
