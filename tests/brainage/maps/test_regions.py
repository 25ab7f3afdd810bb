"""Every figure of the tables on hand-worked heads, and against scipy."""

import numpy as np
import pytest
from scipy import sparse, stats

from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.measured import Measured
from emoe_med.brainage.maps.nulls import family_p, fdr, parcel_means, rotations, shuffles, upper_p
from emoe_med.brainage.maps.parcels import ParcelCounts, Parcels
from emoe_med.brainage.maps.regions import RegionStatistics, age_slope, laterality
from emoe_med.brainage.maps.routes import Routes, joined

GRID = CellGrid(16.0, 1, 1, 3)  # a cell is a voxel: 10 x 12 x 10


def heads_with(parcels, experts, ages=None, contribution=None):
    """Route heads as [N, C] experts say, with one label volume [C] for all."""
    count = ParcelCounts(Parcels("labels", {1: "one", 2: "two"}, GRID))
    shape = GRID.shape
    for _ in experts:
        count.count(np.asarray(parcels).reshape(shape), np.ones(shape, bool))
    expert = np.asarray(experts, np.int16)[..., None]
    known = {} if ages is None else {"age": np.asarray(ages, float)}
    if contribution is not None:
        known |= {"contribution": contribution, "contribution_of": np.arange(len(contribution))}
    return Routes.of(expert, np.ones(expert.shape, np.float32), int(expert.max()) + 1, **known), count


def left_right():
    """Labels: 1 left, 2 right; only the cells of one slice are labelled."""
    labels = np.zeros(GRID.shape, int)
    labels[:5, 6, 5], labels[5:, 6, 5] = 1, 2
    return labels.ravel()


def test_occupancy_enrichment_share_and_side_by_hand():
    labels = left_right()
    base = np.zeros(1200, int)
    one = base.copy()
    one[labels == 1] = 1  # expert 1 serves all of parcel 1, in the first head
    two = base.copy()
    two[np.flatnonzero(labels == 1)[:1]] = 1  # and a fifth of it in the second
    routes, counts = heads_with(labels, [one, two])
    table = RegionStatistics(routes, counts, GRID, draws=99).regions().set_index(["parcel", "expert"])
    assert table.loc[(1, "E01"), "occupancy"] == pytest.approx(0.6)
    assert table.loc[(2, "E01"), "occupancy"] == 0
    load = 6 / 2400
    assert table.loc[(1, "E01"), "enrichment"] == pytest.approx(0.6 / load)
    assert table.loc[(1, "E01"), "share_of_mass"] == pytest.approx(1)
    assert table.loc[(2, "E00"), "share_of_mass"] == pytest.approx(10 / 2394)
    assert table.loc[(1, "E01"), "laterality"] == table.loc[(2, "E01"), "laterality"] == pytest.approx(1)
    assert table.loc[(1, "E00"), "laterality"] == pytest.approx((0.4 - 1) / 1.4)
    assert table.loc[(1, "E01"), "n_voxels"] == 5
    assert table.loc[(1, "E01"), "covered"] == 1
    assert table["name"].unique().tolist() == ["one", "two"]


def test_contribution_is_the_mean_over_the_parcel():
    labels = left_right()
    change = np.zeros((2, 1200, 2))
    first = np.flatnonzero(labels == 1)
    change[0, first, 0] = [1, 2, 3, 0, -1]
    change[1, first, 0] = -1
    routes, counts = heads_with(labels, [np.arange(1200) % 2] * 2, ages=[70, 50], contribution=change)
    tables = RegionStatistics(routes, counts, GRID, draws=99)
    signed = tables.regions().set_index(["parcel", "expert"])["contribution"]
    assert signed[(1, "E00")] == pytest.approx((1 - 1) / 2)
    assert signed[(1, "E01")] == 0
    row = tables.parcels().set_index("parcel").loc[1]
    # the SD of two heads is their difference over the root of 2: [1, 2, 3, 0, -1] and -1
    assert row["contribution"] == pytest.approx((2 + 3 + 4 + 1 + 0) / 2**0.5 / 5)
    assert row["contribution_ratio"] == pytest.approx(row["contribution"] / (10 / 2**0.5 / 1200))
    assert row["contribution_p"] < 0.05  # all of it is here
    # 20 years between them
    assert row["contribution_per_decade"] == pytest.approx((2 + 3 + 4 + 1 + 0) / 2 / 5)
    assert row["contribution_per_decade_p"] < 0.05
    assert 0 <= row["contribution_low"] <= row["contribution"] <= row["contribution_high"] + 1e-9


