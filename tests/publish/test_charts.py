import io
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from lightning_slt.publish import chains_figure, history_figure
from lightning_slt.publish.charts import pixels, png
from tests.publish.helpers import make_estimate

RED = "#c62828"


def test_one_line_for_each_chain_and_one_for_the_mean():
    estimate = make_estimate(num_chains=4, num_draws=50, step=1200)
    figure = chains_figure(estimate)
    left, right = figure.axes
    assert len(left.lines) == 5
    assert len(right.lines) == 5
    ends = sorted(float(line.get_ydata()[-1]) for line in left.lines if len(line.get_ydata()) == 50)
    assert ends == pytest.approx(sorted(estimate.per_chain.tolist()), rel=1e-5)
    band = left.patches[0].get_extents().transformed(left.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((11.02, 12.98))
    title = figure.get_suptitle()
    assert "1,200" in title and "LLC 12.0 ± 0.5" in title and "R-hat 1.010" in title
    assert left.patches[0].get_hatch() is None


def test_an_invalid_estimate_is_red_hatched_and_says_why():
    figure = chains_figure(make_estimate(bad_chains=1, reasons=("the chains have not mixed",)))
    left, right = figure.axes
    assert to_hex(figure._suptitle.get_color()) == RED
    assert any(t.get_text() == "NOT VALID: the chains have not mixed" for t in figure.texts)
    assert left.patches[0].get_hatch() == "//"
    assert sum(line.get_linestyle() == ":" for line in left.lines) == 1
    assert sum(line.get_marker() == "x" for line in right.lines) == 1


@pytest.mark.parametrize(
    "estimate",
    [
        make_estimate(mean=math.nan, se=math.nan, rhat=math.nan, ess=math.nan, bad_chains=4, step=None),
        make_estimate(num_draws=0),
        make_estimate(num_chains=1, num_draws=1),
    ],
    ids=["nothing finite", "no draws", "one draw"],
)
def test_degenerate_estimates_are_drawn(estimate):
    assert pixels(chains_figure(estimate)).shape == (450, 1000, 4)
    assert pixels(history_figure([estimate])).shape == (450, 1000, 4)


def test_history_marks_invalid_points_and_passes_them_by():
    estimates = [make_estimate(mean=float(k), step=100 * k, valid=k != 3) for k in (4, 1, 2, 3)]
    estimates.append(make_estimate(mean=math.nan, step=500, valid=False))
    top, bottom = history_figure(estimates).axes
    line = next(x for x in top.lines if x.get_label() == "LLC ± 1.96 se")
    assert line.get_xdata().tolist() == [100, 200, 400]
    assert line.get_ydata().tolist() == [1.0, 2.0, 4.0]
    hollow = next(x for x in top.lines if x.get_label() == "not valid")
    assert hollow.get_xydata().tolist() == [[300.0, 3.0]]
    assert to_hex(hollow.get_color()) == RED and hollow.get_markerfacecolor() == "white"
    assert next(x for x in top.lines if x.get_label() == "no estimate").get_xdata().tolist() == [500]
    assert len(bottom.lines) == 1
    assert top.get_xlim() == bottom.get_xlim()


def test_many_points_leave_the_band_to_be_seen_and_the_lines_as_dark():
    def drawn(count):
        estimates = [make_estimate(num_draws=2, step=k, valid=k != 7) for k in range(count)]
        return history_figure(estimates).axes

    for few, many in zip(drawn(20), drawn(1000), strict=True):
        assert few.lines[0].get_marker() == "o" and few.lines[0].get_markersize() >= 4
        assert many.lines[0].get_marker() == ""
        assert many.lines[0].get_color() == few.lines[0].get_color()
        assert many.lines[0].get_linewidth() == few.lines[0].get_linewidth()
    (hollow,) = [line for line in drawn(1000)[0].lines if line.get_label() == "not valid"]
    assert hollow.get_marker() == "o" and hollow.get_markersize() >= 4


def test_the_one_valid_point_of_many_is_marked():
    top, _ = history_figure([make_estimate(num_draws=2, step=k, valid=k == 7) for k in range(300)]).axes
    assert top.lines[0].get_marker() == "o" and top.lines[0].get_markersize() == 5


def test_an_estimate_alone_has_its_error_in_the_history():
    alone = make_estimate(mean=12.0, se=0.5, step=200)
    top, _ = history_figure([make_estimate(mean=math.nan, step=100, valid=False), alone]).axes
    bars = [path.vertices.tolist() for each in top.collections for path in each.get_paths()]
    assert [[200.0, 12.0 - 0.98], [200.0, 12.0 + 0.98]] in bars


def test_long_reasons_stay_within_the_picture():
    reasons = ("chains wandered: mean motion was much more than a minimum allows, near 1,000 momenta",) * 4
    figure = chains_figure(make_estimate(reasons=reasons))
    pixels(figure)
    for text in figure.texts:
        assert text.get_window_extent().x1 < 1000


def test_points_beyond_the_frame_are_marked_on_it():
    estimates = [
        make_estimate(mean=float(m), step=100 * k, valid=k > 2) for k, m in enumerate((-90, -80, 500, 5, 6, 7))
    ]
    top, _ = history_figure(estimates).axes
    marks = {x.get_label(): x.get_xdata().tolist() for x in top.lines}
    assert marks["not valid, below the frame"] == [0, 100]
    assert marks["not valid, above the frame"] == [200]
    assert sorted(text.get_text() for text in top.texts) == ["500", "−80", "−90"]
    heights = {text.get_text(): text.xyann[1] for text in top.texts}
    assert heights["−90"] == heights["−80"] == -heights["500"] > 0, "they are far enough from each other"


def test_the_legend_of_the_history_names_what_there_is():
    def said(**changes):
        top, _ = history_figure([make_estimate(step=100, **changes)]).axes
        return [text.get_text() for text in top.get_legend().get_texts()]

    assert (said(valid=False), said()) == (["not valid"], ["LLC ± 1.96 se"])


def test_values_beyond_the_frame_are_written_where_they_are_few_and_apart_where_they_are_close():
    def drawn(count):
        steps = [*range(count), 900, 1000]
        figure = history_figure(
            [make_estimate(mean=9.0 if s > 800 else -90.0 - s, step=s, valid=s > 800) for s in steps]
        )
        pixels(figure)
        return figure.axes[0]

    texts = drawn(5).texts
    boxes = [text.get_window_extent() for text in texts]
    assert [text.get_text() for text in texts] == ["−90", "−91", "−92", "−93", "−94"]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not drawn(6).texts


def test_the_value_beyond_the_frame_at_the_last_step_stays_in_the_picture():
    figure = history_figure(
        [make_estimate(mean=9.0, step=s) for s in (10, 20)] + [make_estimate(-1e5, step=30, valid=False)]
    )
    pixels(figure)
    (text,) = figure.axes[0].texts
    assert text.get_text() == "−100,000" and text.get_window_extent().x1 < 1000


def test_the_frame_is_widened_to_what_is_not_valid_within_its_height_and_to_no_more():
    def limits(bad):
        good = [make_estimate(mean=m, se=0.0, step=s) for m, s in ((4.0, 20), (8.0, 30))]
        return history_figure([make_estimate(mean=bad, step=10, valid=False), *good]).axes[0].get_ylim()

    assert limits(0.5)[0] < 0.5 and limits(11.5)[1] > 11.5
    low, high = limits(-16.0)
    assert 2.8 < low < 3.5 and high < 8.5, "a little room for the mark"


@pytest.mark.parametrize(
    ("steps", "scale"),
    [([1, 10, 100, 1000], "log"), (range(100, 20_100, 100), "linear"), ([10, 20, 30], "linear"), ([], "linear"),
     ([0, 1, 10, 100, 1000], "symlog")],
)  # fmt: skip
def test_the_axis_is_logarithmic_only_for_log_spaced_steps(steps, scale):
    top, bottom = history_figure([make_estimate(num_draws=2, step=s) for s in steps]).axes
    assert top.get_xscale() == bottom.get_xscale() == scale


def test_a_png_is_what_was_drawn():
    figure = chains_figure(make_estimate(num_draws=5))
    read = np.asarray(Image.open(io.BytesIO(png(figure))))
    assert read.shape == (450, 1000, 3)
    assert (read == pixels(figure)[..., :3]).all()
    assert pixels(figure) is pixels(figure)


def test_the_users_pyplot_is_left_alone():
    code = (
        "import sys; from lightning_slt.publish.charts import chains_figure, history_figure, png;"
        "from tests.publish.helpers import make_estimate as m;"
        "was = 'matplotlib.pyplot' in sys.modules;"
        "png(chains_figure(m())); png(history_figure([m()]));"
        "assert was or 'matplotlib.pyplot' not in sys.modules;"
        "import matplotlib; import matplotlib.pyplot as plt; assert plt.get_fignums() == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("steps", [[7], range(1, 20), [0, 1], range(1000, 9000, 1000)])
def test_ticks_of_the_history_are_whole_steps(steps):
    figure = history_figure([make_estimate(num_draws=2, step=step) for step in steps])
    pixels(figure)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert shown and all(tick == round(tick) for tick in shown)


def test_one_estimate_is_one_in_the_title_of_the_history():
    assert history_figure([make_estimate(step=1)]).get_suptitle() == "Local learning coefficient: 1 estimate"
    two = [make_estimate(step=k) for k in (1, 2)]
    assert history_figure(two).get_suptitle() == "Local learning coefficient: 2 estimates"
