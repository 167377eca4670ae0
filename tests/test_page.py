"""The report of runs: what is read, what the page says, and that it is one file."""

import base64
import html
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
import yaml
from run_folders import PROCESS, make_run, make_tracker

from snrweights import LossVarianceTracker, get_weighting
from snrweights.charts import Axis, Line, line_chart, number, shares
from snrweights.cli import main
from snrweights.page import page
from snrweights.plots import relative_weight
from snrweights.runs import FILES, Run, names, read_runs
from snrweights.statistics import mean_between

VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Reads a page; an element that is closed wrongly is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def numbers(self):
        return [float(attributes["value"]) for attributes in self.all("data")]

    def charts(self):
        return [svg["aria-label"] for svg in self.all("svg") if "aria-label" in svg]


def read(*folders):
    return Page(page(read_runs(folders)))


def report(capsys, *arguments):
    code = main(["report", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("more") / "second", "smoothed_kl", ["tau=0.2"], seed=1)


def test_the_command_writes_one_file_and_says_so(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report(capsys, run) == (0, "Wrote report.html\n", "")
    assert report(capsys, run, "-o", "new/page.html") == (0, "Wrote new/page.html\n", "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "page.html", "report.html"]
    assert (tmp_path / "report.html").read_text() == (tmp_path / "new" / "page.html").read_text()


def test_the_page_loads_nothing(run, other):
    text = page(read_runs([run, other]))
    shown = Page(text)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in shown.elements}
    links = [value for _, given in shown.elements for name, value in given.items() if name in ("src", "href")]
    assert len(links) == 3
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import|https?:", text)
    policy = next(meta["content"] for meta in shown.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_samples_are_those_of_the_file(run):
    (image,) = read(run).all("img")
    assert base64.b64decode(image["src"].partition(",")[2]) == (run / "samples.png").read_bytes()
    assert (image["width"], image["height"]) == ("100", "20")
    assert image["class"] == "samples tiny"
    assert image["alt"] == "Samples of first"


def test_one_run_has_every_figure(run):
    titles = [label.partition(":")[0] for label in read(run).charts()]
    assert titles == [
        "Line chart. Training loss (weighted)",
        "Line chart. Held-out loss (unweighted)",
        "Line chart. Learning rate",
        "Line chart. Distance to the data, fd_pixels_100",
        "Line chart. Distance to the data, kid_pixels_100",
        "Line chart. Unweighted",
        "Line chart. Weighted",
        "Bar chart. Where the losses were",
        "Heat map. Unweighted, over steps",
        "Line chart. Held out, unweighted",
    ]


def test_the_numbers_are_those_of_the_files(run):
    shown = read(run)
    results = json.loads((run / "results.json").read_text())
    assert {v for v in results.values() if isinstance(v, (int, float))} <= set(shown.numbers())
    tracker = LossVarianceTracker.load(run / "tracker.safetensors")
    seen = tracker.since(tracker.updates // 2)
    curve = get_weighting("min_snr", gamma=5.0).over_log_snr("linear", prediction_type="epsilon")
    weight = relative_weight(seen, curve)
    deviation = seen.variance.sqrt()
    for column in (seen.edges[:-1], seen.edges[1:], seen.count, seen.mean, deviation, weight):
        assert set(column[seen.count > 0].tolist()) <= set(shown.numbers())
    terms = seen.total_variance() + seen.times(weight).total_variance()
    assert set(terms) <= set(shown.numbers())
    assert "4.386 real to real: 3.06" in shown.text
    assert "0.0979 ± 0.0024" in shown.text
    points = " ".join(shown.texts)
    for step, loss in ((10, 0.1), (40, 0.025)):
        assert f"at {step}: {number(loss)}" in points
    for at, loss in zip(seen.centres[seen.count > 0], seen.mean[seen.count > 0], strict=True):
        assert f"mean: at {number(at.item())}: {number(loss.item())}" in points


def test_a_point_lies_where_the_axis_says():
    chart = line_chart("loss", [Line("a", [0, 10], [1e-2, 1.0])], x_label="step", y_label="loss")
    texts = {t: (float(x), float(y)) for x, y, t in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', chart)}
    points = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert points[0][1] == pytest.approx(texts["0.01"][1] - 4, abs=0.11)
    assert points[1][1] == pytest.approx(texts["1"][1] - 4, abs=0.11)
    assert points[1][0] > points[0][0]


def test_values_that_are_not_finite_leave_a_gap():
    nan, inf = float("nan"), float("inf")
    chart = line_chart("loss", [Line("a", [1, 2, 3, 4, 5], [1.0, 2.0, nan, inf, 3.0])], x_label="x", y_label="y")
    assert chart.count('class="line"') == 2
    assert chart.count("<circle") == 3
    assert "nan" not in chart
    empty = line_chart("loss", [Line("a", [1, 2], [nan, 0.0])], x_label="x", y_label="y")
    assert "No finite value to draw." in empty
    assert "100\u00a0%" not in shares("variance", [("a", (nan, 1.0))], ("one", "two"))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.12345678901, 1e-9, 3e38])
def test_an_axis_stands_any_values(value):
    for y in ([value], [value, value * (1 + 1e-11)]):
        for log in (True, False):
            chart = line_chart("loss", [Line("a", range(len(y)), y)], x_label="x", y_label="y", log=log)
            assert ("No finite" in chart) == (log and value == 0)
            assert not re.search(r'"[^"]*(nan|inf)[^"]*"', chart)


@pytest.mark.parametrize("log", [True, False])
def test_ticks_are_few_and_inside(log):
    for low in (1e-6, 0.03, 7.0, 1234.0):
        for factor in (1.5, 4.0, 30.0, 1e5):
            ticks = Axis(low, low * factor, 0, 1, log).ticks()
            assert 2 <= len(ticks) <= 8
            assert all(low <= tick <= low * factor for tick in ticks)


def test_several_runs_share_figures_and_have_a_column_each(run, other):
    shown = read(run, other)
    assert "2 runs side by side" in shown.text
    for title in ("Training loss (weighted)", "Mean of the loss", "Standard deviation of the loss", "Weight"):
        (chart,) = [label for label in shown.charts() if f". {title}:" in label]
        assert "first, second" in chart
    assert len([label for label in shown.charts() if "Heat map" in label]) == 2
    assert [text for text in shown.texts if text in ("gamma=5", "tau=0.2")] == ["gamma=5", "tau=0.2"] * 2
    assert "Total variance of the unweighted loss" in shown.text
    both = [json.loads((folder / "results.json").read_text())["fd_pixels_100"] for folder in (run, other)]
    assert [value for value in shown.numbers() if value in both] == both


def test_options_that_differ_come_first_and_the_rest_is_folded(run, other):
    text = page(read_runs([run, other]))
    differing, _, same = text.partition("options that are the same</summary>")
    differing = differing.partition("<h2>Configuration</h2>")[2]
    assert re.findall(r'scope="row">([^<]+)', differing) == ["run.seed", "weight.method", "weight.set"]
    assert re.findall(r'scope="row">([^<]+)', same) == [
        "preset",
        "run.resume",
        "data.dataset",
        *(f"process.{name}" for name in PROCESS),
        *("weight.normalize", "weight.clamp_max", "optimizer.max_steps", "optimizer.learning_rate", "global_batch"),
    ]
    assert "The runs have the same options." in page(read_runs([run, run]))


def test_different_counts_of_samples_are_said(run, other, tmp_path):
    sentence = "measured on different counts of samples"
    assert sentence not in page(read_runs([run, other]))
    few = make_run(tmp_path / "few")
    results = json.loads((few / "results.json").read_text())
    (few / "results.json").write_text(json.dumps({**results, "count": 50}))
    assert sentence in page(read_runs([run, few]))


def test_losses_in_other_units_are_converted_or_left_out(tmp_path):
    tracked = {unit: make_tracker(tmp_path / str(unit), unit=unit) for unit in ("epsilon", "sample", None)}
    shown = Page(page(read_runs([tmp_path / str(unit) for unit in tracked])))
    (chart,) = [label for label in shown.charts() if ". Mean of the loss:" in label]
    assert "epsilon, sample, mean squared error of epsilon" in chart
    assert "converted at the middle of each bin. Without None: their unit cannot be converted." in shown.text
    seen = tracked["sample"].compute()
    converted = (seen.mean * seen.centres.exp())[seen.count > 0][0].item()  # ||eps - ..||² = SNR ||x0 - ..||²
    assert f"sample: at {number(seen.centres[seen.count > 0][0].item())}: {number(converted)}" in shown.text


def test_text_of_files_is_shown_as_text(tmp_path):
    bad = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "<b>&", method=bad, settings=[])
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "<i>": "\"'<img src=x>"}))
    text = page(read_runs([folder, make_run(tmp_path / "plain")]))
    shown = Page(text)
    assert "script" not in {tag for tag, _ in shown.elements}
    assert not {"b", "i"} & {tag for tag, _ in shown.elements}
    assert bad in shown.text
    assert "\"'<img src=x>" in shown.text
    assert {image["src"][:5] for image in shown.all("img")} == {"data:"}
    assert html.escape(f"No weighted loss: Unknown weighting '{bad}'") in text


