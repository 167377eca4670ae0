"""Statistics, claims and analyses of studies, on records whose answers are known."""

import dataclasses
import doctest
import importlib
import math
import sys

import numpy as np
import pytest
from training import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import analyses
import study_claims
import study_statistics as statistics
from studies import Collect, Study
from study_checks import check_study
from study_records import Record
from study_report import claims_table, finite, write_report

MODULES = ["analyses", "studies", "study_claims", "study_figures", "study_report", "study_runs", "study_statistics"]
STEPS = (100, 200, 400, 800)
INF = math.inf


def record(seed, method, values, schedule="linear", **others):
    levels = {"schedule": schedule, "method": method}
    series = {"fd": [[step, value] for step, value in zip(STEPS, values, strict=True)]}
    given = {"profiles": {}, "variance": {}, "results": {"fd_real_vs_real": 0.5}, **others}
    made = {"threads": 1, "commit": "c0ffee", "time": "2026-01-01", "versions": {"torch": "2.13"}}
    return Record(f"{schedule}-{method}-s{seed}", levels, seed, {}, series, seconds=60.0, made=made, **given)


def study(**others):
    axes = {"schedule": {"linear": {}, "cosine": {}}, "method": {"ddpm": {}, "min_snr": {}, "smoothed_kl": {}}}
    return Study("known", "Known", "What is known?", axes, [1, 2, 3], Collect(["fd"]), **others)


@pytest.fixture
def records():
    """Three methods over three seeds; min_snr is at 0.8 of ddpm, smoothed_kl 0.1 below that."""
    found = []
    for seed in (1, 2, 3):
        ddpm = [(16 + seed) / 2**k for k in range(4)]
        min_snr = [0.8 * value for value in ddpm]
        found += [record(seed, "ddpm", ddpm), record(seed, "min_snr", min_snr)]
        found.append(record(seed, "smoothed_kl", [value - 0.1 for value in min_snr]))
    return found


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert failed == 0


def test_welch_by_hand():
    """Means 5 and 2, variances 4 and 1, three and four values: t = 3 / √(4/3 + 1/4)."""
    one, other = [3.0, 5.0, 7.0], [1.0, 1.5, 2.5, 3.0]
    spread = np.var(other, ddof=1)
    t, degrees, p = statistics.welch(one, other)
    error = 4 / 3 + spread / 4
    assert t == pytest.approx(3 / math.sqrt(error))
    assert degrees == pytest.approx(error**2 / ((4 / 3) ** 2 / 2 + (spread / 4) ** 2 / 3))
    assert 0 < p < 0.2


def test_welch_of_one_value_or_no_spread_is_nothing():
    assert all(map(math.isnan, statistics.welch([1.0], [1.0, 2.0])))
    assert all(map(math.isnan, statistics.welch([1.0, 1.0], [2.0, 2.0])))
    assert math.isnan(statistics.brown_forsythe([1.0, 2.0], [1.0, 2.0, 3.0]))


def test_holm_by_hand():
    assert statistics.holm([0.04, math.nan, 0.01, 0.02]) == pytest.approx([0.04, math.nan, 0.03, 0.04], nan_ok=True)
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]


def test_steps_are_interpolated_in_the_logarithm():
    series = [[100, 16.0], [300, 4.0], [400, 1.0], [500, 8.0]]
    assert statistics.steps_to(series, 8.0) == pytest.approx((200.0, 200.0))
    assert statistics.steps_to(series, 4.0) == (300.0, 300.0)  # of the first time
    assert statistics.steps_to(series, 2.0) == pytest.approx((350.0, 350.0))
    assert statistics.steps_to(series, 16.0) == (0.0, 100.0)
    assert statistics.steps_to(series, 0.5) == (500.0, INF)
    assert statistics.steps_to([[100, 2.0], [200, -0.1]], 1.0) == (100.0, 200.0)  # no logarithm: between the two
    diverged = [[100, 8.0], [200, math.nan], [300, math.nan]]
    assert statistics.steps_to(diverged, 4.0) == (300.0, INF)
    assert statistics.steps_to([*diverged, [400, 2.0]], 4.0) == pytest.approx((250.0, 250.0))


@pytest.mark.parametrize(
    ("one", "other", "saved"),
    [
        ((50.0, 50.0), (100.0, 100.0), (0.5, 0.5)),
        ((50.0, 50.0), (100.0, INF), (0.5, 1.0)),
        ((100.0, INF), (50.0, 50.0), (-INF, -1.0)),
        ((0.0, 50.0), (100.0, 100.0), (0.5, 1.0)),
        ((50.0, 50.0), (0.0, 100.0), (-INF, 0.5)),
        ((100.0, INF), (100.0, INF), (-INF, 1.0)),
    ],
)
def test_what_is_saved_where_a_threshold_was_not_seen(one, other, saved):
    assert statistics.fewer(one, other) == saved


