"""The figure shows every variant, named where its line ends, whatever the curves do."""

import math
import struct
from pathlib import Path

import pytest

from bnexp.report.figures.curves import COLORS, DASHES, PANELS, draw, look, render, spread, tags_of
from bnexp.report.records import RunRecord
from bnexp.report.variants import Variant


def variant(label, *curves, diverged=(), steps=(100, 200, 300)):
    """A variant of one run per curve, with that curve under every tag."""

    def runs(values, status):
        return [
            RunRecord(Path("r"), {}, {"status": status}, {tag: (list(steps), list(each)) for tag in PANELS})
            for each in values
        ]

    return Variant(label, {}, runs(curves, "finished"), runs(diverged, "diverged"))


def panel(figure, tag):
    return figure.axes[list(PANELS).index(tag)]


def names(axes):
    """Texts beside a panel with their places in pixels."""
    renderer = axes.figure.canvas.get_renderer()
    return {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}


TWO = (
    variant("none", (0.9, 0.5, 0.4), (0.8, 0.6, 0.3)),
    variant("library", (0.7, 0.2, 0.1), (0.5, 0.3, 0.1)),
)


def test_a_line_is_the_mean_over_seeds_and_its_band_the_t_interval():
    axes = panel(draw(TWO), "loss/valid")
    line = next(each for each in axes.lines if len(each.get_xdata()) == 3)
    assert list(line.get_xdata()) == [100, 200, 300]
    assert list(line.get_ydata()) == pytest.approx([0.85, 0.55, 0.35])
    low, high = axes.collections[0].get_paths()[0].get_extents().intervaly
    half = 12.706 * 0.05  # two values 0.1 apart at every step: standard error 0.05; one degree of freedom
    assert (low, high) == pytest.approx((0.35 - half, 0.85 + half), rel=1e-4)


def test_seeds_that_agree_leave_no_gap_in_the_band():
    axes = panel(draw([variant("none", (0.9, 0.5, 0.4), (0.9, 0.6, 0.4))]), "loss/valid")
    low, high = axes.collections[0].get_paths()[0].get_extents().intervalx
    assert (low, high) == (100, 300)


def test_a_mean_is_over_the_steps_that_all_seeds_have():
    short = variant("none", (0.9, 0.5, 0.4))
    short.runs.append(RunRecord(Path("r"), {}, {}, {"loss/valid": ([200], [0.7])}))
    axes = panel(draw([short]), "loss/valid")
    assert [list(each.get_xydata()[0]) for each in axes.lines[:1]] == [[200, pytest.approx(0.6)]]


def test_both_files_are_made_1600_pixels_wide_and_alike_twice():
    figure = draw(TWO)
    png, svg = render(figure, "png"), render(figure, "svg")
    assert struct.unpack(">I", png[16:20]) == (1600,)
    assert svg.lstrip().startswith(b"<?xml")
    assert render(draw(TWO), "svg") == svg
    assert render(draw(TWO), "png") == png


def test_neither_the_users_matplotlib_settings_matter_nor_do_ours_remain():
    import matplotlib

    expected = render(draw(TWO), "png")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert render(draw(TWO), "png") == expected
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("num_variants", [2, 5, 12, 30])
def test_names_do_not_overlap_and_stay_on_the_page_even_when_the_lines_coincide(num_variants):
    figure = draw([variant(f"variant lr={i}", (0.5, 0.3, 0.2)) for i in range(num_variants)])
    for axes in figure.axes:
        boxes = sorted(names(axes).values(), key=lambda box: box.y0)
        assert len(boxes) == num_variants
        for lower, upper in zip(boxes, boxes[1:], strict=False):
            # Boxes reach from the deepest descender to the highest ascender; a fifth of them is air.
            assert upper.y0 - lower.y0 > 0.8 * lower.height
        assert boxes[0].y0 > 0 and boxes[-1].y1 < figure.bbox.height
        assert all(axes.bbox.x1 < box.x0 and box.x1 < figure.bbox.width for box in boxes)


def test_names_do_not_reach_into_the_next_panel():
    figure = draw([variant("a label as long as nobody would ever want to read", (0.5, 0.4, 0.3))])
    left, right = figure.axes[:2]
    (box,) = names(left).values()
    assert box.x1 < right.bbox.x0 - 40  # pixels for the tick labels of the right panel
    assert next(iter(names(left))).endswith("…")