def test_a_region_of_its_own_is_found_and_chance_is_not():
    rng = np.random.default_rng(0)
    centres = GRID.centres_mm
    inside = ((centres - centres.mean(0)) ** 2 / np.array([60, 75, 60.0]) ** 2).sum(1) < 1
    region = inside & (((centres - [-30, -40, 20]) ** 2).sum(1) < 30**2)
    other = inside & (((centres - [30, 10, 0]) ** 2).sum(1) < 30**2)
    labels = np.where(region, 1, np.where(other, 2, 0))
    experts = []
    for _ in range(12):
        drawn = rng.integers(4, size=1200)
        drawn[region] = np.where(rng.random(region.sum()) < 0.9, 3, drawn[region])
        drawn[~inside] = -1
        experts.append(drawn)
    routes, counts = heads_with(labels, experts)
    table = RegionStatistics(routes, counts, GRID, draws=99).regions().set_index(["parcel", "expert"])
    assert table.loc[(1, "E03"), "p"] < 0.05
    assert table.loc[(1, "E03"), "q"] < 0.2
    assert table.loc[(2, "E03"), "p"] > 0.05
    assert table.loc[(1, "E00"), "p"] > 0.5


def test_shuffles_keep_the_load_and_rotations_keep_the_cells():
    rng = np.random.default_rng(0)
    routed = np.arange(1200) % 3 > 0
    index = shuffles(routed, 4, rng)
    assert (np.sort(index[:, routed], axis=1) == np.flatnonzero(routed)).all()
    assert (index[:, ~routed] == np.flatnonzero(~routed)).all()
    assert not np.array_equal(index[0], index[1])
    turned = rotations(GRID.centres_mm, routed, 4, rng)
    assert routed[turned[:, routed]].all()
    # a smooth pattern stays smooth: neighbours in x come from neighbours
    full = rotations(GRID.centres_mm, np.ones(1200, bool), 4, rng)
    field = np.sin(GRID.centres_mm / 60).sum(1)
    smooth = field[full].reshape(4, *GRID.shape)
    assert np.abs(np.diff(smooth, axis=1)).mean() < 0.4 * field.std()


def test_moved_parcel_means_by_hand():
    weights = sparse.csr_array(np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 4.0]]))
    values = np.array([[3.0], [6.0], [9.0]])
    index = np.array([[0, 1, 2], [2, 0, 1]])
    found = parcel_means(weights, values, np.array([True, True, False]), index)
    # as it is: (2*3 + 6) / 3, and parcel 2 lies in a cell that was not routed
    np.testing.assert_allclose(found[0, :, 0], [4, np.nan])
    # moved: cell 0 takes a cell without a value, cell 1 takes 3
    np.testing.assert_allclose(found[1, :, 0], [3, np.nan])


def test_p_values_and_fdr():
    null = np.array([[0.0], [1.0], [2.0], [3.0]])
    assert upper_p(np.array([2.5]), null)[0] == pytest.approx(2 / 5)
    assert upper_p(np.array([2.0]), null)[0] == pytest.approx(3 / 5)  # a tie counts against the finding
    p = np.array([0.01, np.nan, 0.04, 0.03])
    np.testing.assert_allclose(fdr(p), [0.03, np.nan, 0.04, 0.04])


