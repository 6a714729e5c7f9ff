"""The pictures of influence: what is drawn, with which numbers, and that nothing in a sample's text can break them."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from lightning_slt.publish.charts import pixels
from lightning_slt.publish.influence_charts import cell_text, influence_figure, numbers_path
from lightning_slt.publish.render import Rendered, render_sample
from lightning_slt.publish.suspect_charts import SIDE, suspect_label, suspect_text, suspects_figure
from lightning_slt.publish.trajectory_charts import followed, spread, trajectories_figure
from tests.publish.helpers import make_influence, nothing_measured, picture_of, pictures_of

RED = "#c62828"
FRAMES = [(10 + 99 * (k % 10), 42 + 140 * (k // 10)) for k in range(20)]
"""Left upper corners of the suspects' frames."""


def texts(axes, gid=None):
    return [t.get_text() for t in axes.texts if gid is None or t.get_gid() == gid]


def numbers(axes):
    """The outlines of the numbers in cells: pale ones that may be zero, dark ones, all others."""
    return [p.get_path() for p in axes.patches if p.get_gid() == "numbers"]


def under_title(figure):
    return [t.get_text() for t in figure.texts if t is not figure._suptitle]


def heights(axes):
    """The bars of a histogram."""
    return axes.patches[0].get_data().values.tolist()


def hatched(axes):
    """The cells ``(row, column)`` that are marked as within their errors."""
    corners = [p.get_path().vertices[::5] for p in axes.patches if p.get_hatch()]
    return {(round(y + 0.5), round(x + 0.5)) for x, y in np.concatenate(corners)} if corners else set()


def widest_text(figure):
    """Left and right end of all that is written, in pixels."""
    figure.canvas.draw()
    boxes = [t.get_window_extent() for axes in figure.axes for t in [*axes.texts, axes.xaxis.label, axes.yaxis.label]]
    boxes += [t.get_window_extent() for t in [*figure.texts, figure._suptitle]]
    boxes = [b for b in boxes if b.width > 0]
    return min(b.x0 for b in boxes), max(b.x1 for b in boxes)


# --------------------------------------------------------------------------------------------------------- influence


def test_heat_map_has_the_group_matrix_and_hatches_what_may_be_zero():
    matrix = torch.tensor([[0.02, -0.001], [0.004, math.nan]], dtype=torch.float64)
    error = torch.tensor([[0.001, 0.001], [0.002, math.nan]], dtype=torch.float64)
    figure = influence_figure(
        make_influence(classes=2, groups=("cat", "dog"), group_matrix=matrix, group_se=error, step=1200)
    )
    left = figure.axes[0]
    (image,) = left.images
    np.testing.assert_array_equal(image.get_array().filled(math.nan), matrix.numpy())
    assert (image.norm.vmin, image.norm.vcenter, image.norm.vmax) == (-0.02, 0.0, 0.02)
    assert hatched(left) == {(0, 1), (1, 0)}
    for path, cells in zip(numbers(left), ([[0, 1], [1, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]), strict=True):
        expected = numbers_path(100 * matrix.numpy(), np.array(cells, dtype=bool))
        np.testing.assert_allclose(path.vertices, expected.vertices)
    assert "cells in units of 0.01" in left.get_title()
    assert texts(left, "column") == texts(left, "row") == ["cat", "dog"]
    below, beside, *scale = under_title(figure)[:5]
    assert (below, beside) == ("group of training samples", "group of queries")
    assert scale == ["0.02", "0", "-0.02"]
    assert figure.get_suptitle() == "step 1,200    Influence of 30 training samples on 6 queries"
    assert to_hex(figure._suptitle.get_color()) != RED
    assert pixels(figure).shape == (450, 1000, 4)


def test_numbers_of_hatched_cells_can_be_read():
    matrix = torch.tensor([[-1.0, 0.9], [-0.5, 0.1]], dtype=torch.float64)
    estimate = make_influence(classes=2, groups=("a", "b"), group_matrix=matrix, group_se=torch.ones_like(matrix))
    left = influence_figure(estimate).axes[0]
    assert hatched(left) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    written = {to_hex(p.get_facecolor()): p.get_path() for p in left.patches if p.get_gid() == "numbers"}
    for colour, cells in (("#ffffff", [[1, 1], [0, 0]]), ("#333333", [[0, 0], [1, 0]]), ("#6f6f6f", [[0, 0], [0, 1]])):
        expected = numbers_path(matrix.numpy(), np.array(cells, dtype=bool))
        np.testing.assert_allclose(written[colour].vertices, expected.vertices)


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1.0"), (-0.01, "0.0"), (-0.04, "0.0"), (0.0, "0.0"), (-0.06, "-0.1"), (-10.04, "-10.0")]
)
def test_no_cell_says_minus_nothing(value, text):
    assert cell_text(value) == text