def test_names_stand_level_with_the_ends_of_lines_that_are_far_apart():
    axes = panel(draw(TWO), "accuracy/valid")
    for each, end in (("none", 0.35), ("library", 0.1)):
        box = names(axes)[each]
        assert (box.y0 + box.y1) / 2 == pytest.approx(axes.transData.transform((300, end))[1], abs=6)


def test_spread_moves_only_what_crowds_and_as_little_as_possible():
    assert spread([0, 50, 100], 10, 0, 100) == [0, 50, 100]
    assert spread([40, 50, 50], 10, 0, 100) == pytest.approx([110 / 3, 140 / 3, 170 / 3])
    assert spread([0, 0, 0], 10, 0, 100) == [0, 10, 20]
    assert spread([99, 100], 10, 0, 100) == [90, 100]
    assert spread([1, 2, 3], 80, 0, 100) == [0, 50, 100]
    assert spread([], 10, 0, 100) == []


def test_thirty_variants_look_different_in_colour_and_dashes():
    looks = [look(i) for i in range(31)]
    assert len(set(map(repr, looks))) == 31
    assert look(0)[0] not in COLORS
    assert len({repr(dashes) for _, dashes in looks[1:6]}) == len(DASHES)


def test_a_loss_that_explodes_is_cut_off_and_the_title_says_so():
    axes = panel(draw([variant("none", (2.0, 1.0, 0.5)), variant("library", (2.0, 1e3, 1e6))]), "loss/train")
    low, high = axes.get_ylim()
    assert low < 0.5 and 2 < high < 100
    assert axes.get_title(loc="left") == "training loss (cut at 60)"
    assert set(names(axes)) == {"none", "library"}


def test_a_loss_over_many_magnitudes_is_drawn_on_a_logarithmic_axis_with_plain_numbers():
    figure = draw([variant("none", (2.0, 0.1, 0.01))])
    assert panel(figure, "loss/valid").get_yscale() == "log"
    assert panel(figure, "accuracy/valid").get_yscale() == "linear"
    assert panel(draw(TWO), "loss/valid").get_yscale() == "linear"
    labels = [text.get_text() for text in panel(figure, "loss/valid").get_yticklabels()]
    assert {"0.1", "1"} <= set(labels)


def test_a_wide_band_does_not_flatten_the_lines():
    # Two seeds: the band is 12.7 standard errors to either side, here 0.4 -+ 3.8.
    low, high = panel(draw([variant("none", (0.9, 0.7, 0.7), (0.9, 0.7, 0.1))]), "loss/valid").get_ylim()
    assert high - low < 2 * (0.9 - 0.4)


def test_a_diverged_run_is_a_line_of_its_own_that_ends_in_a_cross():
    lost = variant("library", diverged=[(0.5, 0.6, math.nan)])
    axes = panel(draw([TWO[0], lost]), "loss/valid")
    assert "library" in names(axes)
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    place = axes.transAxes.transform(cross.get_xydata())[0]
    assert tuple(place) == pytest.approx(tuple(axes.transData.transform((200, 0.6))), abs=0.5)  # pixels


def test_a_diverged_run_that_leaves_the_picture_gets_its_cross_at_the_top():
    lost = variant("library", diverged=[(0.5, 0.6, 1e5)])
    axes = panel(draw([TWO[0], lost]), "loss/valid")
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    ((x, y),) = cross.get_xydata()
    assert y == pytest.approx(1)
    assert 2 / 3 < x < 1  # between steps 200 and 300


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
    figure = draw(variants)
    assert render(figure, "png").startswith(b"\x89PNG")
    assert render(figure, "svg")


def test_a_panel_without_readings_says_so():
    bare = Variant("none", {}, [RunRecord(Path("r"), {}, {}, {"loss/valid": ([1], [2.0])})], [])
    figure = draw([bare])
    assert [text.get_text() for text in panel(figure, "accuracy/train").texts] == ["no readings"]
    assert list(names(panel(figure, "loss/valid"))) == ["none"]


def test_training_is_drawn_as_evaluated_where_every_run_was():
    half, whole = variant("half", (0.9, 0.5, 0.4)), variant("whole", (0.9, 0.5, 0.4))
    for run in whole.runs:
        run.curves["loss/train_eval"] = run.curves["loss/train"]
    assert tags_of([half, whole]) == list(PANELS), "a run without would be missing from the picture"
    assert tags_of([whole])[0] == "loss/train_eval"
    assert draw([whole]).axes[0].get_title(loc="left") == "training loss, evaluated"