def test_one_finding_among_many_is_seen_by_the_largest_of_each_draw():
    """A lone finding: the false discovery rate of 400 tests with 199 draws cannot fall below 1, this can."""
    rng = np.random.default_rng(0)
    null = rng.normal(size=(199, 100, 4)) * np.linspace(0.1, 9, 100)[None, :, None] + 3
    observed = null[0].copy()
    observed[7, 2] = 3 + 8 * null[:, 7, 2].std()
    observed[50, 1] = np.nan
    found = family_p(observed, null[1:])
    assert found[7, 2] == pytest.approx(1 / 199)
    assert fdr(upper_p(observed, null[1:]))[7, 2] > 0.5
    assert np.isnan(found[50, 1])
    assert np.nanmin(np.delete(found.ravel(), 7 * 4 + 2)) > 0.05
    by_hand = np.array([[0.0, 10.0], [1.0, 20.0], [2.0, 60.0]])  # spreads 0.816 and 21.6, means 1 and 30
    # in such units the draws reach 1.22 -> their larger ones are -0.93, 0, 1.39
    assert family_p(np.array([1.0, 59.0]), by_hand).tolist() == [3 / 4, 2 / 4]


def test_a_run_that_routes_otherwise_does_not_hide_a_slope():
    """Two runs with loads far apart, each with the same fall on age."""
    labels, rng = left_right(), np.random.default_rng(0)
    cells = np.flatnonzero(labels == 1)
    experts, ages, runs = [], [], []
    for head in range(40):
        run, age = head % 2, 30.0 + head
        ages, runs = [*ages, age], [*runs, f"seed0-fold{run}"]
        drawn = np.zeros(1200, int)
        served = (1 if age < 50 else 0) + 3 * run + int(rng.random() < 0.3)
        drawn[cells[:served]] = 1
        experts.append(drawn)
    routes, counts = heads_with(labels, experts, ages=ages)
    pooled = RegionStatistics(routes, counts, GRID, draws=9).regions().set_index(["parcel", "expert"]).loc[(1, "E01")]
    routes.run = np.array(runs)
    within = RegionStatistics(routes, counts, GRID, draws=9).regions().set_index(["parcel", "expert"]).loc[(1, "E01")]
    assert within["slope_p"] < 1e-3 < pooled["slope_p"]
    value = np.array([(expert[cells] == 1).mean() for expert in experts])
    design = np.column_stack([np.array(ages) / 10, np.arange(40) % 2 == 0, np.arange(40) % 2 == 1]).astype(float)
    expected, squares, *_ = np.linalg.lstsq(design, value, rcond=None)
    assert within["slope_per_decade"] == pytest.approx(expected[0])
    error = np.sqrt(squares[0] / 37 * np.linalg.inv(design.T @ design)[0, 0])
    assert within["slope_high"] - within["slope_per_decade"] == pytest.approx(stats.t.ppf(0.975, 37) * error)


def test_laterality_by_hand():
    np.testing.assert_allclose(laterality(np.array([3.0, 0, 0, 1]), np.array([1.0, 2, 0, 1])), [0.5, -1, np.nan, 0])


def test_age_slope_is_scipys():
    rng = np.random.default_rng(2)
    age = rng.uniform(20, 80, 30)
    values = rng.normal(size=(30, 2, 2)) + age[:, None, None] / 50
    values[3:8, 1, 0] = np.nan
    values[4:, 1, 1] = np.nan  # too few
    found = age_slope(values, age)
    for place in [(0, 0), (0, 1), (1, 0)]:
        column = values[(slice(None), *place)]
        known = np.isfinite(column)
        fit = stats.linregress(age[known] / 10, column[known])
        half = stats.t.ppf(0.975, known.sum() - 2) * fit.stderr
        assert found["per_decade"][place] == pytest.approx(fit.slope)
        assert found["p"][place] == pytest.approx(fit.pvalue)
        assert found["low"][place] == pytest.approx(fit.slope - half)
    assert np.isnan(found["per_decade"][1, 1])


def test_two_scans_of_a_person_count_as_one():
    labels = left_right()
    experts = np.zeros((3, 1200), int)
    experts[0, labels == 1] = 1
    experts[1, labels == 1] = 1
    routes, counts = heads_with(labels, experts)
    routes.person[:] = [7, 7, 9]
    table = RegionStatistics(routes, counts, GRID, draws=99).regions().set_index(["parcel", "expert"])
    assert table.loc[(1, "E01"), "occupancy"] == pytest.approx(0.5)
    assert table.loc[(1, "E01"), "n_subjects"] == 2


