"""examples/reproduce.py: with a stand-in for training, killed and started anew, and once for real."""

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from training import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import reproduce
import studies
import study_runs
from snrweights.integrations.results import commit_of
from study_records import collect, read_records

STAND_INS = Path(__file__).parent / "stand_ins"
TINY, STUB = STAND_INS / "tiny_study.yaml", STAND_INS / "stub_train.py"


def command(folder, *argv, study=TINY, script=STUB):
    where = ("--runs-dir", str(folder / "runs"), "--results-dir", str(folder / "results"), "--script", str(script))
    return [str(study), *where, *argv]


def run(folder, *argv, **options):
    """Run in this process; return the exit code and what was said."""
    said, code = io.StringIO(), 0
    with redirect_stdout(said):
        try:
            reproduce.main(command(folder, *argv, **options))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code)
    return SimpleNamespace(returncode=code, stdout=said.getvalue())


def start(folder, *argv, pause="0.03"):
    environment = {**os.environ, "STUB_PAUSE": pause}
    pipes = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    script = [sys.executable, str(EXAMPLES / "reproduce.py")]
    return subprocess.Popen([*script, *command(folder, *argv)], start_new_session=True, **pipes)


def results(folder):
    """Return what must not depend on how often a study was interrupted."""
    found = json.loads((folder / "results" / "tiny_study" / "results.json").read_text())
    records = read_records(folder / "results" / "tiny_study" / "runs.jsonl")
    return found["claims"], found["analyses"], [(r.run, r.series, r.settings, r.results) for r in records.values()]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def trainings(folder):
    """Return the processes that train in a folder of runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(STUB) in words and str(EXAMPLES / "reproduce.py") not in words and any(str(folder) in w for w in words):
            found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run(folder, "--jobs", "4")
    assert done.returncode == 0, done.stdout
    return folder


def test_a_study_is_run_and_told(uninterrupted):
    output = uninterrupted / "results" / "tiny_study"
    assert {path.name for path in output.iterdir()} == {"README.md", "results.json", "runs.jsonl", "1-course.png"}
    records = read_records(output / "runs.jsonl")
    names = [run.name for run in studies.load_study(str(TINY)).runs]
    assert list(records) == names
    assert len(names) == 8
    one = records["linear-min_snr-s1"]
    assert one.levels == {"schedule": "linear", "method": "min_snr"}
    assert (one.seed, one.seconds, one.made["commit"]) == (1, 1.5, "c0ffee")
    assert one.settings["weight.set"] == ["gamma=5"]
    assert [step for step, _ in one.series["fd_pixels"]] == [2, 4, 6, 8]
    assert "| **seen** |" in (output / "README.md").read_text()


def test_tables_are_redrawn_from_the_records_alone(uninterrupted, tmp_path):
    kept = tmp_path / "results" / "tiny_study"
    kept.mkdir(parents=True)
    source = uninterrupted / "results" / "tiny_study"
    (kept / "runs.jsonl").write_text((source / "runs.jsonl").read_text())
    assert run(tmp_path, "--analyse").returncode == 0
    assert (kept / "README.md").read_text() == (source / "README.md").read_text()
    assert (kept / "results.json").read_text() == (source / "results.json").read_text()
    assert (kept / "1-course.png").read_bytes() == (source / "1-course.png").read_bytes()
    again = run(tmp_path)  # nothing is left to run either
    assert again.returncode == 0
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_killed_at_three_moments_it_ends_with_the_same_table(uninterrupted, tmp_path):
    moments = random.Random(8)
    for _ in range(3):
        process = start(tmp_path, "--jobs", "2")
        wait_for(lambda: trainings(tmp_path))
        time.sleep(moments.uniform(0, 0.6))
        assert process.poll() is None
        for pid in (process.pid, *trainings(tmp_path)):
            with suppress(ProcessLookupError):  # it had just ended
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    done = run(tmp_path, "--jobs", "4")
    assert done.returncode == 0, done.stdout
    assert "goes on" in done.stdout
    assert results(tmp_path) == results(uninterrupted)


def test_training_that_outlives_a_killed_study_is_waited_for(uninterrupted, tmp_path):
    """The lock is the training's as well: a second study must not train in the same folder."""
    process = start(tmp_path, "--jobs", "3", pause="0.6")
    wait_for(lambda: len(trainings(tmp_path)) == 3)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = run(tmp_path, "--jobs", "4")
    assert done.returncode == 0, done.stdout  # the stand-in fails where another trains in its folder
    assert results(tmp_path) == results(uninterrupted)