def test_a_number_is_in_the_middle_of_its_cell_and_within_it():
    n = 12
    matrix = np.full((n, n), -9.8)
    middle = numbers_path(matrix, np.eye(n, dtype=bool)).vertices.reshape(n, -1, 2)
    for k in range(n):
        np.testing.assert_allclose(middle[k], middle[0] + k)
    low, high = middle[0].min(axis=0), middle[0].max(axis=0)
    assert (low > -0.5).all() and (high < 0.5).all()
    np.testing.assert_allclose(low + high, 0, atol=0.05)
    other = numbers_path(-matrix, np.eye(n, dtype=bool)).vertices
    assert len(other) < middle.size / 2  # without the minus
    assert numbers_path(matrix, np.zeros((n, n), dtype=bool)).vertices.shape == (0, 2)


def test_many_groups_have_no_numbers_and_not_every_name():
    left = influence_figure(make_influence(n=80, classes=40)).axes[0]
    assert numbers(left) == []
    assert texts(left, "column") == texts(left, "row") == [str(i) for i in range(0, 40, 2)]
    assert "units" not in left.get_title()


def test_names_of_many_groups_do_not_lie_on_each_other():
    figure = influence_figure(make_influence(n=60, classes=39, groups=tuple(f"group {k}" for k in range(39))))
    figure.canvas.draw()
    rows = [t.get_window_extent() for t in figure.axes[0].texts if t.get_gid() == "row"]
    assert len(rows) == 20 and all(low.y1 <= high.y0 for high, low in itertools.pairwise(rows))


def test_long_names_of_groups_keep_their_beginning():
    names = ("transportation_vehicle", "a name of several words", "short")
    left = influence_figure(make_influence(groups=names)).axes[0]
    assert texts(left, "column") == ["transportat…", "a name of s…", "short"]


def test_histogram_has_every_sample_with_self_influence():
    right = influence_figure(make_influence(n=30)).axes[1]
    assert sum(heights(right)) == 30 and right.get_xscale() == "log"
    edges = right.patches[0].get_data().edges
    assert min(edges) == pytest.approx(0.5) and len(heights(right)) == 39
    few = influence_figure(make_influence(n=3, self_influence=torch.tensor([0.15, 0.5, 0.9]).double())).axes[1]
    few.figure.canvas.draw()
    low, high = few.get_xlim()
    shown = [t.get_text() for t, at in zip(few.get_xticklabels(), few.get_xticks(), strict=True) if low <= at <= high]
    assert shown == ["0.2", "0.5"]  # no power of ten is among them
    some = influence_figure(make_influence(n=4, self_influence=torch.tensor([0.0, 1.0, 4.0, math.nan]).double()))
    assert sum(heights(some.axes[1])) == 2
    assert some.axes[1].get_title() == "2 samples have none"
    alike = influence_figure(make_influence(n=4, self_influence=torch.ones(4).double()))
    assert sum(heights(alike.axes[1])) == 4
    # one that hardly moves stays in the picture, in the first bar
    still = influence_figure(make_influence(n=3, self_influence=torch.tensor([1e-30, 1.0, 2.0]).double())).axes[1]
    assert sum(heights(still)) == 3 and still.get_xlim()[0] > 1e-14