def test_intervals():
    assert statistics.t_interval([4.0]) == (-INF, INF)
    low, high = statistics.bootstrap_interval([1.0, 2.0, 6.0])
    assert (low, high) == statistics.bootstrap_interval([1.0, 2.0, 6.0])
    assert 1.0 <= low < 3.0 < high <= 6.0
    many = np.random.default_rng(0).normal(5, 2, 400)
    assert statistics.bootstrap_interval(many) == pytest.approx(statistics.t_interval(many), abs=0.02)


def test_lower_is_paired_and_averages_over_the_levels_left_open(records):
    one, other = {"method": "min_snr"}, {"method": "ddpm"}
    found = study_claims.lower(records, one, other, "fd")
    assert list(found) == [1, 2, 3]
    assert all(bounds == pytest.approx((0.2, 0.2)) for bounds in found.values())
    cosine = [record(seed, m, [v] * 4, "cosine") for seed in (1, 2) for m, v in (("ddpm", 1.0), ("min_snr", 0.45))]
    found = study_claims.lower([*records, *cosine], one, other, "fd")
    assert list(found) == [1, 2]  # the third seed has one schedule only
    assert found[1] == pytest.approx((0.4, 0.4))  # 1 - √(.8 * .45)


def test_fewer_steps(records):
    """Each curve halves where the step doubles; a factor 0.8 is reached log(1/.8) / log 2 of an interval earlier."""
    (low, high), *_ = study_claims.fewer_steps(
        records, {"method": "min_snr"}, {"method": "ddpm"}, "fd", [8.5 * 0.8]
    ).values()
    later = 200 + 200 * math.log2(1 / 0.8)
    assert low == high == pytest.approx(1 - 200 / later)


def test_the_matching_rule(records):
    of = {"one": {"method": "smoothed_kl"}, "other": {"method": "min_snr"}, "reference": {"method": "ddpm"}}
    found = study_claims.matching(records, metric="fd", **of)
    for seed, bounds in found.items():
        away = np.mean([0.2 * (16 + seed) / 2**k for k in range(3)])  # not the last of four
        assert bounds == pytest.approx((away / 0.1, away / 0.1))


def test_wider_is_the_distance_from_the_median():
    values = {"ddpm": (1.0, 2.0, 3.0), "min_snr": (0.0, 2.0, 10.0)}
    found = [record(s, m, [1, 1, 1, v[s - 1]]) for m, v in values.items() for s in (1, 2, 3)]
    wider = study_claims.wider(found, {"method": "min_snr"}, {"method": "ddpm"}, "fd")
    assert wider == {1: (1.0, 1.0), 2: (0.0, 0.0), 3: (7.0, 7.0)}
    two = [one for one in found if one.seed < 3]
    assert study_claims.wider(two, {"method": "min_snr"}, {"method": "ddpm"}, "fd") == {}


def test_a_power_law_is_found_once_the_floor_is_subtracted():
    sizes = {"ddpm": 1.0, "min_snr": 10.0, "smoothed_kl": 100.0}
    found = []
    for seed in (1, 2):
        for method, size in sizes.items():
            gap = 2 * size**-0.5
            profiles = {"loss": 1 + gap, "gap": gap}
            columns = {k: {"step": 1, "log_snr": [-9.0, 0.0], "values": [1e9, v]} for k, v in profiles.items()}
            found.append(record(seed, method, [1] * 4, profiles=columns))
    arguments = {"axis": "method", "sizes": sizes, "window": [-1, 1]}
    for both in study_claims.laws(found, **arguments).values():
        assert both["subtracted"][1].exponent == pytest.approx(0.5)
        assert both["subtracted"][1].r_squared == pytest.approx(1.0)
        assert both["raw"][1].r_squared < 0.99
    assert all(low > 0.01 for low, _ in study_claims.straighter(found, **arguments).values())
    section = analyses.scaling(study(), found, **arguments, unit="parameters")
    assert "| subtracted | 2 | 0.500 | 0.500 to 0.500 | 1.00 | -1.00 |" in section.text
    assert [row["r_squared"] for row in section.values if row["loss"] == "subtracted"] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("interval", "region", "verdict"),
    [
        ((0.01, 0.3), [0, None], study_claims.SEEN),
        ((0.0, 0.0), [0, None], study_claims.NOT_SEEN),
        ((-0.3, -0.01), [0, None], study_claims.NOT_SEEN),
        ((-0.01, 0.3), [0, None], study_claims.UNDECIDED),
        ((-0.05, 0.05), [-0.1, 0.1], study_claims.SEEN),
        ((0.12, 0.3), [-0.1, 0.1], study_claims.NOT_SEEN),
        ((-0.05, 0.3), [-0.1, 0.1], study_claims.UNDECIDED),
        ((-INF, INF), [None, 0], study_claims.UNDECIDED),
    ],
)
def test_the_rule_of_a_verdict(interval, region, verdict):
    assert study_claims.verdict(interval, region) == verdict


