"""The figure shows every variant, named in its legend, and says what was trained, whatever the curves do."""

import itertools
import math
import struct
from pathlib import Path

import pytest

from bnexp.report.figures.curves import PANELS, curve_tags, draw_curves, mean_curve
from bnexp.report.figures.style import NORM_COLORS, describe_runs, norm_look, render_figure, variant_looks
from bnexp.report.records import RunRecord
from bnexp.report.variants import Variant, into_variants


def record(norm="none", seed=0, status="finished", curves=None, overrides=(), **settings):
    """A run of a norm; ``settings`` are those of its config."""
    config = {"norm": {"_target_": f"bnexp.norms.{norm}.Norm"}, "seed": seed, **settings}
    return RunRecord(Path("r"), config, {"status": status, "overrides": list(overrides)}, curves or {})


def variant(label, *curves, diverged=(), steps=(100, 200, 300), **parts):
    """A variant of one run per curve, with that curve under every tag; its norm is the first word of ``label``."""

    def runs(values, status):
        readings = [{tag: (list(steps), list(each)) for tag in PANELS} for each in values]
        return [record(label.split()[0], status=status, curves=curves) for curves in readings]

    return Variant(label, parts, runs(curves, "finished"), runs(diverged, "diverged"))


def panel(figure, tag):
    return figure.axes[list(PANELS).index(tag)]