def test_without_groups_the_losses_are_compared():
    estimate = make_influence(group_matrix=None, group_se=None, groups=(), train_group=None, query_group=None)
    left = influence_figure(estimate).axes[0]
    every, suspects = left.lines
    assert every.get_xdata().tolist() == estimate.init_loss.tolist()
    assert every.get_ydata().tolist() == estimate.mean_loss.tolist()
    assert suspects.get_ydata().tolist() == estimate.mean_loss[:20].tolist()
    assert suspects.get_label() == "20 suspects"
    few = influence_figure(make_influence(n=7, group_matrix=None, group_se=None, groups=(), train_group=None))
    assert few.axes[0].lines[1].get_label() == "7 suspects"
    assert (left.get_xlabel(), left.get_ylabel()) == ("loss at the weights", "posterior mean loss")


def test_what_passes_is_said_beside_what_chance_makes():
    def said(estimate):
        return under_title(influence_figure(estimate))[-1]

    whole = "4 chains of 25 readings; 0.6% of single pairs are above 3 standard errors (0.9% by chance)"
    assert said(make_influence()) == whole
    assert said(make_influence().without_pairs()) == whole
    unknown = make_influence().without_pairs().replace(known_passing=math.nan)
    assert said(unknown) == "4 chains of 25 readings"


def test_an_estimate_that_is_not_valid_is_red_and_says_why():
    figure = influence_figure(make_influence(valid=False, reasons=("they have not mixed", "4 readings are too few")))
    assert to_hex(figure._suptitle.get_color()) == RED
    assert under_title(figure)[-1:] == ["NOT VALID: they have not mixed; 4 readings are too few"]
    nothing = influence_figure(nothing_measured())
    assert not any(axes.axison or axes.images or axes.patches for axes in nothing.axes)
    assert under_title(nothing) == ["NOT VALID: no chain has stayed finite and local"]
    assert pixels(nothing).shape == (450, 1000, 4)


@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_a_matrix_without_numbers_is_drawn(fill):
    figure = influence_figure(make_influence(group_matrix=torch.full((3, 3), fill).double()))
    assert pixels(figure).shape == (450, 1000, 4)
    drawn = [len(path.vertices) for path in numbers(figure.axes[0])]
    nine = len(numbers_path(np.zeros((3, 3)), np.ones((3, 3), dtype=bool)).vertices)
    assert drawn == [0 if math.isnan(fill) else nine, 0, 0]


def test_two_lines_of_reasons_stand_above_the_title_of_the_heat_map():
    reasons = ("the chains have not reached their width in 200 steps: more draws (num_draws) or a longer burn-in",) * 2
    figure = influence_figure(make_influence(valid=False, reasons=reasons))
    pixels(figure)
    said, title = figure.texts[-1], figure.axes[0].title
    assert said.get_text().startswith("NOT VALID: ") and said.get_text().count("\n") == 1
    assert said.get_window_extent().y0 > title.get_window_extent().y1


# ----------------------------------------------------------------------------------------------------------- suspects


def test_suspects_in_the_order_of_a_run_say_so():
    estimate = make_influence(n=30, step=1200)
    over = estimate.replace(suspicion=torch.arange(30).double())
    said = "Likely wrong labels, ranked over all firings up to step 1,200"
    assert suspects_figure(over, {}).get_suptitle() == said
    assert suspects_figure(estimate, {}).get_suptitle() == "Likely wrong labels, ranked at step 1,200"
    unlabelled = suspects_figure(over.replace(train_group=None), {}).get_suptitle()
    assert unlabelled == "Likely wrong labels and outliers, ranked over all firings up to step 1,200"
    assert over.suspects(2) == [29, 28]


