"""The command line's manners: exit codes, one line for a user's mistake, clean standard output, quick help."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import palimpsest.audit.verify
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.results import Audit, Audited
from palimpsest.cli import doctor, main
from palimpsest.metrics.scores import Measure, Row
from palimpsest.metrics.statistics import clustered_mean

TOFU_LOGS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tofu_eval_logs"
HEAVY = {"torch", "transformers", "duckdb", "plotly", "scipy", "numpy"}


class Palimpsest:
    """Runs the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.monkeypatch.setattr(sys, "argv", ["palimpsest", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self.capsys.readouterr()
        return int(end.value.code or 0), out, err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Palimpsest:
    return Palimpsest(monkeypatch, capsys)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    measure = Measure("rouge", "forget", "rouge_l_recall@1", "share", "ROUGE-L", "…", "toward gold")
    values, subjects = [0.5, 0.25, 1.0], ["a", "b", "b"]
    score = clustered_mean(values, subjects, seed=0)
    run = RunFolder(tmp_path / "run")
    rows = zip("123", subjects, values, strict=True)
    run.write_scores([Row("original", measure.key, item, subject, value) for item, subject, value in rows])
    original = Audited("original", "original", "as it was", "f" * 64, {measure.key: score}, {}, None)
    run.write_audit(Audit("a test", (original,), (measure,), (), {}))
    return run


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["metrics", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from palimpsest.cli import main\n"
        f"sys.argv = ['palimpsest', *{arguments!r}]\n"
        "try: main()\n"
        "finally: print(*sorted(set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout
    assert HEAVY & set(done.stderr.split()) == set()


def test_the_installed_command_shows_its_verbs() -> None:
    command = Path(sys.executable).with_name("palimpsest")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert {"verify", "report", "metrics", "doctor"} <= set(done.stdout.split())


def test_the_version(cli: Palimpsest) -> None:
    assert cli("--version") == (0, f"palimpsest {version('palimpsest')}\n", "")


@pytest.mark.parametrize("arguments", [["verfy"], ["verify"], ["verify", "x", "--loud"], ["metrics", "x"]])
def test_a_wrong_call_exits_with_2_and_prints_no_result(cli: Palimpsest, arguments: list[str]) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "") and "Error" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["verify", "no-such-run"], "not a run folder"),
        (["verify", "no-such-run", "--json"], "not a run folder"),
        (["report", "no-such-run"], "audit.json: there is no such file"),
        (["metrics", "tofu-log", "no-such-log.json"], "no-such-log.json"),
    ],
)
def test_a_users_mistake_is_one_line_and_2(cli: Palimpsest, arguments: list[str], what: str) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and what in err


def test_an_interrupt_is_one_line_and_130(cli: Palimpsest, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(palimpsest.audit.verify, "verify", interrupt)
    assert cli("verify", run.path) == (130, "", "error: interrupted\n")


def test_what_nobody_foresaw_keeps_its_traceback(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palimpsest.audit.verify, "verify", lambda _: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["palimpsest", "verify", str(run.path)])
    with pytest.raises(ZeroDivisionError):
        main()


def test_verify_passes_a_whole_run_and_fails_an_edited_one(cli: Palimpsest, run: RunFolder) -> None:
    code, out, _ = cli("verify", run.path)
    assert code == 0 and out.splitlines()[-1] == "all 5 checks passed" and "FAIL" not in out
    page = run.path / "audit.json"
    page.write_text(page.read_text().replace("a test", "a feat"))
    code, out, _ = cli("verify", run.path)
    assert code == 1 and out.splitlines()[-1] == "1 of 5 checks failed"
    assert [line.split()[1] for line in out.splitlines() if line.startswith("FAIL")] == ["audit.json"]


def test_verify_as_json_prints_one_object_and_nothing_else(cli: Palimpsest, run: RunFolder) -> None:
    (run.path / "notes.txt").write_text("mine")
    code, out, err = cli("verify", run.path, "--json")
    found = json.loads(out)
    assert (code, err, found["ok"], found["run"]) == (1, "", False, str(run.path))
    assert [check["name"] for check in found["checks"] if not check["ok"]] == ["notes.txt"]


def test_report_is_drawn_from_the_audit_and_recorded_again(cli: Palimpsest, run: RunFolder) -> None:
    page = run.path / "report.html"
    page.write_text("an old report that nobody recorded")
    assert cli("verify", run.path)[0] == 1
    assert cli("report", run.path)[:2] == (0, f"{page}\n")
    assert "a test" in page.read_text() and "an old report" not in page.read_text()
    assert cli("verify", run.path)[0] == 0
    assert json.loads(cli("report", run.path, "--json")[1]) == {"report": str(page)}
    assert cli("verify", run.path)[0] == 0


@pytest.mark.skipif(not TOFU_LOGS.is_dir(), reason="the TOFU evaluation logs are not beside this project")
def test_tofu_logs_published_numbers_are_printed_as_json(cli: Palimpsest) -> None:
    log, retain = (TOFU_LOGS / f"ft_epoch5_lr1e-05_llama2-7b_{which}_wd0.01.json" for which in ("full", "retain90"))
    code, out, err = cli("metrics", "tofu-log", log, "--retain", retain)
    found = json.loads(out)
    assert (code, err) == (0, "")
    # GOLDEN.md beside the logs, recomputed there with numpy and scipy.
    assert found["model_utility_geo"] == pytest.approx(0.622677, abs=5e-7)
    assert found["forget_truth_ratio_arith"] == pytest.approx(0.530370, abs=5e-7)
    assert found["forget_quality_geo"] == pytest.approx(1.834066e-21, rel=1e-6)
    assert "forget_quality_geo" not in json.loads(cli("metrics", "tofu-log", log)[1])


def test_doctor_measures_this_machine_and_leaves_it_as_it_was(cli: Palimpsest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SIZE", 128)
    threads = torch.get_num_threads()
    code, out, err = cli("doctor", "--json")
    found = json.loads(out)
    assert (code, err, found["ok"], found["torch_works"]) == (0, "", True, True)
    assert torch.get_num_threads() == threads == found["threads"]
    assert {f"cpu {kind}, 1 thread" for kind in ("fp32", "bf16")} <= set(found["gflops"])
    assert all(speed > 0 for speed in found["gflops"].values())
    installed = {package["name"]: package["installed"] for package in found["packages"]}
    assert installed["torch"] == version("torch")


def test_doctor_for_people_names_what_is_missing_or_too_old(cli: Palimpsest, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(name: str) -> str:
        if name in ("duckdb", "datasets"):
            raise PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else version(name)

    monkeypatch.setattr(doctor, "SIZE", 64)
    monkeypatch.setattr(doctor, "version", pretend)
    code, out, _ = cli("doctor")
    failed = [line.split()[1:3] for line in out.splitlines() if line.startswith("FAIL")]
    assert code == 1
    assert failed == [["duckdb", "not"], ["transformers", "4.57.1"]]  # datasets belongs to an extra
    assert "GFLOP/s" in out


def test_doctor_says_so_when_the_arithmetic_is_wrong(cli: Palimpsest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SIZE", 64)
    monkeypatch.setattr(torch, "ones", lambda *_, **options: torch.full((64, 64), 2.0, **options))
    code, out, _ = cli("doctor", "--json")
    assert code == 1 and json.loads(out)["torch_error"] == "a matrix product gave 256.0 where 64 is right"