def test_a_folder_with_a_tracker_alone_is_enough_and_says_what_is_not_there(tmp_path):
    make_tracker(tmp_path / "tracked", unit=None, snapshot_every=None)
    shown = read(tmp_path / "tracked")
    absent = ", ".join(f"{file} ({what})" for file, what in FILES.items() if file != "tracker.safetensors")
    assert f"Not in this folder: {absent}." in shown.text
    assert "No weighted loss: there is no config.yaml." in shown.text
    assert "No heat map over steps: the tracker has no snapshots." in shown.text
    assert [label.partition(":")[0] for label in shown.charts()] == [
        "Line chart. Unweighted",
        "Bar chart. Where the losses were",
    ]
    assert "loss as it was tracked" in shown.text


@pytest.mark.parametrize("file", FILES)
def test_any_file_may_be_missing_and_any_may_be_alone(file, tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / file).unlink()
    assert f"Not in this folder: {file} (" in read(folder).text
    for name in FILES.keys() - {file}:
        (folder / name).unlink()
    make_run(tmp_path / "whole")
    (tmp_path / "whole" / file).rename(folder / file)
    assert "Not in this folder: " in read(folder).text


def test_an_empty_tracker_has_no_figures(tmp_path):
    LossVarianceTracker().save(tmp_path / "tracker.safetensors")
    assert read(tmp_path).charts() == []
    assert read(tmp_path, tmp_path).charts() == []


