"""Evaluations over the course of a run: what they write, what they leave alone, and how they survive."""

import json
import resource
import shutil

import pytest
import torch
from snrweights.integrations.clock import Clock
from snrweights.integrations.comparison import Comparison
from snrweights.integrations.distances import frechet_distance, kernel_distance
from snrweights.integrations.results import to_floats
from training import TINY, assert_bit_equal, final_state, main, start

pytestmark = pytest.mark.slow
STEPS = 5
RUN = [*TINY, "--max-steps", str(STEPS), "--checkpointing-steps", "2", "--checkpoints-total-limit", "9"]
EVALUATED = [*RUN, "--evaluation-steps", "2", "3", "--evaluation-samples", "6", "2", "--num-samples", "4"]
COUNTS = {2: {2, 6}, 3: {2, 6}, 5: {2, 4, 6}}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run):
    """Return step -> distances, without what takes another time in every run."""
    found = [line for line in lines(run) if "evaluation_seconds" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: {k: v for k, v in line.items() if k.startswith(("fd", "kid"))} for line in found}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "run"
    main([*EVALUATED, "--output-dir", str(output)])
    return output


def test_distances_stand_under_their_count_and_the_last_in_the_results(run):
    found = evaluations(run)
    assert {step: {int(key.split("_")[2]) for key in line} for step, line in found.items()} == COUNTS
    names = {"fd_pixels_6", "kid_pixels_6", "kid_pixels_6_standard_error"}
    assert {key for key in found[2] if "_6" in key} == names
    assert {key for key in found[5] if "_6" in key} == names | {f"{name}_real_vs_real" for name in names}
    results = json.loads((run / "results.json").read_text())
    assert found[5].items() <= results.items()
    assert found[2]["fd_pixels_6"] != found[3]["fd_pixels_6"]


def test_a_run_ends_with_the_same_bits_as_one_without_evaluations(run, tmp_path):
    main([*RUN, "--output-dir", str(tmp_path / "run")])
    for step in (2, 4, 5):
        assert_bit_equal(final_state(run, step), final_state(tmp_path / "run", step))
    assert list(evaluations(tmp_path / "run")) == [5]
    assert evaluations(tmp_path / "run")[5]["fd_pixels_4"] == evaluations(run)[5]["fd_pixels_4"]


def test_the_end_is_evaluated_in_the_way_of_the_steps_before_it(run, tmp_path):
    """From the averaged weights of the checkpoint, which those that are trained are not."""
    main([*EVALUATED, "--output-dir", str(tmp_path / "run"), "--max-steps", "3", "--lr-scheduler", "cosine"])
    state = final_state(tmp_path / "run", 3)
    saved = [state[name] for name in sorted(state) if name.startswith("saved.")]
    average = {value.data_ptr(): value for name, value in state.items() if name.startswith("ema.")}
    assert all(any(torch.equal(value, other) for other in average.values()) for value in saved)
    live = {name.removeprefix("model.").replace("model.", "") for name in state if name.startswith("model.")}
    assert not all(torch.equal(state[f"saved.{name}"], state[f"model.model.{name}"]) for name in live)


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_makes_the_evaluations_that_are_missing_and_no_other(run, tmp_path, step):
    output = tmp_path / "run"
    shutil.copytree(run, output)
    for checkpoint in (output / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    marked = [{**line, "fd_pixels_6": -1.0} if "fd_pixels_6" in line else line for line in lines(run)]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in marked))
    main([*EVALUATED, "--output-dir", str(output), "--resume", "latest"])
    values = {number: line["fd_pixels_6"] for number, line in evaluations(output).items()}
    expected = {n: -1.0 if n <= step else line["fd_pixels_6"] for n, line in evaluations(run).items()}
    assert values == expected


def test_an_evaluation_that_a_kill_prevented_after_its_checkpoint_is_made_up_for(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / "run" / "checkpoints" / "step-00000002")
    main([*EVALUATED, "--output-dir", str(tmp_path / "run"), "--resume", "latest"])
    assert evaluations(tmp_path / "run") == evaluations(run)


def test_what_is_asked_for_anew_is_evaluated_anew(run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(run, output)
    main([*EVALUATED, "--output-dir", str(output), "--resume", "latest", "--num-inference-steps", "3"])
    found = [line for line in lines(output) if "evaluation_seconds" in line and line["step"] == STEPS]
    assert [line["num_inference_steps"] for line in found] == [2, 3]
    results = json.loads((output / "results.json").read_text())
    assert results["fd_pixels_4"] == found[1]["fd_pixels_4"] != found[0]["fd_pixels_4"]


def no_room_from_sampling_on():
    """Let no file grow beyond a thousand bytes once images are sampled: to a writer the same as a full disk."""
    import evaluation

    sample = evaluation.sample_images

    def sample_and_fill(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return sample(*args, **kwargs)

    evaluation.sample_images = sample_and_fill


def test_a_disk_that_fills_up_while_sampling_leaves_a_run_that_can_be_resumed(run, tmp_path):
    output = tmp_path / "run"
    child = start([*EVALUATED, "--output-dir", str(output)], before=no_room_from_sampling_on, output=tmp_path / "said")
    child.join()
    assert child.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert "The evaluation after step 2 could not be written" in said
    assert "--resume latest" in said
    assert not (output / "results.json").exists()
    main([*EVALUATED, "--output-dir", str(output), "--resume", "latest"])
    assert evaluations(output) == evaluations(run)
    assert_bit_equal(final_state(output, STEPS), final_state(run, STEPS))


def test_more_samples_than_images_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="2000 samples are to be compared with as many of 1793 images"):
        main([*RUN, "--output-dir", str(tmp_path / "run"), "--num-samples", "2000"])
    with pytest.raises(SystemExit, match="`--evaluation-samples` must be > 1, got"):
        main([*RUN, "--output-dir", str(tmp_path / "run"), "--evaluation-samples", "5", "1"])


def test_the_clock_stands_still_in_a_pause(monkeypatch):
    now = iter([100.0, 107.0, 117.0, 120.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock("cpu", seconds=5.0)
    with clock.paused():
        assert clock.seconds == clock.seconds == 12.0
    assert clock.seconds == 15.0


class Images(torch.utils.data.Dataset):
    """So many random images, and how often each was asked for."""

    def __init__(self, count):
        self.images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.asked = [0] * count

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked[index] += 1
        return self.images[index], 0


def test_a_comparison_is_the_distances_of_the_first_images_of_an_order():
    images = Images(20)
    comparison = Comparison(images, features=["pixels"], order=torch.Generator().manual_seed(1), batch_size=3)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    samples = torch.randint(256, (8, 1, 4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    real = images.images[order].flatten(1)
    fake = to_floats(samples).flatten(1)
    found = comparison.distances(samples, [5, 8])
    for n in (5, 8):
        assert found[f"fd_pixels_{n}"] == frechet_distance(fake[:n], real[:n])
        both = (found[f"kid_pixels_{n}"], found[f"kid_pixels_{n}_standard_error"])
        assert both == kernel_distance(fake[:n], real[:n])
    floors = comparison.floors([5, 8, 11])
    assert floors["fd_pixels_5_real_vs_real"] == frechet_distance(real[5:10], real[:5])
    assert not any("11" in key for key in floors)  # of 20 images there are not as many others
    comparison.distances(samples, [8])
    assert sorted(images.asked) == [0] * 4 + [1] * 16
    with pytest.raises(ValueError, match="`counts` must each be at least 2 and at most the 8 samples"):
        comparison.distances(samples, [9])