def test_suspects_are_shown_in_order_with_their_group_loss_and_plain_rank():
    estimate = make_influence(n=30, step=1200)
    figure = suspects_figure(estimate, pictures_of(estimate))
    sheet = figure.axes[0].images[0].get_array()
    assert [sheet[top + 44, left + 44].tolist() for left, top in FRAMES] == [
        [10 * k % 256] * 3 + [255] for k in range(20)
    ]
    assert figure.get_suptitle() == "Likely wrong labels, ranked at step 1,200"
    assert to_hex(figure._suptitle.get_color()) != RED
    assert to_hex(suspects_figure(make_influence(valid=False), {})._suptitle.get_color()) == RED


def test_what_stands_below_suspects_does_not_run_into_each_other():
    """Ranks up to 123,456 of samples whose losses have an exponent, with long names."""
    n = 123_456
    estimate = make_influence(n=n, num_queries=1).replace(
        mean_loss=torch.linspace(1.25e5, 1e-5, n).double(), train_group=("a long name",) * n, matrix=torch.empty(0, 0)
    )
    sheet = suspects_figure(estimate, {}).axes[0].images[0].get_array()
    for left, top in FRAMES:
        below = sheet[top + 89 : top + 118, :, :3]
        assert below[:, left + 10 : left + 80].min() < 128  # there is text
        if left > 10:
            assert below[:, left - 5].min() == 255  # and none half-way to the neighbour


def test_a_suspect_has_its_number_group_loss_and_plain_rank_below_it():
    estimate = make_influence(n=30)
    assert suspect_label(estimate, 0, 30) == "#0 “0”\n3 (plain rank 30)"
    assert suspect_label(estimate, 4, 26) == "#40 “1”\n2.9 (plain rank 26)"
    assert suspect_label(estimate.replace(train_group=None), 4, 26) == "#40\n2.9 (plain rank 26)"
    assert suspect_label(estimate.replace(train_group=("costs $5 or $6",) * 30), 1, 2).startswith("#10 “costs $5…”")
    sheet = suspects_figure(estimate, pictures_of(estimate)).axes[0].images[0].get_array()
    below = [sheet[top + SIDE + 3 : top + SIDE + 30, left : left + SIDE, :3] for left, top in FRAMES]
    assert all((label < 128).any() for label in below)
    # other numbers, other letters
    assert len({np.asarray(label).tobytes() for label in below}) == 20


def test_a_picture_keeps_its_shape_in_the_middle_of_its_frame():
    wide = Rendered("image", np.zeros((64, 512, 3), dtype=np.uint8), "")
    sheet = suspects_figure(make_influence(n=1, num_queries=1), {0: wide}).axes[0].images[0].get_array()
    left, top = FRAMES[0]
    black = (sheet[top : top + SIDE, left : left + SIDE, :3] == 0).all(axis=-1)
    rows, columns = np.nonzero(black)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (39, 49, 1, 87)


@pytest.mark.parametrize(("n", "height"), [(1, 190), (10, 190), (11, 330), (30, 330)])
def test_rows_of_ten_as_many_as_are_needed(n, height):
    figure = suspects_figure(make_influence(n=n, num_queries=1), {})
    sheet = figure.axes[0].images[0].get_array()
    assert pixels(figure).shape[:2] == sheet.shape[:2] == (height, 1000)
    framed = [top < height and (sheet[top, left : left + SIDE, :3] == 204).all() for left, top in FRAMES]
    assert framed == [k < n for k in range(20)]


def test_the_sheet_is_drawn_pixel_for_pixel():
    figure = suspects_figure(make_influence(n=30), pictures_of(make_influence(n=30)))
    below = pixels(figure)[42:]
    np.testing.assert_array_equal(below, figure.axes[0].images[0].get_array()[42:])