def test_two_at_once_share_the_runs(uninterrupted, tmp_path):
    both = [start(tmp_path, "--jobs", "2") for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    begun = [line for text in said for line in text.splitlines() if line.endswith(": begins")]
    assert len(begun) == len(set(begun)) == 8
    assert all(any(line.endswith(": begins") for line in text.splitlines()) for text in said)
    assert results(tmp_path) == results(uninterrupted)


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(uninterrupted, tmp_path):
    process = start(tmp_path, "--jobs", "2", pause="0.6")
    wait_for(lambda: len(list(tmp_path.rglob("checkpoint"))) == 2)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert f"Go on with: python examples/reproduce.py {TINY} --runs-dir" in said
    assert "failed" not in said
    assert not trainings(tmp_path)
    assert all(0 < int(checkpoint.read_text()) < 8 for checkpoint in tmp_path.rglob("checkpoint"))
    assert run(tmp_path, "--jobs", "4").returncode == 0
    assert results(tmp_path) == results(uninterrupted)


def changed(folder, change):
    """Return the study's file with a change, under the same name."""
    path = folder / "tiny_study.yaml"
    values = yaml.safe_load(TINY.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_changed_options_are_refused(tmp_path):
    assert run(tmp_path, "--only", "method=min_snr", "--only", "seed=1").returncode == 0
    study = changed(tmp_path, lambda values: values["base"].update(max_steps=9))
    refused = run(tmp_path, study=study)
    assert refused.returncode == 1
    assert "runs.jsonl holds linear-min_snr-s1 with other options (optimizer.max_steps: 8 -> 9)" in refused.stdout
    (tmp_path / "results" / "tiny_study" / "runs.jsonl").unlink()
    refused = run(tmp_path, study=study)
    assert "linear-min_snr-s1 was begun with other options (optimizer.max_steps: 8 -> 9)" in refused.stdout


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path):
    study = changed(tmp_path, lambda values: values["axes"]["method"]["min_snr"].update(learning_rate=0.5))
    done = run(tmp_path, "--jobs", "4", "--only", "seed=0", study=study)
    assert done.returncode == 1
    assert "linear-min_snr-s0: failed, ended with 1. Its last lines, of" in done.stdout
    assert "\n    the loss is not finite\n" in done.stdout
    assert "Failed: linear-min_snr-s0." in done.stdout
    assert set(read_records(tmp_path / "results" / "tiny_study" / "runs.jsonl")) == {
        *("linear-ddpm-s0", "linear-smoothed_kl-s0", "cosine-ddpm-s0"),
    }


def test_images_of_a_run_that_diverged_have_no_distance(uninterrupted, tmp_path):
    """Weights that are not finite still give bytes, whose distance is a number like any other."""
    study = studies.load_study(str(TINY))
    shutil.copytree(uninterrupted / "runs" / "tiny_study" / study.runs[0].name, tmp_path / "run")
    before = collect(tmp_path / "run", study.runs[0], study.collect).series["fd_pixels"]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": NaN}\n')
    after = collect(tmp_path / "run", study.runs[0], study.collect).series["fd_pixels"]
    assert after[:2] == before[:2]
    assert [step for step, value in after if math.isnan(value)] == [6, 8]


def test_what_cannot_be_started_or_kept_is_told(uninterrupted, tmp_path, monkeypatch):
    """A disk may be full at any time: the runs stay, and are read again when there is room."""
    one = ("--only", "seed=0", "--only", "method=min_snr")
    done = run(tmp_path, *one, "--launch", "no-such-program")
    assert done.returncode == 1
    assert "linear-min_snr-s0: failed, it could not be started: [Errno 2] No such file" in done.stdout
    assert "0 of 8 runs are done." in done.stdout

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(study_runs, "add_record", full)
        done = run(tmp_path, *one)
    assert done.returncode == 1
    assert "failed, its numbers could not be kept: [Errno 28] No space left on device" in done.stdout
    done = run(tmp_path, *one)
    assert done.returncode == 0
    assert "begins" not in done.stdout  # it had ended
    assert "linear-min_snr-s0: done" in done.stdout


def test_a_dry_run_says_what_is_left_and_runs_nothing(tmp_path):
    before = run(tmp_path, "--dry-run")
    assert before.stdout.splitlines()[-2:] == ["8 runs: 8 to do.", "About 0.0 hours are left, 1 at a time."]
    assert not (tmp_path / "runs").exists()
    some = run(tmp_path, "--dry-run", "--only", "method=ddpm", "--only", "method=min_snr", "--only", "seed=1").stdout
    assert "3 runs: 3 to do." in some
    assert run(tmp_path, "--only", "schedule=cosine", "--jobs", "3").returncode == 0
    after = run(tmp_path, "--dry-run").stdout
    assert "cosine-ddpm-s1         done" in after
    assert "8 runs: 6 to do, 2 done." in after


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["digit"], r"Unknown study 'digit'; choose one of \['alsr-digits', "),
        (["weights-digits", "--only", "method"], r"`--only` takes AXIS=LEVEL, got 'method'"),
        (["weights-digits", "--only", "methods=ddpm"], r"Unknown 'methods' in `--only`; choose one of \['schedule', "),
        (["weights-digits", "--only", "seed=42"], r"Unknown '42' in `--only seed=...`; choose one of \['1001', "),
        (
            ["weights-digits", "--only", "draws=stratified", "--only", "schedule=cosine"],
            r"'weights-digits' has no run with draws=strat",
        ),
        (["weights-digits", "--jobs", "0"], "`--jobs` must be >= 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(argv, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        reproduce.main([*argv, "--dry-run", "--runs-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update(seed=3), r"Unknown 'seed' in study 'tiny_study'; choose one of \['title', "),
        (lambda v: v.pop("seeds"), r"study 'tiny_study' lacks \['seeds'\]"),
        (lambda v: v["collect"].update(serie=[]), r"Unknown 'serie' in study 'tiny_study', 'collect'"),
        (
            lambda v: v["select"][0].update(schedule=["cos"]),
            r"Unknown 'cos' in study 'tiny_study', 'select', axis 'sch",
        ),
        (lambda v: v["base"].update(max_step=3), "Unknown option '--max-step'"),
        (lambda v: v.update(script="trian.py"), r"Unknown 'trian.py' in study 'tiny_study', 'script'; choose one of"),
        (lambda v: v.update(seeds=[1, 1]), "Two runs of study 'tiny_study' have the name 'linear-ddpm-s1'"),
        (lambda v: v["axes"]["schedule"].update({True: {}}), "True of axis 'schedule' in study 'tiny_study' must be a"),
        (lambda v: v["axes"]["method"].update({"a/b": {}}), "'a/b' of axis 'method' in study 'tiny_study' must be a"),
    ],
)
def test_a_study_file_with_a_mistake_is_refused(change, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        assert studies.load_study(str(changed(tmp_path, change))).runs


@pytest.mark.slow
def test_training_a_masked_model_for_real(tmp_path):
    """The study of the digits, with a network and a number of steps that take no time."""
    values = yaml.safe_load((studies.STUDIES / "masked-digits.yaml").read_text())
    tiny = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "train_batch_size": 4, "num_inference_steps": 2}
    tiny |= {"max_steps": 4, "validation_steps": 2, "evaluation_steps": [2], "features": ["pixels"], "elbo_draws": 1}
    values["base"] |= tiny
    values["seeds"] = [7]
    values["axes"]["method"] = {name: values["axes"]["method"][name] for name in ("elbo", "flow")}
    values["collect"] = {"series": ["fd_pixels_500", "bits_per_dim"]}
    values["analyses"] = [{**item, "metrics": values["collect"]["series"]} for item in values["analyses"][1:2]]
    values["claims"] = values["claims"][3:4]
    study = tmp_path / "masked.yaml"
    study.write_text(yaml.safe_dump(values, sort_keys=False))
    done = run(tmp_path, "--jobs", "2", "--threads", "1", study=study, script=studies.SCRIPTS["train_masked.py"].path)
    assert done.returncode == 0, done.stdout
    output = tmp_path / "results" / "masked"
    one, other = read_records(output / "runs.jsonl").values()
    assert (one.run, other.run) == ("elbo-s7", "flow-s7")
    assert one.settings["data.levels"] == 17
    assert [step for step, _ in one.series["bits_per_dim"]] == [2, 4]
    assert one.series["bits_per_dim"] != other.series["bits_per_dim"]
    page = (output / "README.md").read_text()
    assert "| negative ELBO, bits per dimension | `flow` |" in page
    assert "not decidable at this size" in page  # of one seed
    values["base"]["hidden_size"] = 32
    study.write_text(yaml.safe_dump(values, sort_keys=False))
    assert "(model.hidden_size: 16 -> 32)" in run(tmp_path, study=study).stdout