def test_what_few_persons_have_is_left_out():
    """Parcel 2 is in four of five heads, and years were measured in three of those."""
    count = ParcelCounts(Parcels("labels", {1: "one", 2: "two"}, GRID))
    labels = left_right().reshape(GRID.shape)
    for head in range(5):
        count.count(np.where((labels == 2) & (head == 0), 0, labels), np.ones(GRID.shape, bool))
    expert = np.tile(np.arange(1200, dtype=np.int16) % 2, (5, 1))[..., None]
    change = np.random.default_rng(0).normal(size=(4, 1200, 2))
    known = {"contribution": change, "contribution_of": np.arange(4), "age": np.array([20.0, 30, 40, 50, 60])}
    routes = Routes.of(expert, np.ones(expert.shape, np.float32), 2, **known)
    for least, kept, told in ((3, {1, 2}, {1, 2}), (4, {1, 2}, {1}), (5, {1}, set()), (6, set(), set())):
        tables = RegionStatistics(routes, count, GRID, draws=9, least=least)
        regions, parcels = tables.regions(), tables.parcels()
        assert set(regions["parcel"]) == set(parcels["parcel"]) == set(tables.common()) == kept
        assert set(regions.loc[regions["contribution"].notna(), "parcel"]) == told
        for name in ("contribution", "contribution_low", "contribution_p", "contribution_per_decade"):
            assert set(parcels.loc[parcels[name].notna(), "parcel"]) == told


def test_what_a_run_adds_more_than_another_is_no_difference_between_heads():
    """Within each run two heads differ by 2; between the runs lie 100, and 40 years."""
    change = np.zeros((5, 1200))
    change[:, 0] = [0, 2, 100, 102, 7]
    ages = np.array([20.0, 30, 60, 70, 50])
    found = Measured.of(change, np.arange(5), ages, np.array(["a", "a", "b", "b", "only one"]))
    assert found.heads.tolist() == [0, 1, 2, 3]
    assert found.deviation()[:2].tolist() == pytest.approx([2**0.5, 0])  # four heads, two of them for the means
    assert found.per_decade()[:2].tolist() == pytest.approx([2, 0])
    fit = stats.linregress(ages, np.array([1, 4, -3, 2, 9.0]))
    one = Measured.of(np.array([[1, 4, -3, 2, 9.0]]).T, np.arange(5), ages, np.full(5, "a"))
    assert one.per_decade()[0] == pytest.approx(10 * fit.slope)
    assert one.deviation()[0] == pytest.approx(np.std([1, 4, -3, 2, 9], ddof=1))
    twice = one.per_decade(np.array([[1.0, 1, 1, 1, 1], [2, 0, 1, 1, 1]]))
    assert twice[0, 0] == pytest.approx(one.per_decade()[0])
    unknown = Measured.of(np.array([[1, 4, -3, 2, 9, 50.0]]).T, np.arange(6), np.append(ages, np.nan), np.full(6, "a"))
    assert unknown.per_decade()[0] == pytest.approx(10 * fit.slope)


def test_a_cell_of_few_persons_belongs_to_no_map():
    """Cell 0 in three heads of two persons, cell 1 in two of four heads, cell 2 in one, cell 3 in all."""
    expert = np.array([[0, 0, -1, 0], [0, 0, -1, 1], [1, -1, 0, 0], [-1, -1, -1, 1]], np.int16)[..., None]
    routes = Routes.of(expert, np.ones(expert.shape), 2, person=np.array([5, 5, 6, 7]))
    assert routes.persons().tolist() == [2, 1, 1, 3]
    assert routes.inside().tolist() == [True, True, False, True]
    assert routes.inside(2).tolist() == [True, False, False, True]
    assert routes.inside(3).tolist() == [False, False, False, True]
    assert routes.inside(2, [0, 2]).tolist() == [True, False, False, True]
    assert not routes.inside(1, []).any()


def test_joined_runs_keep_whose_contribution_it_is():
    one = Routes.of(np.zeros((2, 4, 1), np.int16), np.ones((2, 4, 1)), 2)
    two = Routes.of(
        np.zeros((3, 4, 1), np.int16),
        np.ones((3, 4, 1)),
        2,
        contribution=np.ones((1, 4, 2)),
        contribution_of=np.array([1]),
    )
    found = joined([one, two])
    assert len(found) == 5
    assert found.contribution_of.tolist() == [3]