def names(figure):
    """The legend's texts."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def caption(figure):
    return figure.get_supxlabel()


def crosses(axes):
    return [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "x"]


TWO = (
    variant("none", (0.9, 0.5, 0.4), (0.8, 0.6, 0.3)),
    variant("library", (0.7, 0.2, 0.1), (0.5, 0.3, 0.1)),
)


def test_a_line_is_the_mean_over_seeds_and_its_band_the_t_interval():
    axes = panel(draw_curves(TWO), "loss/valid")
    line = next(each for each in axes.lines if len(each.get_xdata()) == 3)
    assert list(line.get_xdata()) == [100, 200, 300]
    assert list(line.get_ydata()) == pytest.approx([0.85, 0.55, 0.35])
    low, high = axes.collections[0].get_paths()[0].get_extents().intervaly
    half = 12.706 * 0.05  # two values 0.1 apart at every step: standard error 0.05; one degree of freedom
    assert (low, high) == pytest.approx((0.35 - half, 0.85 + half), rel=1e-4)


def test_bands_of_accuracies_stay_within_0_and_1_and_those_of_losses_do_not():
    ends = (0.98, 0.01), (0.90, 0.20)  # of two seeds, at the first and at the second step
    two = variant("none", *ends, steps=(100, 200))
    assert mean_curve(two, "accuracy/valid")[2:].tolist() == [
        [pytest.approx(0.94 - 12.706 * 0.04, rel=1e-4), 0.0],
        [1.0, 1.0],
    ]
    assert mean_curve(two, "loss/valid")[3, 0] > 1


def test_seeds_that_agree_leave_no_gap_in_the_band():
    axes = panel(draw_curves([variant("none", (0.9, 0.5, 0.4), (0.9, 0.6, 0.4))]), "loss/valid")
    low, high = axes.collections[0].get_paths()[0].get_extents().intervalx
    assert (low, high) == (100, 300)


def test_a_mean_is_over_the_steps_that_all_seeds_have():
    short = variant("none", (0.9, 0.5, 0.4))
    short.runs.append(RunRecord(Path("r"), {}, {}, {"loss/valid": ([200], [0.7])}))
    axes = panel(draw_curves([short]), "loss/valid")
    assert [list(each.get_xydata()[0]) for each in axes.lines[:1]] == [[200, pytest.approx(0.6)]]


def test_both_files_are_made_1600_pixels_wide_and_alike_twice():
    figure = draw_curves(TWO)
    png, svg = render_figure(figure, "png"), render_figure(figure, "svg")
    assert struct.unpack(">I", png[16:20]) == (1600,)
    assert svg.lstrip().startswith(b"<?xml")
    assert render_figure(draw_curves(TWO), "svg") == svg
    assert render_figure(draw_curves(TWO), "png") == png


def test_neither_the_users_matplotlib_settings_matter_nor_do_ours_remain():
    import matplotlib

    expected = render_figure(draw_curves(TWO), "png")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert render_figure(draw_curves(TWO), "png") == expected
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("label", ["library", "library optimizer.lr=0.0001 norm.momentum=0.99 data.augment=flip"])
@pytest.mark.parametrize("num_variants", [1, 2, 9, 30])
def test_names_do_not_overlap_and_nothing_leaves_the_page(num_variants, label):
    figure = draw_curves([variant(f"{label}{i}", (0.5, 0.3, 0.2), lr=i) for i in range(num_variants)])
    (legend,) = figure.legends
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert len(boxes) == num_variants
    for a, b in itertools.combinations(boxes, 2):
        # Boxes reach from the deepest descender to the highest ascender; a fifth of them is air.
        assert a.x1 < b.x0 or b.x1 < a.x0 or abs(a.y0 - b.y0) > 0.8 * a.height
    tops = [axes.get_tightbbox() for axes in figure.axes]
    assert all(box.x0 > 0 and box.x1 <= figure.bbox.width for box in [*boxes, *tops])
    assert all(top.y1 < box.y0 + 1 for top in tops for box in boxes)
    assert min(axes.bbox.height for axes in figure.axes) > 300  # pixels
    below = figure._supxlabel.get_window_extent()
    assert below.y0 >= 0 and below.x1 <= figure.bbox.width
    assert all(below.y1 < top.y0 for top in tops)


def test_long_names_are_cut():
    (name,) = names(draw_curves([variant("x" * 150, (0.5, 0.4, 0.3))]))
    assert name == "x" * 99 + "…"


def test_a_norm_has_the_same_colour_in_every_figure_whatever_else_is_in_it():
    def colors(*labels):
        looks = variant_looks([variant(label, (0.5, 0.4, 0.3), lr=label) for label in labels])
        return {label.split()[0]: look["color"] for label, look in zip(labels, looks, strict=True)}

    few, many = colors("group", "none"), colors("none", "library", "group lr=1", "group lr=2", "own", "scratch")
    assert few == {norm: many[norm] for norm in few}
    assert colors("own") == {"own": many["own"]}
    assert len(set(many.values())) == 5
    assert len(set(NORM_COLORS.values())) == len(NORM_COLORS)


def test_every_norm_of_the_package_has_a_colour_of_its_own():
    norms = Path(__file__).parents[2] / "conf" / "norm"
    assert {each.stem for each in norms.glob("*.yaml")} - {"own"} == set(NORM_COLORS)


def test_settings_are_told_apart_by_dashes_which_norms_share():
    variants = [variant(f"{norm} lr={lr}", (0.5,), steps=(1,), norm=norm, lr=lr)
                for norm in ("none", "library", "group") for lr in (0.1, 1, 10)]  # fmt: skip
    looks = variant_looks(variants)
    assert [look["linestyle"] for look in looks[:3]] * 3 == [look["linestyle"] for look in looks]
    assert len({repr(look["linestyle"]) for look in looks}) == 3
    assert [len({look[key] for look in looks[:3]}) for key in ("color", "marker")] == [1, 1]
    assert len({look["marker"] for look in looks}) == 3  # for a printer without colours


@pytest.mark.parametrize("norms", [["library"], ["none", "library", "group"], ["own", "other", "third"]])
def test_thirty_variants_look_different(norms):
    variants = [variant(f"{norm} lr={i}", (0.5,), steps=(1,), norm=norm, lr=i)
                for norm in norms for i in range(30 // len(norms))]  # fmt: skip
    assert len(set(map(repr, variant_looks(variants)))) == 30
    same = [variant("library", (0.5,), steps=(1,)) for _ in range(30)]  # parts need not tell variants apart
    assert len(set(map(repr, variant_looks(same)))) == 30
    lines = draw_curves(variants).axes[0].lines
    drawn = {(line.get_color(), repr(line._unscaled_dash_pattern), line.get_marker()) for line in lines}
    assert len(drawn) == 30


def test_the_look_of_a_norm_is_not_a_matter_of_the_process():
    assert norm_look("own", 0) == {"color": "#332288", "linestyle": "-", "marker": "s"}


SETTINGS = {
    "model": {"_target_": "bnexp.models.lenet.LeNet"}, "data": {"_target_": "bnexp.data.mnist.MNIST", "limit": 2000},
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01}, "batch_size": 64, "epochs": 5, "steps": None,
}  # fmt: skip


def variants_of(*runs):
    return into_variants(runs)[0]


def test_the_caption_names_model_data_and_settings_that_all_runs_share():
    runs = [record(norm, seed, **SETTINGS) for norm in ("none", "library") for seed in range(3)]
    expected = "lenet on mnist, adam lr 0.01, batch 64, 5 epochs; 3 seeds each"
    assert describe_runs(variants_of(*runs)) == expected
    assert caption(draw_curves(variants_of(*runs))).splitlines()[0] == expected


def test_the_caption_leaves_out_what_differs_and_adds_what_was_set():
    overrides = ["norm=library", "data.limit=2000", "seed=0", "probe.activations.every=2", "optimizer.lr=0.1", "out=x"]
    slow, fast = ({**SETTINGS, "optimizer": {**SETTINGS["optimizer"], "lr": lr}} for lr in (0.1, 1))
    variants = variants_of(
        *(record("library", seed, overrides=[*overrides, "precision=bf16"], **slow) for seed in (0, 1)),
        record("library", 0, overrides=overrides, **fast),
    )  # fmt: skip
    assert describe_runs(variants) == (
        "lenet on mnist, norm library, adam, batch 64, 5 epochs, data.limit=2000; 1 to 2 seeds each"
    )


def test_the_caption_says_steps_where_they_end_the_run_and_copes_with_nothing():
    short = {**SETTINGS, "steps": 300}
    assert "batch 64, 300 steps; 1 seed each" in describe_runs(variants_of(record(**short)))
    assert "1 epoch;" in describe_runs(variants_of(record(**{**SETTINGS, "epochs": 1})))
    assert describe_runs([]) == ""
    assert describe_runs([variant("none", (0.5, 0.4, 0.3))]) == "norm none; 1 seed each"


def test_a_caption_of_many_settings_is_cut_after_two_lines():
    overrides = [f"model.setting_number_{i}=1" for i in range(60)]
    lines = caption(draw_curves(variants_of(record(overrides=overrides)))).splitlines()
    assert len(lines) == 2 and lines[-1].endswith("…")


def test_the_caption_explains_bands_and_crosses_only_where_there_are_any():
    assert "95%" in caption(draw_curves(TWO)) and "cross" not in caption(draw_curves(TWO))
    one = [variant("none", (0.5, 0.4, 0.3), diverged=[(0.5, 0.6, math.nan)])]
    assert "95%" not in caption(draw_curves(one)) and "cross" in caption(draw_curves(one))


def test_a_loss_that_explodes_is_cut_off_and_the_title_says_so():
    axes = panel(draw_curves([variant("none", (2.0, 1.0, 0.5)), variant("library", (2.0, 1e3, 1e6))]), "loss/train")
    low, high = axes.get_ylim()
    assert low < 0.5 and 2 < high < 100
    assert axes.get_title(loc="left") == "training loss (cut at 60)"
    assert names(axes.figure) == ["none", "library"]


def test_a_loss_over_many_magnitudes_is_drawn_on_a_logarithmic_axis_with_plain_numbers():
    figure = draw_curves([variant("none", (2.0, 0.1, 0.01))])
    assert panel(figure, "loss/valid").get_yscale() == "log"
    assert panel(figure, "accuracy/valid").get_yscale() == "linear"
    assert panel(draw_curves(TWO), "loss/valid").get_yscale() == "linear"
    labels = [text.get_text() for text in panel(figure, "loss/valid").get_yticklabels()]
    assert {"0.1", "1"} <= set(labels)


def test_a_wide_band_does_not_flatten_the_lines():
    # Two seeds: the band is 12.7 standard errors to either side, here 0.4 -+ 3.8.
    low, high = panel(draw_curves([variant("none", (0.9, 0.7, 0.7), (0.9, 0.7, 0.1))]), "loss/valid").get_ylim()
    assert high - low < 2 * (0.9 - 0.4)


def test_a_logarithmic_axis_is_as_wide_as_the_lines():
    # From 0.7 to 10 is too little for a logarithmic axis, though not with the room beside the lines.
    axes = panel(draw_curves([variant("none", (10.0, 3.0, 0.7))]), "loss/valid")
    assert axes.get_yscale() == "linear"


def test_a_diverged_run_is_a_line_of_its_own_that_ends_in_a_cross():
    lost = variant("library", diverged=[(0.5, 0.6, math.nan)])
    figure = draw_curves([TWO[0], lost])
    assert names(figure) == ["none", "library (1 diverged)"]
    assert crosses(panel(figure, "loss/valid")) == [[200, 0.6]]


def test_a_diverged_run_that_leaves_the_picture_gets_its_cross_at_the_top():
    lost = variant("library", diverged=[(0.5, 0.6, 1e5, 2e5)], steps=(100, 200, 300, 400))
    axes = panel(draw_curves([TWO[0], lost]), "loss/valid")
    assert crosses(axes) == [[300, axes.get_ylim()[1]]]


def test_of_more_than_a_hundred_readings_neighbours_are_averaged():
    steps = range(1, 251)
    line = draw_curves([variant("none", [0.1 * (step % 3) for step in steps], steps=steps)]).axes[0].lines[0]
    assert list(line.get_xdata()) == [*range(3, 251, 3), 250]
    assert list(line.get_ydata()[:-1]) == pytest.approx([0.1] * 83)


@pytest.mark.parametrize(
    "variants",
    [
        [],
        [variant("none")],
        [variant("none", (0.5, math.nan, 0.3))],
        [variant("none", (math.nan, math.nan, math.nan))],
        [variant("none", (0.5,), steps=(100,)), variant("library", (0.5,), steps=(100,))],
        [variant("none", (0.0, 0.0, 0.0)), variant("library", (0.0, 0.0, 0.0))],
        [variant("none", (-1.0, -2.0, -3.0))],
        [variant("$x_1^$", (0.5, 0.4, 0.3)), variant("批归一化", (0.5, 0.4, 0.3))],
        [variant("none", (0.5, 0.4, 0.3)), variant("library", (1.0, 1e300, 1e308))],
        [variant("none", diverged=[(math.nan, math.nan, math.nan)])],
    ],
    ids=["nothing", "no run", "gap", "all NaN", "one step", "zero", "negative", "letters", "huge", "lost"],
)
def test_odd_curves_are_drawn_without_a_warning(variants):
    figure = draw_curves(variants)
    assert render_figure(figure, "png").startswith(b"\x89PNG")
    assert render_figure(figure, "svg")


def test_a_panel_without_readings_says_so():
    bare = Variant("none", {}, [RunRecord(Path("r"), {}, {}, {"loss/valid": ([1], [2.0])})], [])
    figure = draw_curves([bare])
    assert [text.get_text() for text in panel(figure, "accuracy/train").texts] == ["no readings"]
    assert names(figure) == ["none"]


def test_training_is_drawn_as_evaluated_where_every_run_was():
    half, whole = variant("half", (0.9, 0.5, 0.4)), variant("whole", (0.9, 0.5, 0.4))
    for run in whole.runs:
        run.curves["loss/train_eval"] = run.curves["loss/train"]
    assert curve_tags([half, whole]) == list(PANELS), "a run without would be missing from the picture"
    assert curve_tags([whole])[0] == "loss/train_eval"
    assert draw_curves([whole]).axes[0].get_title(loc="left") == "training loss, evaluated"
