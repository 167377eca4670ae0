"""What results are written with."""

import subprocess

from snrweights.integrations.results import commit_of


def test_the_commit_is_that_of_the_code_and_says_when_the_code_was_changed(tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert commit_of(tmp_path) is None
    git("init", "-q")
    code, records = tmp_path / "code" / "train.py", tmp_path / "results" / "runs.jsonl"
    for path in (code, records):
        path.parent.mkdir()
        path.write_text("1\n")
    git("add", ".")
    git("commit", "-q", "-m", "Both")
    commit = git("rev-parse", "HEAD").strip()
    assert commit_of(code.parent) == commit
    records.write_text("2\n")  # what a study writes is no change of the code
    assert commit_of(code.parent) == commit
    git("commit", "-q", "-a", "-m", "Results")  # nor is it when committed
    assert commit_of(code.parent) == commit
    code.write_text("2\n")
    assert commit_of(records.parent) == f"{commit}+changes"
    git("checkout", "-q", "code")
    (tmp_path / "code" / "new.py").write_text("3\n")  # nor was this committed
    assert commit_of(tmp_path) == f"{commit}+changes"