def test_losses_that_were_not_finite_are_counted(tmp_path):
    tracker = LossVarianceTracker()
    tracker.update(torch.tensor([1.0, float("nan")]), torch.zeros(2))
    tracker.save(tmp_path / "tracker.safetensors")
    assert "1 losses were not finite" in read(tmp_path).text


def test_a_folder_with_nothing_is_an_error_that_names_it(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    code, out, err = report(capsys, tmp_path, "-o", tmp_path / "report.html")
    assert (code, out) == (2, "")
    assert err == (
        f"snrweights report: {str(tmp_path)!r} is not the folder of a run: it holds none of config.yaml, "
        "metrics.jsonl, results.json, samples.png, tracker.safetensors.\n"
    )
    assert not (tmp_path / "report.html").exists()
    code, _, err = report(capsys, tmp_path / "absent")
    assert (code, err) == (2, f"snrweights report: there is no folder {str(tmp_path / 'absent')!r}.\n")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", b"a: [1", "is damaged: "),
        ("config.yaml", b"- 1", "it must hold names with values, got list"),
        ("metrics.jsonl", b'{"step": 1, "loss": 1}\n{"step": \n{"step": 3}\n', "is damaged: line 2: "),
        ("metrics.jsonl", b'{"loss": 1}\n', "line 1: no 'step'"),
        ("metrics.jsonl", b'{"step": 1, "loss": "x"}\n', "line 1: "),
        ("metrics.jsonl", b'{"step": 1, "log_snr": [1], "validation_loss_by_log_snr": []}\n', "line 1: "),
        ("metrics.jsonl", b"\xff\n", "is damaged: "),
        ("results.json", b"{", "is damaged: "),
        ("samples.png", b"GIF89a", "it is not a PNG file"),
        ("samples.png", None, "it ends too early"),
        ("tracker.safetensors", b"x" * 100, "is not a tracker's file"),
    ],
)
def test_a_damaged_file_is_named(file, content, message, tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (folder / file).write_bytes((folder / file).read_bytes()[:-12] if content is None else content)
    code, out, err = report(capsys, folder)
    assert (code, out) == (2, "")
    assert str(folder / file) in err
    assert message in err
    assert err.count("\n") == 1


def test_a_picture_with_a_flipped_bit_is_damaged(tmp_path):
    folder = make_run(tmp_path / "run")
    data = bytearray((folder / "samples.png").read_bytes())
    data[60] ^= 1
    (folder / "samples.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"samples\.png' is damaged: its chunk IDAT at byte 33 is not whole"):
        read_runs([folder])


def test_half_a_last_line_is_what_a_killed_run_leaves(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')
    (run,) = read_runs([folder])
    assert run.series("loss")[0] == [10, 20, 30, 40]


def test_a_config_of_another_kind_is_shown_without_a_weight(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump({"lr": 0.1, "net": {"depth": 3}}))
    (run,) = read_runs([folder])
    assert run.config == {"lr": 0.1, "net.depth": 3}
    assert run.curve is None
    assert "No weighted loss: config.yaml has no 'process' that is known here." in read(folder).text


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    first, second = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([first, second])] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([first, first])] == ["run (1)", "run (2)"]
    assert names([first, first.parent]) == ["run", "a"]


def test_without_yaml_the_error_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, _, err = report(capsys, run)
    assert (code, err) == (
        2,
        f"snrweights report: {run / 'config.yaml'} needs PyYAML: pip install 'snrweights[train]'.\n",
    )


def test_without_diffusers_all_but_the_weight_is_there(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "snrweights.integrations.processes", None)
    shown = read(run)
    assert "No weighted loss: diffusers is not installed: pip install 'snrweights[train]'." in shown.text
    assert [label for label in shown.charts() if "Weighted" in label] == []


def test_snapshots_in_which_nothing_was_seen_are_no_heat_map(tmp_path):
    tracker = LossVarianceTracker()
    tracker.snapshot(1)
    tracker.snapshot(2)
    tracker.update(torch.ones(2), torch.zeros(2))
    tracker.save(tmp_path / "tracker.safetensors")
    assert [label for label in read(tmp_path).charts() if "Heat map" in label] == []


def test_there_is_a_run_at_least():
    with pytest.raises(ValueError, match="`runs` is empty"):
        page([])
    with pytest.raises(ValueError, match="`folders` is empty"):
        read_runs([])


def test_a_long_history_is_thinned_to_its_ends(tmp_path):
    tracker = make_tracker(tmp_path, updates=200, snapshot_every=1)
    html_text = page(read_runs([tmp_path]))
    columns = set(re.findall(r'class="cell" x="([\d.]+)"', html_text))
    assert 50 <= len(columns) <= 60
    assert mean_between(tracker.history()).shape == (40, 199)


def test_seven_runs_look_different():
    runs = [Run(str(i), metrics=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]) for i in range(7)]
    styles = re.findall(r'<svg class="swatch (c\d d\d)"', page(runs).partition("<main")[0])
    assert len(set(styles)) == len(styles) == 7


def test_shares_that_were_not_added_up_are_read_as_one(tmp_path):
    for rank in range(2):
        tracker = LossVarianceTracker(unit="epsilon")
        tracker.update(torch.ones(4), torch.zeros(4))
        tracker.save(tmp_path / f"tracker.rank-{rank}-of-2.safetensors")
    (run,) = read_runs([tmp_path])
    assert "tracker.safetensors" not in run.missing
    assert run.statistics().count.sum() == 8