@pytest.mark.slow
def test_training_for_real(tmp_path, monkeypatch):
    """Two runs of train.py, with everything that a study can keep of them."""
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "real.yaml"
    tiny = {"block_out_channels": [32], "attention": [False], "train_batch_size": 4, "num_inference_steps": 2}
    tiny |= {"preset": "digits", "max_steps": 4, "evaluation_steps": [2], "num_samples": 6, "logging_steps": 1}
    values = {
        "title": "For real",
        "question": "Does it run?",
        "base": tiny | {"checkpointing_steps": 2, "features": ["pixels"]},
        "axes": {"method": {"ddpm": {"method": "ddpm"}, "min_snr": {"method": "min_snr", "set": ["gamma=3"]}}},
        "seeds": [7],
        "collect": {
            **{"series": ["fd_pixels_6", "validation_loss"], "profiles": ["validation_loss_by_log_snr"]},
            **{"loss_since": 0.5, "variance_at": [0.5, 1.0]},
        },
        "analyses": [
            {"analysis": "final", "metrics": ["fd_pixels_6"], "compare": "method", "reference": "ddpm"},
            {"analysis": "variance_maps", "compare": "method"},
            {"analysis": "by_noise", "profile": "loss", "compare": "method"},
            {"analysis": "by_noise", "profile": "validation_loss_by_log_snr", "compare": "method"},
        ],
    }
    study.write_text(yaml.safe_dump(values, sort_keys=False))
    done = run(tmp_path, "--jobs", "2", "--threads", "1", study=study, script=EXAMPLES / "train.py")
    assert done.returncode == 0, done.stdout
    output = tmp_path / "results" / "real"
    one, other = read_records(output / "runs.jsonl").values()
    assert (one.run, other.run) == ("ddpm-s7", "min_snr-s7")
    assert [step for step, _ in one.series["fd_pixels_6"]] == [2, 4]
    assert one.series != other.series
    assert one.results["fd_pixels_6_real_vs_real"] > 0
    assert one.seconds > 0
    assert one.made["versions"]["torch"]
    assert one.made["commit"] == commit_of(EXAMPLES)  # not that of the current directory
    assert sorted(one.variance) == ["0.5", "1.0"]
    assert one.profiles["loss"]["step"] == 4
    assert all(value > 0 for value in one.profiles["loss"]["values"])
    assert len(list(output.glob("*.png"))) == 3
    assert "| Fréchet distance in pixels (6) | `min_snr` |" in (output / "README.md").read_text()
    again = run(tmp_path, study=study, script=EXAMPLES / "train.py")
    assert "begins" not in again.stdout