def claim(**changes):
    of = {"one": {"method": "min_snr"}, "other": {"method": "ddpm"}, "metric": "fd"}
    return {
        "claim": "Lower",
        "published": "21 %",
        "source": "them",
        "effect": "lower",
        "of": of,
        "seen": [0, None],
    } | changes


def test_the_report(records, tmp_path):
    asked = study(
        claims=[
            claim(),
            claim(claim="On cosine", where={"schedule": "cosine"}),
            claim(claim="Higher", seen=[None, 0.1]),
        ],
        analyses=[
            {"analysis": "final", "metrics": ["fd"], "compare": "method", "reference": "ddpm", "by": ["schedule"]},
            {"analysis": "course", "metrics": ["fd"], "compare": "method", "title": "Drawn"},
            {"analysis": "factors", "metrics": ["fd"], "references": {"method": "ddpm"}},
            {"analysis": "course", "metrics": ["fd"], "compare": "method", "where": {"schedule": "cosine"}},
        ],
    )
    write_report(asked, records, tmp_path, "the command")
    page = (tmp_path / "README.md").read_text()
    assert "| Lower | 21 % (them) | +20 % (+20 %), 3 seeds | lower: above 0 % | **seen** |" in page
    assert "| On cosine | 21 % (them) |  | lower: above 0 % | **too few runs yet** |" in page
    assert "| lower: below 10 % | **not seen** |" in page
    assert "| fd | linear | `min_snr` | 1.80 ± 0.10 | 3 | +20 % (+20 %) |" in page
    assert "| fd | method | `min_snr` | `ddpm` | +20 % |" in page
    assert "## Drawn\n" in page
    assert (tmp_path / "2-course.png").stat().st_size > 10_000
    assert not (tmp_path / "4-course.png").exists()  # nothing on cosine yet
    assert "the command --analyse" in page
    assert "seeds 1, 2, 3" in page


def test_what_was_expected_here_is_not_among_what_is_published(records):
    assert "expected beforehand" not in claims_table(study_claims.judge(study(claims=[claim()]), records))
    table = claims_table(study_claims.judge(study(claims=[claim(published="", expected="half")]), records))
    assert table.startswith("| claim | expected beforehand | here: mean (95 %) | seen if | verdict |\n")
    assert "| Lower | half | +20 % (+20 %), 3 seeds |" in table


def test_infinite_bounds_are_null_in_json():
    assert finite({"a": [1.0, (-INF, 2)], "b": math.nan}) == {"a": [1.0, [None, 2]], "b": None}


def analysis(**changes):
    return {"analysis": "final", "metrics": ["fd"], "compare": "method", "reference": "ddpm"} | changes


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (analysis(analysis="guess"), r"Unknown 'guess' in analysis 1 of 'known'; choose one of \['course'"),
        (analysis(compar="method"), r"Unknown 'compar' in analysis 1 of 'known'; choose one of \['metrics', 'compare'"),
        (analysis(compare="methods"), r"Unknown 'methods' in analysis 1 of 'known'; choose one of \['schedule'"),
        (analysis(reference="dppm"), r"Unknown 'dppm' in .*'reference', axis 'method'; choose one of \['ddpm'"),
        (analysis(metrics=["df"]), r"Unknown 'df' in analysis 1 of 'known': metrics .*; choose one of \['fd'\]"),
        (analysis(where={"schedule": "linaer"}), r"Unknown 'linaer' in .*'where', axis 'schedule'"),
        (analysis(by=["schedul"]), "Unknown 'schedul' in analysis 1 of 'known'"),
        ({"analysis": "final", "metrics": ["fd"]}, r"analysis 1 of 'known' lacks \['compare', 'reference'\]"),
        ({"analysis": "by_noise", "compare": "method", "profile": "gap"}, "Unknown 'gap' in .*: profiles are those"),
        (claim(effect="hope"), r"Unknown 'hope' in claim 1 of 'known'; choose one of \['lower'"),
        (claim(sen=1), r"Unknown 'sen' in claim 1 of 'known'; choose one of \['claim'"),
        (claim(seen=[0]), r"'seen' in claim 1 of 'known' must be \[low, high\]"),
        (claim(of=claim()["of"] | {"one": {"method": "minsnr"}}), r"Unknown 'minsnr' in .*'one', axis 'method'"),
        ({"claim": "Nothing"}, r"claim 1 of 'known' lacks \['effect', 'of', 'seen'\]"),
    ],
)
def test_a_mistake_in_what_is_asked_is_found_before_any_run(asked, said):
    check_study(study(analyses=[analysis()], claims=[claim()]))
    with pytest.raises(SystemExit, match=said):
        check_study(study(**{"claims" if "claim" in asked else "analyses": [asked]}))


