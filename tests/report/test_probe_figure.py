"""Pages of what probes saw show the runs' own numbers, on axes that can be compared, and nothing overlaps."""

import itertools
import json
import math
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from bnexp.report.figures.landscape import FEWEST, LANDSCAPE
from bnexp.report.figures.probes import TITLES, draw_probes
from bnexp.report.figures.style import NORM_COLORS, render_figure
from bnexp.report.records import RunRecord, read_runs
from bnexp.report.report import make_report, write_comparison
from bnexp.report.variants import Variant
from bnexp.report.verdict import compare_records

STEPS = (100, 200, 300)


def record(seed=0, curves=None, histograms=None, status="finished", probe=None, norm="none"):
    """A run; ``histograms`` are {tag: [(step, edges, counts)]} as if probes.jsonl held them."""
    config = {"norm": {"_target_": f"bnexp.norms.{norm}.Norm"}, "seed": seed, "probe": probe}
    run = RunRecord(Path("r"), config, {"status": status}, curves or {})
    vars(run)["histograms"] = histograms or {}
    return run


def seen_by_activations(layers=("norm1",), scale=1.0, shift=0.0, steps=STEPS, last=300, saturation=0.25, **more):
    """A run with percentiles -scale, 0, scale (+ shift) times the layer's number, and a bell of that width."""
    curves, histograms = {}, {}
    for k, layer in enumerate(layers, 1):
        for name, value in (("p15", -scale), ("p50", 0.0), ("p85", scale)):
            curves[f"activation/{layer}/{name}"] = (list(steps), [k * value + shift] * len(steps))
        curves[f"activation/{layer}/saturation"] = (list(steps), [saturation] * len(steps))
        if not math.isfinite(scale):
            continue  # no histogram of nothing but what is not finite
        edges = np.linspace(-4, 4, 65) * k * scale + shift
        counts = [round(1e5 * math.exp(-(x**2) / 2)) for x in np.linspace(-4, 4, 64)]
        histograms[f"activation/{layer}"] = [(last, edges.tolist(), counts)]
    return record(curves=curves, histograms=histograms, **more)


def seen_by_landscape(losses, values, **more):
    """A run whose every number along the gradient is ``values`` at ``losses``."""
    steps = list(range(1, len(losses) + 1))
    curves = {f"landscape/{name}": (steps, list(values)) for name in LANDSCAPE}
    return record(curves={"landscape/loss": (steps, list(losses)), **curves}, **more)


def variant(label, *runs, diverged=()):
    return Variant(label, {}, list(runs), list(diverged))


def figures_of(*variants):
    """The figures, none of which was left out."""
    figures, notes = draw_probes(variants)
    assert notes == []
    return figures


def page_of(name, *variants):
    return figures_of(*variants)[name]


def caption(figure):
    """What is written below but for the line that names the runs, lines joined."""
    return " ".join(figure.get_supxlabel().splitlines()[1:])


def heads(figure):
    """Titles of the columns, lines joined."""
    titles = [axes.get_title("left") for axes in figure.axes if axes.get_subplotspec().is_first_row()]
    return [title.replace("\n", " ") for title in titles]


def layers_of(figure):
    """Names of the rows, lines joined."""
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_subplotspec().is_first_col()]
    return [label.replace("\n", "") for label in labels]


def lines(axes):
    return [line.get_xydata().tolist() for line in axes.lines]


