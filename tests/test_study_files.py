"""The studies of examples/studies: every run's options, what is asked of them, and what was fixed beforehand."""

import functools
import sys

import pytest
from training import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import reproduce
import study_claims
from analyses import ANALYSES
from masked_options import check_options as check_masked_options
from options import check_options
from snrweights.integrations.comparison import counted
from snrweights.integrations.features import DISTANCE_NAMES
from studies import SCRIPTS, STUDIES
from studies import load_study as read_study
from study_checks import check_study
from study_report import write_report
from trainer import make_model

load_study = functools.cache(read_study)
NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))
HERE = [name for name in NAMES if load_study(name).seconds]  # sized for a CPU
EXPLORED = {0, 1, 2, 42, 142, 242}


CHECKS = {"train.py": check_options, "train_masked.py": check_masked_options}


def options_of(run, script="train.py"):
    options = SCRIPTS[script].parse(run.flags)
    CHECKS[script](options)
    return options


def test_the_studies_are_there():
    assert set(NAMES) >= {
        *(
            "weights-digits",
            "weights-fashion",
            "factorial-digits",
            "factorial-fashion",
            "alsr-digits",
            "scaling-digits",
        ),
        *("optimal-digits", "cifar10-optimal"),
        *("cifar10-linear", "cifar10-cosine", "celeba64-cosine", "cifar10-edm-alsr", "cifar100-edm-alsr"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_run_has_its_own_options_and_measures_what_is_collected(name):
    study = load_study(name)
    runs = study.runs
    assert (
        len({run.name for run in runs})
        == len({repr(run.settings | {"run.seed": run.seed}) for run in runs})
        == len(runs)
    )
    for run in runs[: len(runs) // len(study.seeds)]:  # of the first seed
        options = options_of(run, study.script)
        output = options.output
        counts = output.evaluation_samples or (output.num_samples,)
        measured = {counted(DISTANCE_NAMES[kind][0], count) for kind in output.features for count in counts}
        held_out = {"train.py": {"validation_loss"}, "train_masked.py": {"negative_elbo", "bits_per_dim"}}
        measured |= held_out[study.script] if options.data.validation_images else set()
        measured |= {"gap"} if getattr(output, "optimal_loss", "none") != "none" else set()
        assert set(study.collect.series) <= measured
        assert output.checkpointing_steps > 0  # so that an interrupted run goes on
        assert options.weight.normalize == "mean"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_exists(name):
    study = load_study(name)
    check_study(study)
    assert study.claims
    assert all(not claim.get("published") or claim["source"] for claim in study.claims)


def test_studies_that_are_run_here_use_seeds_that_no_exploration_used():
    assert len(HERE) >= 6
    for name in HERE:
        assert not set(load_study(name).seeds) & EXPLORED
        assert len(load_study(name).seeds) >= 3
    hours = sum(load_study(name).seconds * len(load_study(name).runs) for name in HERE) / 3600
    assert hours < 2 * 11  # of one core; two are at work


def test_celeba_is_looked_at_seven_times_before_the_end_and_once_with_the_papers_seed():
    study = load_study("celeba64-cosine")
    assert 42 in study.seeds
    options = options_of(study.runs[0])
    assert len(options.output.evaluation_steps) == 7
    assert max(options.output.evaluation_steps) < options.optimizer.max_steps


@pytest.mark.parametrize("name", ["cifar10-edm-alsr", "cifar100-edm-alsr"])
def test_alsr_is_run_as_the_paper_has_it(name):
    study = load_study(name)
    assert study.seeds == [42, 142, 242]
    by_arm = {run.levels["arm"]: options_of(run) for run in study.runs}
    assert by_arm["alsr .05"].weight.set == ("form=cauchy", "alpha=0.05", "center=batch")
    assert by_arm["baseline"].weight.method == "edm"
    assert by_arm["log-uniform"].process.time_density == "log_uniform"
    optimizer = by_arm["alsr .1"].optimizer
    assert (optimizer.max_steps, optimizer.train_batch_size, optimizer.ema_decay) == (60_000, 128, 0.9995)


@pytest.mark.parametrize("name", ["optimal-digits", "cifar10-optimal"])
def test_the_optimal_loss_is_compared_with_plain_recipes(name):
    by_arm = {run.levels["arm"]: options_of(run) for run in load_study(name).runs}
    asked = {arm: (o.process.time_density, o.weight.method, o.sampler.importance) for arm, o in by_arm.items()}
    assert asked["edm optimal"] == ("log_uniform", "optimal_loss", "gap")
    assert asked["edm"][:2] == ("log_normal", "edm")
    assert asked["flow optimal"][1:] == ("optimal_loss", "gap")
    assert asked["flow"][1] == "native"
    assert {asked[arm][2] for arm in ("edm", "flow")} <= {None, "none"}


def test_factors_are_crossed():
    study = load_study("factorial-digits")
    assert len(study.runs) == 3 * 4 * 2 * len(study.seeds)
    by_arm = {tuple(run.levels.values()): options_of(run) for run in study.runs[:24]}
    ruled = by_arm["edm", "auto", "rule"]
    assert (ruled.process.process, ruled.weight.method, ruled.sampler.importance) == ("edm", "auto", "gradient")
    assert by_arm["v", "ddpm", "base"].process.prediction_type == "v_prediction"


def test_sizes_are_those_of_the_models():
    study = load_study("scaling-digits")
    (sizes,) = [item["sizes"] for item in study.analyses if item.get("unit") == "parameters"]
    for run in study.runs[: len(sizes)]:
        model = make_model(options_of(run))
        assert sum(parameter.numel() for parameter in model.parameters()) == sizes[run.levels["size"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_lists_every_run(name, tmp_path, capsys, monkeypatch):
    where = ["--runs-dir", str(tmp_path / "runs"), "--results-dir", str(tmp_path)]
    monkeypatch.setattr(reproduce, "load_study", load_study)
    reproduce.main([name, "--dry-run", *where])
    said = capsys.readouterr().out
    runs = load_study(name).runs
    assert all(f"{run.name} " in said for run in runs)
    assert f"{len(runs)} runs: {len(runs)} to do." in said
    assert ("hours are left" in said) == (name in HERE)
    assert not list(tmp_path.iterdir())


def test_the_guide_has_every_study_effect_and_analysis():
    guide = (EXAMPLES / "guides" / "experiments.md").read_text()
    assert [name for name in (*NAMES, *study_claims.EFFECTS, *ANALYSES) if f"`{name}`" not in guide] == []


def test_the_study_of_the_guide_is_one(tmp_path):
    guide = (EXAMPLES / "guides" / "experiments.md").read_text()
    path = tmp_path / "my-study.yaml"
    path.write_text(guide.split("```yaml\n")[1].split("```")[0])
    study = read_study(str(path))
    assert len(study.runs) == 6
    assert options_of(study.runs[0]).output.features == ("lite0",)
    assert study.claims[0]["effect"] in study_claims.EFFECTS
    write_report(study, [], tmp_path, "")
    assert "**too few runs yet**" in (tmp_path / "README.md").read_text()