def test_text_and_samples_without_a_picture():
    assert suspect_text(Rendered("text", None, "words to be read"), 0) == "words to be\nread"
    assert suspect_text(None, 20) == "sample 20"
    estimate = make_influence(n=3)
    shown = {0: Rendered("text", None, "words to be read"), 10: picture_of(10)}
    sheet = suspects_figure(estimate, shown).axes[0].images[0].get_array()
    frames = [sheet[top + 1 : top + SIDE - 1, left + 1 : left + SIDE - 1, :3] for left, top in FRAMES[:3]]
    assert (frames[1] == 10).all()
    for text in (frames[0], frames[2]):
        dark = (text < 128).all(axis=-1)
        assert 20 < dark.sum() < 500 and not dark[40:].any()


def test_no_suspects_no_picture():
    assert suspects_figure(nothing_measured(), {}) is None


HOSTILE = [
    "$\\frac{1}{$",  # mathematics that is none
    "costs $5 or $6",
    "\\alpha_{",
    "日本語のテキスト 🙂",
    "‏עברית",
    "x" * 5000,
    "",
    "{'a': %s} %d %",
    "<b>bold</b>",
    "half \ud83d and \x00 nul",
]


def test_hostile_text_is_drawn_as_it_is_and_quietly():
    """No text is read as mathematics, none raises where it is drawn, none warns of letters that the font lacks."""
    shown = {10 * k: render_sample(text) for k, text in enumerate(HOSTILE)}
    groups = tuple(f"{text[:20]}" for text in HOSTILE)
    estimate = make_influence(
        n=10, train_group=groups, query_group=groups[:6], groups=groups[:3], reasons=("$\\bad{$",), valid=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        suspects = suspects_figure(estimate, shown)
        assert pixels(suspects).shape == (190, 1000, 4)
        assert pixels(influence_figure(estimate)).shape == (450, 1000, 4)
        history = [estimate, make_influence(n=10, step=200, train_group=groups)]
        assert pixels(trajectories_figure(history)).shape == (450, 1000, 4)
    assert suspect_text(shown[0], 0) == "$\\frac{1}{$"
    assert all(suspect_text(sample, k).count("\n") < 6 for k, sample in shown.items())


# -------------------------------------------------------------------------------------------------------- trajectories


def history(n=30, firings=4, changes=None):
    """Mean losses that stand still, but for those in ``changes``: sample -> values at the firings."""
    loss = 1.0 + torch.zeros(firings, n).double()
    for index, values in (changes or {}).items():
        loss[:, index // 10] = torch.tensor(values).double()
    return [make_influence(n=n, step=100 * (k + 1), mean_loss=loss[k]) for k in range(firings)]


def test_the_samples_that_changed_most_are_followed():
    """A change is the range over all firings, not the difference of the ends: one that came back counts."""
    found = followed(history(changes={70: [1, 1, 5, 1], 20: [3, 2, 1.5, 1], 250: [1, 1, 1, 1.5], 0: [9, 9, 9, 9]}), k=3)
    steps, index, loss, influence = found
    assert steps == [100, 200, 300, 400]
    assert index == [70, 20, 250]
    assert loss.T.tolist() == [[1, 1, 5, 1], [3, 2, 1.5, 1], [1, 1, 1, 1.5]]
    assert influence.T.tolist() == [[7.5] * 4, [2.5] * 4, [25.5] * 4]


def test_ten_are_followed_and_samples_alike_keep_their_order():
    assert followed(history())[1] == list(range(0, 100, 10))
    assert followed(history(n=4))[1] == [0, 10, 20, 30]


def test_only_samples_that_every_firing_has_can_be_followed():
    some = [make_influence(n=3, step=s, train_index=torch.tensor(i)) for s, i in ((1, [5, 6, 7]), (2, [8, 7, 6]))]
    _, index, loss, _ = followed(some)
    assert sorted(index) == [6, 7]
    first, second = (e.mean_loss for e in some)
    assert loss[:, index.index(7)].tolist() == [first[2], second[1]]
    other = some[1].replace(train_index=torch.tensor([1, 2, 3]))
    assert followed([some[0], other]) is None and trajectories_figure([some[0], other]) is None


def test_one_firing_has_no_trajectory_and_one_that_failed_does_not_count():
    assert followed(history(firings=1)) is None and trajectories_figure([]) is None
    assert trajectories_figure([nothing_measured(), make_influence()]) is None
    steps, *_ = followed([*history(firings=2), nothing_measured(300)])
    assert steps == [100, 200]


def test_trajectories_are_drawn_with_the_samples_numbers_at_their_ends():
    """Ten lines are told apart: by colour, the last two by their dashes."""
    changed = {10 * k: [1.0, 2.0 + k] for k in range(10)}
    figure = trajectories_figure(history(firings=2, changes=changed))
    left, right = figure.axes
    assert figure.get_suptitle() == "The 10 samples whose posterior mean loss changed most"
    assert [line.get_ydata().tolist() for line in left.lines] == [[1.0, 11.0 - k] for k in range(10)]
    assert [line.get_ydata().tolist() for line in right.lines] == [[9.5 - k, 9.5 - k] for k in range(10)]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in left.lines}
    assert len(looks) == 10
    assert texts(left) == [f"#{10 * k} “{k % 3}”" for k in range(10)]  # from below
    colour = {line.get_ydata()[-1]: line.get_color() for line in left.lines}
    assert [t.get_color() for t in left.texts] == [colour[2.0 + k] for k in range(10)]
    assert left.get_ylabel() == "posterior mean loss" and right.get_ylabel() == "self-influence"


def test_labels_of_lines_that_end_together_do_not_lie_on_each_other():
    long = ("a very long group",) * 30
    index = 20_000 + torch.arange(30)
    changes = {"self_influence": torch.ones(30).double(), "train_group": long, "train_index": index}
    same = [e.replace(**changes) for e in history(firings=3)]
    figure = trajectories_figure(same)
    pixels(figure)
    for axes in figure.axes:
        boxes = sorted((t.get_window_extent() for t in axes.texts), key=lambda b: b.y0)
        assert len(boxes) == 10
        assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
        frame = axes.get_window_extent()
        assert boxes[0].y0 > frame.y0 - 10 and boxes[-1].y1 < frame.y1 + 10
    low, high = widest_text(figure)
    assert low > 0 and high < 1000
    # nor on what is written beside the other axes
    left, right = figure.axes
    beside = [right.yaxis.label, *right.get_yticklabels()]
    assert max(t.get_window_extent().x1 for t in left.texts) < min(t.get_window_extent().x0 for t in beside)


def test_steps_of_trajectories_are_whole():
    some = [e.replace(step=k + 3) for k, e in enumerate(history(firings=2))]
    for axes in trajectories_figure(some).axes:
        ticks = axes.get_xticks()
        assert len(ticks) >= 2 and (ticks == ticks.round()).all()


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.3, 0.5, 0.52, 0.9], [0.3, 0.46, 0.56, 0.9]),
        ([0.0, 0.0, 0.0], [0.0, 0.1, 0.2]),
        ([1.0, 1.0, 1.0], [0.8, 0.9, 1.0]),
        ([0.95, 0.97], [0.9, 1.0]),
    ],
)
def test_labels_move_apart_as_little_as_possible(heights, expected):
    assert spread(heights, gap=0.1) == pytest.approx(expected)


def test_nothing_is_cut_off_at_the_edge_of_a_picture():
    names = tuple(f"group number {k}" for k in range(12))
    estimate = make_influence(n=36, classes=12, groups=names, train_group=names * 3, query_group=names[:6], step=10**6)
    for figure in (influence_figure(estimate), suspects_figure(estimate, pictures_of(estimate))):
        pixels(figure)
        low, high = widest_text(figure)
        assert low >= 0 and high <= 1000
        bottom = min(axes.get_tightbbox().y0 for axes in figure.axes)
        assert bottom >= 0