PAIR = {"one": {"method": "min_snr"}, "other": {"method": "ddpm"}}
ASKED = [
    ("lower", PAIR | {"metric": "fd"}),
    ("fewer_steps", PAIR | {"metric": "fd", "thresholds": [4]}),
    ("wider", PAIR | {"metric": "fd"}),
    ("matching", PAIR | {"reference": {"method": "smoothed_kl"}, "metric": "fd"}),
    ("lower_profile", PAIR | {"profile": "gap", "window": [-3, 5]}),
    ("straighter", {"axis": "method", "sizes": {"ddpm": 1, "min_snr": 2, "smoothed_kl": 4}, "window": [-3, 5]}),
]


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
def test_a_run_that_diverged_neither_ends_the_page_nor_vanishes_from_it(records, tmp_path, bad):
    """Numbers that are not finite, and those of which there is no logarithm."""

    def profiles(value):
        return {name: {"step": 1, "log_snr": [-1.0, 1.0], "values": [0.1, value]} for name in ("loss", "gap")}

    found = [dataclasses.replace(one, profiles=profiles(0.2)) for one in records]
    found[1] = record(1, "min_snr", [17, bad, bad, bad], profiles=profiles(bad))
    of_all = [
        analysis(),
        {"analysis": "course", "metrics": ["fd"], "compare": "method"},
        {"analysis": "steps", "thresholds": {"fd": [4.0]}, "compare": "method", "reference": "ddpm"},
        {"analysis": "matching", "metrics": ["fd"], "compare": "method", "pair": ["smoothed_kl", "min_snr"]}
        | {"reference": "ddpm"},
        {"analysis": "factors", "metrics": ["fd"], "references": {"method": "ddpm"}},
        {"analysis": "by_noise", "profile": "gap", "compare": "method"},
        {"analysis": "scaling", "unit": "parameters"} | ASKED[-1][1],
    ]
    claims = [claim(claim=effect, effect=effect, of=of) for effect, of in ASKED]
    asked = dataclasses.replace(study(analyses=of_all, claims=claims), collect=Collect(["fd"], loss_since=0.5))
    check_study(asked)
    write_report(asked, found, tmp_path, "the command")
    page = (tmp_path / "README.md").read_text()
    assert "nan" not in page
    assert ("**Not finite: `linear-min_snr-s1` (fd).**" in page) == math.isnan(bad)
    assert ("| fd | `min_snr` | 1.85 ± 0.071, 1 not finite | 3 | unknown |" in page) == math.isnan(bad)
    assert "| lower | 21 % (them) | unknown (unknown), 3 seeds | lower: above 0 % | **not decidable" in page


def test_steps_that_were_not_reached_are_said(records):
    section = analyses.steps(study(), records, {"fd": [4.0, 0.1]}, "method", "ddpm")
    rows = [line.split(" | ") for line in section.text.splitlines() if line.startswith("| fd")]
    assert [row[3].strip(" |") for row in rows] == ["0 of 3", *["0 of 3 (unknown to +100 %)"] * 2]
    assert "(+" in rows[1][2]
    assert section.values[0]["steps"][0] == pytest.approx((100 * 17 / 4.25 / 2 * 2,) * 2, rel=0.1)


def test_maps_of_variance_and_profiles(records):
    variance = {"0.5": {"log_snr": [-1.0, 1.0], "variance": [2.0, 4.0]}}
    profiles = {"gap": {"step": 800, "log_snr": [-1.0, 1.0], "values": [0.1, 0.2]}}
    found = [record(r.seed, r.levels["method"], [1] * 4, variance=variance, profiles=profiles) for r in records]
    asked = Study("v", "V", "?", study().axes, [1], Collect(["fd"], variance_at=[0.5]))
    maps = analyses.variance_maps(asked, found, "method")
    (figure,) = maps.figures.values()
    assert figure.axes[0].get_title() == "after 400 of 800 steps"
    assert figure.axes[0].collections[0].get_array().tolist() == [[2.0, 4.0]] * 3
    section = analyses.by_noise(asked, found, "gap", "method", window=[0, 5])
    assert "Over log-SNR from 0 to 5:" in section.text
    assert "| `ddpm` | 0.200 ± " in section.text
    (figure,) = section.figures.values()
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([0.1, 0.2])