def boxes(figure):
    """Every text that can be seen, with its place in pixels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks are boxes
        figure.draw_without_rendering()
    hidden = {tick.label1 for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
              for tick in axis.get_major_ticks() if not is_shown(tick, axis)}  # fmt: skip
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in hidden]
    assert any(text.get_text()[-1].isdigit() for text in texts)  # numbers on axes are among them
    return [(text.get_text(), text.get_window_extent()) for text in texts]


def is_shown(tick, axis):
    low, high = sorted(axis.get_view_interval())
    return tick.label1.get_visible() and low <= tick.get_loc() <= high


# Pre-activations


def test_without_readings_of_probes_nothing_is_drawn():
    assert figures_of() == {}
    assert figures_of(variant("none", record(curves={"loss/valid": ([1], [2.0])}))) == {}


def test_a_probe_that_looked_once_gives_a_note_instead_of_a_curve():
    once = seen_by_activations(steps=(100,), last=100)
    once.curves.update(seen_by_landscape([2.0], [1.0]).curves)
    figures, notes = draw_probes([variant("none", once, once), variant("library", record())])
    assert list(figures) == ["histograms"]
    assert [note.partition(":")[0] for note in notes] == ["No activations.png", "No landscape.png"]
    assert "probe.activations.every" in notes[0] and "probe.landscape.every" in notes[1]
    often = variant("library", seen_by_activations(), seen_by_landscape([2.0, 1.0], [1.0, 1.0]))
    figures, notes = draw_probes([variant("none", once), often])
    assert list(figures) == list(TITLES) and notes == []


def test_every_figure_names_the_runs():
    settings = {"model": {"_target_": "bnexp.models.mlp.MLP"}, "data": {"_target_": "bnexp.data.mnist.MNIST"}}
    run = seen_by_activations()
    run.curves.update(seen_by_landscape([2.0, 1.0], [1.0, 1.0]).curves)
    run.config.update(settings, batch_size=64)
    for figure in figures_of(variant("none", run)).values():
        assert figure.get_supxlabel().splitlines()[0] == "mlp on mnist, norm none, batch 64; 1 seed each"


def test_percentiles_of_every_layer_and_variant_are_three_lines():
    layers = ("norm1", "norm2")
    figure = page_of(
        "activations",
        variant("none", seen_by_activations(layers, scale=3.0)), variant("library", seen_by_activations(layers)),
    )  # fmt: skip
    assert len(figure.axes) == 4  # row by row
    for axes, size in zip(figure.axes, (3, 1, 6, 2), strict=True):
        assert lines(axes) == [[[step, y] for step in STEPS] for y in (-size, size, 0)]
    widths = [line.get_linewidth() for line in figure.axes[0].lines]
    assert widths[2] > max(widths[:2])  # the median


def test_the_panels_of_a_row_share_their_axis_and_rows_do_not():
    layers = ("norm1", "norm2")
    variants = [
        variant("none", seen_by_activations(layers, scale=3.0)),
        variant("library", seen_by_activations(layers)),
    ]
    upper, upper_right, lower, _ = page_of("activations", *variants).axes
    assert upper.get_ylim() == upper_right.get_ylim() != lower.get_ylim()
    upper, upper_right, lower, _ = page_of("histograms", *variants).axes
    assert upper.get_xlim() == upper_right.get_xlim() != lower.get_xlim()


def test_one_seed_is_shown_that_all_variants_have_and_the_caption_names_it():
    variants = [
        variant("none", *(seen_by_activations(scale=seed + 1.0, seed=seed) for seed in (0, 1))),
        variant("library", *(seen_by_activations(scale=seed + 5.0, seed=seed) for seed in (1, 2))),
    ]
    figure = page_of("activations", *variants)
    assert [lines(axes)[1][0][1] for axes in figure.axes] == [2.0, 6.0]
    assert caption(figure).startswith("Shown is seed 1, all units.")
    del variants[1].runs[0]
    figure = page_of("activations", *variants)
    assert [lines(axes)[1][0][1] for axes in figure.axes] == [1.0, 7.0]
    assert caption(figure).startswith("Shown is seed 0 and 2, all units.")


def test_the_caption_says_which_unit_was_looked_at():
    probe = {"activations": {"_target_": "bnexp.probes.activations.Activations", "unit": 3}}
    figures = figures_of(variant("none", seen_by_activations(probe=probe)))
    assert caption(figures["activations"]).startswith("Shown is seed 0, unit 3.")
    assert caption(figures["histograms"]).startswith("Unit 3, seeds pooled.")


@pytest.mark.parametrize("name", ["activations", "histograms"])
def test_of_many_layers_eight_are_shown_the_first_and_the_last_among_them(name):
    layers = [f"norm{i}" for i in range(1, 21)]
    figure = page_of(name, variant("none", seen_by_activations(layers)))
    assert layers_of(figure) == ["norm1", "norm4", "norm6", "norm9", "norm12", "norm15", "norm17", "norm20"]
    assert len(figure.axes) == 8
    assert "8 of 20 layers" in caption(figure) and "variants" not in caption(figure)


@pytest.mark.parametrize("name", ["activations", "histograms"])
def test_of_many_variants_the_first_six_are_shown(name):
    figure = page_of(name, *(variant(f"lr={i}", seen_by_activations([f"norm{i}"])) for i in range(8)))
    assert heads(figure) == [f"lr={i}" for i in range(6)]
    assert layers_of(figure) == [f"norm{i}" for i in range(6)]  # and only their layers
    assert "first 6 of 8 variants" in caption(figure) and "layers" not in caption(figure)


def test_an_explosion_leaves_the_calm_variant_visible_on_a_logarithmic_axis_that_the_caption_names():
    calm, wild = variant("library", seen_by_activations()), variant("none", seen_by_activations(scale=1e6))
    figure = page_of("activations", wild, calm)
    right = figure.axes[1]
    low, high = (right.transData.transform((0, y))[1] for y in (-1, 1))
    assert high - low > 0.1 * right.bbox.height
    assert "logarithmic" in caption(figure)
    ticks = figure.axes[0].yaxis.get_major_locator()()
    assert {-1e6, 0, 1e6} <= set(ticks) and 5 <= len(ticks) <= 12
    figure = page_of("activations", variant("none", seen_by_activations(scale=20.0)), calm)
    assert figure.axes[0].get_yscale() == "linear" and "logarithmic" not in caption(figure)


def test_pre_activations_far_below_one_are_flat_beside_those_of_size_one():
    figure = page_of(
        "activations", variant("none", seen_by_activations(scale=1e-6)), variant("library", seen_by_activations())
    )
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1.1)  # a margin of 5% of -1 to 1


def test_looks_that_were_not_finite_are_left_out():
    run = seen_by_activations()
    run.curves["activation/norm1/p85"][1][1] = math.nan
    (axes,) = page_of("activations", variant("none", run)).axes
    assert [[x for x, _ in line] for line in lines(axes)] == [[100, 300]] * 3


def test_a_variant_without_a_layer_says_so_in_its_panel():
    variants = [variant("none", seen_by_activations(("norm1", "norm2"))), variant("library", seen_by_activations())]
    for name in ("activations", "histograms"):
        is_empty = ["no readings" in [text.get_text() for text in axes.texts] for axes in page_of(name, *variants).axes]
        assert is_empty == [False, False, False, True]


def test_variants_have_the_colours_of_the_comparison_also_when_others_were_not_looked_at():
    library = variant("library", seen_by_activations(norm="library"))
    (axes,) = page_of("activations", variant("none", record()), library).axes
    assert {line.get_color() for line in axes.lines} == {NORM_COLORS["library"]}


def test_diverged_runs_are_shown_where_no_other_is_and_named_so():
    lost = seen_by_activations(scale=2.0, seed=1, status="diverged")
    figure = page_of(
        "activations", variant("none", diverged=[lost]), variant("library", seen_by_activations(), diverged=[lost])
    )
    assert [lines(axes)[1][0][1] for axes in figure.axes] == [2.0, 1.0]
    assert heads(figure) == ["none (diverged)", "library"]


# Histograms


def drawn(axes):
    """Counts and edges of the histogram in a panel, and the mean of its values."""
    patch = axes.patches[-1]
    counts, edges = patch.get_data().values, patch.get_data().edges
    return counts, edges, float(np.sum(counts * (edges[1:] + edges[:-1]) / 2) / np.sum(counts))


def test_a_histogram_is_the_last_one_of_all_seeds_together():
    first = seen_by_activations(shift=1.0)
    first.histograms["activation/norm1"].insert(0, (100, [90.0, 91.0], [7]))
    second = seen_by_activations(shift=2.0, scale=0.5, seed=1)
    (axes,) = page_of("histograms", variant("none", first, second)).axes
    counts, edges, mean = drawn(axes)
    total = sum(sum(run.histograms["activation/norm1"][-1][2]) for run in (first, second))
    assert counts.sum() == pytest.approx(total, rel=0.004)  # a thousandth may be cut off at either end
    assert mean == pytest.approx(1.5, abs=0.01)
    assert edges[0] < -1.5 and 3.5 < edges[-1] < 5


def test_a_histogram_says_how_much_was_saturated_when_it_was_taken():
    runs = [seen_by_activations(saturation=share, seed=seed) for seed, share in enumerate((0.2, 0.4))]
    for run in runs:
        run.histograms["activation/norm1"][0] = (200, *run.histograms["activation/norm1"][0][1:])
        run.curves["activation/norm1/saturation"][1][2] = math.nan  # a look that left no histogram
    figure = page_of("histograms", variant("none", *runs))
    assert [text.get_text() for text in figure.axes[0].texts] == ["30.0% saturated"]
    runs[0].curves["activation/norm1/saturation"][1][1] = math.nan
    (axes,) = page_of("histograms", variant("none", *runs)).axes
    assert [text.get_text() for text in axes.texts] == ["not all finite"]


def test_a_narrow_histogram_keeps_its_shape_beside_a_wide_one():
    axes = page_of(
        "histograms", variant("none", seen_by_activations(scale=20.0)), variant("library", seen_by_activations())
    ).axes
    for each, scale in zip(axes, (20, 1), strict=True):
        counts, edges, _ = drawn(each)
        middles = (edges[1:] + edges[:-1]) / 2
        spread = np.sqrt(np.sum(counts * middles**2) / np.sum(counts))
        assert spread == pytest.approx(scale, rel=0.03)  # bins and tails cost 1 to 2%
        assert np.count_nonzero(counts) > 40


def test_a_histogram_a_thousand_times_as_wide_leaves_the_picture_to_the_others_and_tells_its_range():
    left, right = page_of(
        "histograms", variant("none", seen_by_activations(scale=1e7)), variant("library", seen_by_activations())
    ).axes
    assert right.get_xlim()[1] < 5
    assert [text.get_text() for text in left.texts] == ["from -3e+07\nto 3e+07"]
    assert not left.patches and right.patches


def test_pages_of_percentiles_alone_are_drawn_without_histograms():
    run = seen_by_activations()
    vars(run)["histograms"] = {}
    assert list(figures_of(variant("none", run))) == ["activations"]


# Landscape


def cloud(axes):
    return [np.asarray(each.get_offsets()).tolist() for each in axes.collections]


def test_a_look_is_a_point_at_its_loss_which_falls_to_the_right():
    runs = [seen_by_landscape([2.0, 1.0], [0.5, 0.25], seed=0), seen_by_landscape([1.5, 0.5], [0.4, 0.1], seed=1)]
    figure = page_of("landscape", variant("none", *runs))
    assert len(figure.axes) == len(LANDSCAPE)
    for axes in figure.axes:
        assert cloud(axes) == [[[2.0, 0.5], [1.0, 0.25], [1.5, 0.4], [0.5, 0.1]]]
        left, right = axes.get_xlim()
        assert left > 2.0 > 0.5 > right
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_every_panel_shows_its_own_number():
    run = seen_by_landscape([2.0, 1.0], [1.0, 1.0])
    for k, name in enumerate(LANDSCAPE):
        run.curves[f"landscape/{name}"][1][:] = [10.0**k, 10.0**k]
    figure = page_of("landscape", variant("none", run))
    assert [cloud(axes)[0][0][1] for axes in figure.axes] == [1, 10, 100, 1000]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [title for title, _ in LANDSCAPE.values()]


def test_a_line_joins_medians_over_bins_of_the_loss_that_all_variants_share():
    losses = np.geomspace(2.0, 0.02, 60)
    variants = [
        variant("none", seen_by_landscape(losses, losses)),
        variant("library", seen_by_landscape(losses, 2 * losses)),
    ]
    axes = page_of("landscape", *variants).axes[0]
    none, library = (np.array(each) for each in lines(axes))
    assert none[:, 0].tolist() == library[:, 0].tolist()
    assert len(none) == 10 and np.all(np.diff(none[:, 0]) > 0)
    bounds = np.geomspace(0.02 / 1.02, 2.0 * 1.02, 11)
    expected = [np.median([x for x in losses if low <= x < high]) for low, high in itertools.pairwise(bounds)]
    assert none[:, 1] == pytest.approx(expected)
    assert library[:, 1] == pytest.approx(2 * none[:, 1])


def test_too_few_looks_at_about_one_loss_make_no_median():
    losses = [2.0] * FEWEST + [0.1] * (FEWEST - 1)
    axes = page_of("landscape", variant("none", seen_by_landscape(losses, losses))).axes[0]
    assert lines(axes) == [[[2.0, 2.0]]]


def test_points_that_a_logarithm_cannot_show_and_explosions_are_counted_in_the_caption():
    losses = [2.0, 1.0, 0.5, 1.5, 1e9, 1.2]
    values = [0.5, 0.0, 0.3, math.nan, 0.2, 1e9]
    figure = page_of("landscape", variant("none", seen_by_landscape(losses, values)))
    assert [cloud(axes) for axes in figure.axes] == [[[[2.0, 0.5], [0.5, 0.3]]]] * 4
    assert "beyond 1000 times the median: 16." in caption(figure)
    whole = variant("none", seen_by_landscape([2.0, 1.0], [1.0, 1.0]))
    assert "not shown" not in caption(page_of("landscape", whole))
    assert figures_of(variant("none", seen_by_landscape([2.0, 1.0], [0.0, math.inf]))) == {}


def test_variants_differ_without_colour_and_are_named_in_a_legend():
    losses = np.geomspace(2.0, 0.02, 60)
    variants = [variant(norm, record(norm=norm, curves=seen_by_landscape(losses, (i + 1) * losses).curves))
                for i, norm in enumerate(NORM_COLORS)]  # fmt: skip
    figure = page_of("landscape", *variants)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(NORM_COLORS)
    axes = figure.axes[0]
    assert len({line.get_marker() for line in axes.lines}) == len(NORM_COLORS)
    assert not axes.collections  # so many clouds would hide each other
    assert len(page_of("landscape", *variants[:4]).axes[0].collections) == 4


# Any page

LAYERS = [f"features.denseblock{i}.denselayer{j}.norm1" for i in range(2) for j in range(4)]


def looked_at(label, scale, layers, seeds=2):
    rates = np.geomspace(2.0, 0.02, 60)
    runs = []
    for seed in range(seeds):
        run = seen_by_activations(layers, scale=scale, seed=seed, steps=(10_000, 20_000, 40_000), last=40_000)
        run.curves.update(seen_by_landscape(rates, scale * rates).curves)
        runs.append(run)
    return variant(label, *runs)


CROWDS = {
    "usual": [("none", 4.0, ["norm1", "norm2"]), ("library", 1.0, ["norm1", "norm2"])],
    "alone": [("none", 1.0, ["norm1"])],
    "long names": [(f"library optimizer.lr=0.0001 norm.momentum=0.99{i}", 1.0, LAYERS[:2]) for i in range(7)],
    "explosions": [(f"none lr={10**i}", 10.0 ** (2 * i), LAYERS) for i in range(4)],
    "wide": [(f"none lr={10**i}", 30_000.0 * 2**i, LAYERS[:1]) for i in range(6)],
    "letters": [("$x_1^$", 1.0, ["批归一化"]), ("x" * 200, 1.0, ["w" * 60])],
}


@pytest.mark.parametrize("crowd", CROWDS.values(), ids=CROWDS)
def test_texts_do_not_overlap_and_stay_on_the_page_and_every_axis_has_numbers(crowd):
    for name, figure in figures_of(*(looked_at(*each) for each in crowd)).items():
        texts = boxes(figure)
        for text, box in texts:
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width, (name, text)
            assert box.y0 >= 0 and box.y1 <= figure.bbox.height, (name, text)
        for (one, a), (other, b) in itertools.combinations(texts, 2):
            # Boxes reach from the deepest descender to the highest ascender; two pixels of that are air.
            apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
            assert apart, (name, one, other)
        for axes in figure.axes:
            for axis in (axes.xaxis, *([] if name == "histograms" else [axes.yaxis])):
                low, high = sorted(axis.get_view_interval())
                assert sum(low <= x <= high for x in axis.get_major_locator()()) >= 2, name


def test_pages_are_1600_pixels_wide_and_alike_twice_in_both_formats():
    variants = [looked_at(*each) for each in CROWDS["alone"]]
    once, again = figures_of(*variants), figures_of(*variants)
    assert list(once) == list(TITLES)
    for name, figure in once.items():
        png = render_figure(figure, "png")
        assert struct.unpack(">I", png[16:20]) == (1600,)
        assert render_figure(again[name], "png") == png
        assert render_figure(again[name], "svg") == render_figure(figure, "svg")


ODD = {
    "one look": seen_by_activations(steps=(100,), last=100),
    "a constant": seen_by_activations(scale=0.0),
    "all NaN": seen_by_activations(scale=math.nan),
    "infinite": seen_by_activations(scale=math.inf),
    "huge": seen_by_activations(scale=1e300),
    "far from zero": seen_by_activations(shift=1e6, scale=1e-9),
    "one count": record(
        curves=seen_by_activations().curves, histograms={"activation/norm1": [(300, [1.0, 1.5, 2.0], [0, 1])]}
    ),
    "no count": record(curves=seen_by_activations().curves, histograms={"activation/norm1": [(300, [1.0, 2.0], [0])]}),
    "one point": seen_by_landscape([2.0], [1.0]),
    "loss alone": record(curves={"landscape/loss": ([1, 2], [2.0, 1.0])}),
    "one number lacks": record(
        curves={"landscape/loss": ([1, 2], [2.0, 1.0]), "landscape/smoothness": ([1, 2], [2.0, 1.0])}
    ),
}


@pytest.mark.parametrize("names", [*((name,) for name in ODD), tuple(ODD), tuple(reversed(ODD))], ids="+".join)
def test_odd_readings_are_drawn_without_a_warning(names):
    figures, _ = draw_probes([variant(name, ODD[name]) for name in names])
    for figure in figures.values():
        assert render_figure(figure, "png")


# In the report


def write_run(folder, norm, seed, probed, most=3):
    """A run folder, with up to ``most`` readings of probes if ``probed``."""
    folder.mkdir(parents=True)
    config = {"norm": {"_target_": f"bnexp.norms.{norm}.Norm"}, "seed": seed, "probe": None}
    run = looked_at("none", 1.0, ["norm1"]).runs[0] if probed else record()
    rows = [{"step": 100, "loss/valid": 0.5, "loss/train": 0.5, "accuracy/valid": 0.9}]
    for step in (10_000, 20_000, 40_000)[:most] if probed else ():
        curves = {tag: dict(zip(*curve, strict=True)) for tag, curve in run.curves.items() if "landscape" not in tag}
        rows.append({"step": step, **{tag: curve[step] for tag, curve in curves.items()}})
    for k, loss in enumerate((2.0, 1.0)[:most]) if probed else ():
        rows.append({"step": 50_000 + k, "landscape/loss": loss, **{f"landscape/{name}": loss for name in LANDSCAPE}})
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "status.json").write_text(json.dumps({"status": "finished", "overrides": [f"norm={norm}"]}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    looks = [(tag, *looks) for tag, each in run.histograms.items() for looks in each]
    lines = [json.dumps({"step": step, "tag": tag, "edges": e, "counts": c}) for tag, step, e, c in looks]
    if lines:
        (folder / "probes.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def comparison_of(tmp_path):
    def compared(probed):
        runs = tmp_path / str(probed)
        for norm in ("none", "library"):
            write_run(runs / norm, norm, 0, probed)
        return compare_records(*read_runs([runs]))

    return compared


FOUR = {"comparison.png", "comparison.svg", "comparison.json", "comparison.md"}
PICTURES = {f"{name}.{kind}" for name in TITLES for kind in ("png", "svg")}


def names(folder):
    return {each.name for each in folder.iterdir()}


def test_a_report_writes_and_shows_what_probes_saw(comparison_of, tmp_path):
    comparison = comparison_of(True)
    assert write_comparison(tmp_path / "out", comparison) == comparison
    assert names(tmp_path / "out") == FOUR | PICTURES
    text = (tmp_path / "out" / "comparison.md").read_text()
    for name, title in TITLES.items():
        assert f"## {title}\n\n![{title}]({name}.png)\n" in text
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / f"{name}.svg").read_bytes().lstrip().startswith(b"<?xml")


def test_a_report_without_probes_writes_four_files_and_mentions_no_probe(comparison_of, tmp_path):
    write_comparison(tmp_path / "out", comparison_of(False))
    assert names(tmp_path / "out") == FOUR
    assert (tmp_path / "out" / "comparison.md").read_text().count("![") == 1


def test_a_report_says_which_figure_it_left_out_and_why(tmp_path, capsys):
    for norm in ("none", "library"):
        write_run(tmp_path / "runs" / norm, norm, 0, probed=True, most=1)
    make_report([tmp_path / "runs"], out=tmp_path / "out")
    assert names(tmp_path / "out") == FOUR | {"histograms.png", "histograms.svg"}
    printed = capsys.readouterr().out
    for name in ("activations", "landscape"):
        assert f"No {name}.png: " in printed
        assert f"\n* No {name}.png: " in (tmp_path / "out" / "comparison.md").read_text()
    notes = json.loads((tmp_path / "out" / "comparison.json").read_text())["notes"]
    assert sum(note.startswith("No ") for note in notes) == 2


def test_pictures_of_an_earlier_report_are_taken_away_and_those_of_others_are_not(comparison_of, tmp_path):
    out = tmp_path / "out"
    write_comparison(out, comparison_of(True))
    write_comparison(out, comparison_of(False))
    assert names(out) == FOUR
    (out / "landscape.png").write_bytes(b"somebody's holiday")
    write_comparison(out, compare_records(*read_runs([tmp_path / "False"])))
    assert names(out) == {*FOUR, "landscape.png"}


def test_what_real_probes_yield_is_what_is_drawn(bnexp, tmp_path):
    arguments = (
        "norm=none,library seed=0 model=mlp model.hidden=[8,8] model.activation=tanh data.limit=64 batch_size=16"
    )
    arguments += " epochs=2 probe=[activations,landscape] probe.activations.every=2 probe.landscape.every=1 quiet=true"
    assert bnexp("compare", *arguments.split(), "threads=1", "out=c") == 0
    assert names(tmp_path / "c") >= FOUR | PICTURES
    comparison = compare_records(*read_runs([tmp_path / "c"]))
    figures = figures_of(*comparison.variants)
    assert len(figures["activations"].axes) == len(figures["histograms"].axes) == 4
    for name, figure in figures.items():
        for axes in figure.axes:
            assert "no readings" not in [text.get_text() for text in axes.texts], name
            assert axes.lines or axes.patches, name
    assert "not shown" not in caption(figures["landscape"])
