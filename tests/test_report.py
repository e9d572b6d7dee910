"""The report: events read back, figures of a run, plots, the page, what a terminal shows."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_command_line import Terminal, hdb

from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, Group, RoundBook, Stage, plan_training
from hpc_hdb.report.events import read_events
from hpc_hdb.report.plots import plot_rate
from hpc_hdb.report.progress import Progress
from hpc_hdb.report.report import Report, write_report
from hpc_hdb.report.runs import load_runs
from hpc_hdb.report.summary import summarise
from hpc_hdb.report.tables import plan_lines, plan_table, result_lines, role_table
from hpc_hdb.report.time_plots import plot_roles
from hpc_hdb.report.timeline import worker_rounds
from hpc_hdb.report.units import format_number, format_seconds, format_together

__all__ = ["hdb"]

PLOTS = {"accuracy", "loss", "rate", "roles", "stages", "timeline"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs at two resolutions on the virtual cluster, by the real command."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    settings = [
        f"run.output={folder}",
        f"data.path={folder.parent / 'data'}",
        "run.threads=1",
        "schedule.epochs=4",
        "schedule.milestones=[2]",
        "plan.timing={16=[4e-4,2e-3],24=[7e-4,2e-3]}",
    ]
    command = [sys.executable, "-c", "from hpc_hdb.cli import main; main()", "train", "digits"]
    for setting in settings:
        command += ["--set", setting]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


# Logs written by hand: one large-batch worker (1) and one small-batch worker (2), each with
# two rounds an epoch.


def start(time: float = 0.0, **values: Any) -> dict[str, Any]:
    return {
        "event": "start", "time": time, "mode": "mpi", "sync": "asp", "workers": 2,
        "small_workers": 1, "commits_per_epoch": 4, "device": "cpu", "versions": {"torch": "2"},
    } | values  # fmt: skip


def stage(number: int, time: float, commit: int, resolution: int) -> dict[str, Any]:
    return {
        "event": "stage", "time": time, "commit": commit, "stage": number, "start_epoch": number,
        "end_epoch": number + 1, "learning_rate": 0.1, "resolution": resolution, "dropout": 0.0,
        "large_batch": 64, "small_batch": 16,
    }  # fmt: skip


def commit(number: int, time: float, worker: int, train: float, **values: Any) -> dict[str, Any]:
    return {
        "event": "commit", "time": time, "commit": number, "epochs": number / 4, "worker": worker,
        "group": "large" if worker == 1 else "small", "epoch": 0, "part": 0, "stage": 0,
        "learning_rate": 0.1, "pulled_at": max(0, number - 2), "resolution": 16,
        "batch": 64 if worker == 1 else 16, "samples": 100, "loss": 1.0,
        "predicted_seconds": 1.0, "train_seconds": train, "data_seconds": 0.0,
        "rebuild_seconds": 0.0, "checkpoint_seconds": 0.0, "wait_seconds": 0.0,
        "communicate_seconds": 0.0,
    } | values  # fmt: skip


def evaluation(number: int, time: float, accuracy: float, loss: float = 1.0) -> dict[str, Any]:
    return {
        "event": "evaluation", "time": time, "commit": number, "epoch": number / 4,
        "accuracy": accuracy, "loss": loss, "seconds": 0.5,
    }  # fmt: skip


def leave(worker: int, time: float, **values: Any) -> dict[str, Any]:
    group = "large" if worker == 1 else "small"
    return {"event": "leave", "time": time, "worker": worker, "group": group} | values


def write_log(folder: Path, *events: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events.jsonl").write_text(lines)
    return folder


def printed(shown: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def check_page(report: Report) -> str:
    """The page is well-formed, and nothing in it is fetched from elsewhere or runs."""
    text = report.page.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert not list(root.iter("script"))
    for element in root.iter():
        for name in ("src", "href"):
            assert element.get(name, "data:").startswith("data:")
    assert len(list(root.iter("img"))) == len(report.plots)
    return text


def check_plots(report: Report) -> None:
    assert report.plots
    for path in report.plots:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] > 800
        assert pixels.std() > 10, f"{path} is blank"


def test_a_run_gets_a_page_with_its_figures_and_six_plots(run: Path) -> None:
    report = write_report([run])

    assert report.page == run / "report.html"
    assert {path.stem for path in report.plots} == PLOTS
    assert all(path.parent == run / "plots" for path in report.plots)
    check_plots(report)
    page = check_page(report)
    last = [event for event in read_events(run) if event["event"] == "evaluation"][-1]
    assert f"{last['accuracy']:.2%}" in page
    assert f"{last['accuracy']:.2%}" in printed(report)
    assert "schedule.milestones" in page
    assert "torchvision" in page


def test_the_summary_of_a_run_agrees_with_its_log(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    events = read_events(run)

    assert summary == json.loads(json.dumps(summarise(events)))
    assert summary["state"] == "finished"
    assert summary["epochs"] == 4
    assert summary["commits"] == 12
    assert summary["images"] == 4 * events[0]["samples"]
    assert [row["resolution"] for row in summary["stages"]] == [16, 24, 16, 24]
    for row in summary["stages"]:  # the virtual clock keeps to the plan
        assert row["measured_epoch_seconds"] == pytest.approx(row["predicted_epoch_seconds"])


def test_several_runs_are_compared_and_hostile_names_stay_text(run: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>$&[red]"
    shutil.copytree(run, hostile)
    config = hostile / "config.toml"
    config.write_text(config.read_text().replace('sync = "asp"', 'sync = "</td>"'))

    report = write_report([run, hostile, run], tmp_path / "out")

    assert report.page == tmp_path / "out" / "report.html"
    check_plots(report)
    page = check_page(report)
    assert "<script>" not in page
    assert page.index("Comparison of 2 runs") < page.index("&lt;script&gt;$&amp;[red]")
    assert "&lt;/td&gt;" in page  # a setting in which they differ
    text = printed(report)
    assert "<script>$&[red]" in text
    assert re.search(r"server.sync\W+asp\W+</td>", text)


def test_commands_print_the_path_of_a_run_as_it_is(
    run: Path, hdb: Terminal, tmp_path: Path
) -> None:
    hostile = Path("runs[old]/:cat:")
    shutil.copytree(run, tmp_path / hostile)
    assert hdb("evaluate", hostile).out.startswith(f"{hostile}/model.pt: accuracy ")
    assert f"report: {hostile}/report.html\n" in hdb("report", hostile).out


def test_several_runs_are_reported_in_the_current_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    monkeypatch.chdir(tmp_path)
    assert write_report([run, other]).page == Path("report/report.html")


def test_stages_and_roles_are_what_a_hand_count_gives() -> None:
    summary = summarise(
        [
            start(),
            stage(0, 0.0, 0, 16),
            commit(1, 1.1, 1, train=1.0, data_seconds=0.2, wait_seconds=0.1),
            commit(2, 2.0, 2, train=2.0, server_wait_seconds=0.6, server_communicate_seconds=0.2),
            commit(3, 2.4, 1, train=1.2, part=1, checkpoint_seconds=0.1),
            stage(1, 2.4, 3, 24),
            commit(4, 4.2, 2, train=2.1, part=1, communicate_seconds=0.1),
            evaluation(4, 4.5, accuracy=0.6),
            commit(5, 4.4, 1, train=2.0, stage=1, resolution=24, predicted_seconds=1.5),
            commit(6, 7.2, 2, train=3.0, stage=1, resolution=24, predicted_seconds=1.4),
            leave(1, 4.5, wait_seconds=0.1),
            leave(2, 7.2),
            evaluation(6, 8.0, accuracy=0.5, loss=2.0),
            {"event": "end", "time": 8.0, "commit": 6, "server_wait_seconds": 0.3},
        ]
    )

    assert summary["epochs"] == 1.5
    assert summary["images_per_second"] == 600 / 8
    assert (summary["final_accuracy"], summary["final_loss"]) == (0.5, 2.0)
    assert (summary["best_accuracy"], summary["best_epoch"]) == (0.6, 1.0)
    first, second = summary["stages"]
    assert first["groups"]["large"] == pytest.approx({"predicted": 2.0, "measured": 2.2})
    assert first["groups"]["small"] == pytest.approx({"predicted": 2.0, "measured": 4.1})
    assert first["measured_epoch_seconds"] == pytest.approx(4.1)
    # one round each of this stage: an epoch would take two
    assert second["groups"]["large"] == pytest.approx({"predicted": 3.0, "measured": 4.0})
    assert second["predicted_epoch_seconds"] == pytest.approx(3.0)
    large, small = summary["roles"]["large"], summary["roles"]["small"]
    assert large["train"] == pytest.approx(4.2)
    assert large["data"] == pytest.approx(0.2)
    assert large["wait"] == pytest.approx(0.1 + 0.1 + 3.5)  # gone at 4.5 of 8.0 seconds
    assert large["overhead"] == pytest.approx(1 - 4.2 / 8)
    assert small["train"] == pytest.approx(7.1)
    assert small["wait"] == pytest.approx(0.8)
    assert summary["overhead"] == pytest.approx(1 - (4.2 + 7.1) / 16)
    server = {"workers": 1, "evaluate": 1.0, "wait": pytest.approx(0.9), "communicate": 0.2}
    assert summary["roles"]["server"] == server


def test_roles_count_the_ranks_that_share_batches(tmp_path: Path) -> None:
    log = [start(ranks_per_worker=4), commit(1, 1.0, 1, train=1.0), commit(2, 2.0, 2, train=2.0)]
    (run,) = load_runs([write_log(tmp_path / "run", *log)])
    assert re.search(r"ranks\W+1\W+4\W+4", printed(role_table(run.summary)))
    figure = plot_roles([run])
    assert figure is not None
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["large batch (4 ranks)", "small batch (4 ranks)"]


def test_a_worker_that_is_lost_again_after_a_resume_counts_once() -> None:
    dropped = [{"event": "dropped", "time": 1.0, "worker": w} for w in (1, 2, 1, 2)]
    assert result_lines(summarise([start(), *dropped])).endswith(
        "\n2 workers of 2 lost on the way: 1, 2"
    )


def test_a_wait_before_the_clock_started_is_not_counted() -> None:
    summary = summarise([start(), commit(1, 2.0, 1, train=1.5, wait_seconds=30.0)])
    assert summary["roles"]["large"]["wait"] == pytest.approx(0.5)
    assert summary["roles"]["large"]["other"] == 0
    assert summary["overhead"] == pytest.approx(0.25)


def test_the_virtual_clock_counts_only_what_it_simulates() -> None:
    real = {"data_seconds": 0.3, "checkpoint_seconds": 0.4, "rebuild_seconds": 0.5}
    log = [start(mode="virtual"), commit(1, 2.0, 1, train=2.0, **real)]
    summary = summarise(log)
    assert summary["overhead"] == 0
    assert summary["roles"]["large"]["checkpoint"] == 0


def test_a_resumed_log_reads_as_one_run(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "run",
        start(),
        stage(0, 0.0, 0, 16),
        commit(1, 1.0, 1, train=1.0),
        commit(2, 2.0, 2, train=2.0),
        commit(3, 2.5, 1, train=1.5),  # after the checkpoint: done again
        evaluation(3, 2.6, accuracy=0.1),
        leave(1, 2.7, wait_seconds=0.2),
        {"event": "interrupted", "time": 2.8, "signal": "SIGTERM"},
        start(2.0),
        {"event": "resume", "time": 2.0, "commit": 2, "seconds": 2.0},
        stage(0, 2.0, 2, 16),
        commit(3, 3.0, 1, train=0.9),
        commit(4, 4.0, 2, train=1.9),
        evaluation(4, 4.2, accuracy=0.7),
        leave(1, 4.0, wait_seconds=1.0),
        leave(2, 4.0),
        {"event": "end", "time": 4.2, "commit": 4},
    )
    (loaded,) = load_runs([log])
    assert [event["commit"] for event in loaded.commits] == [1, 2, 3, 4]
    assert [event["stage"] for event in loaded.stages] == [0]
    assert loaded.summary["state"] == "finished"
    assert loaded.summary["best_accuracy"] == 0.7
    assert loaded.summary["roles"]["large"]["train"] == pytest.approx(1.9)
    assert loaded.summary["roles"]["large"]["wait"] == pytest.approx(1.2)
    assert loaded.summary["roles"]["large"]["other"] == pytest.approx(4.2 - 1.9 - 1.2)
    assert loaded.summary["overhead"] == pytest.approx(1 - 5.8 / 8.4)
    check_plots(write_report([log]))


@pytest.mark.parametrize(
    ("events", "state", "plots"),
    [
        ([], "unfinished", set()),
        ([start()], "unfinished", set()),
        (
            [start(), stage(0, 0, 0, 16), commit(1, 1.0, 1, train=1.0)],
            "unfinished",
            PLOTS - {"accuracy"},
        ),
        (
            [
                start(),
                stage(0, 0, 0, 16),
                commit(1, 1.0, 1, train=1.0),
                evaluation(1, 1.2, accuracy=0.3),
                leave(1, 1.5),
                {"event": "interrupted", "time": 1.6, "signal": "SIGTERM"},
            ],
            "interrupted",
            PLOTS,
        ),
        ([commit(1, 1.0, 1, train=1.0)], "unfinished", PLOTS - {"accuracy", "stages"}),
    ],
    ids=["empty", "just started", "not evaluated", "interrupted", "first lines lost"],
)
def test_a_run_that_has_not_ended_can_be_reported(
    tmp_path: Path, events: list[dict], state: str, plots: set[str]
) -> None:
    report = write_report([write_log(tmp_path / "run", *events)])
    assert {path.stem for path in report.plots} == plots
    assert f"This run is {state}" in check_page(report)
    assert f"({state})" in printed(report)


def test_an_unfinished_run_shows_its_state_beside_a_finished_one(run: Path, tmp_path: Path) -> None:
    other = write_log(tmp_path / "other", start(), commit(1, 1.0, 1, train=1.0))
    text = printed(write_report([run, other], tmp_path / "out"))
    assert re.search(r"state\W+finished\W+unfinished", text)


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", start(), commit(1, 1.0, 1, train=1.0))
    with (folder / "events.jsonl").open("ab") as file:
        file.write(
            b'\xff\x00garbage\n12\n[]\n{"event": "commit", "time": 1}\n{"event": "resume"}\n'
        )
        file.write(json.dumps(commit(2, 2.0, 1, train=1.0)).encode() + b'\n{"event": "comm')
    assert [event["event"] for event in read_events(folder)] == ["start", "commit", "commit"]


def test_what_is_no_run_folder_is_one_line_to_the_user(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (tmp_path, tmp_path / "missing", file):
        with pytest.raises(
            UserError, match=r"is not a run folder: it has no events\.jsonl"
        ) as caught:
            write_report([path])
        assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_one_line_to_the_user(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", start(), commit(1, 1.0, 1, train=1.0))
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot write the report into .*taken"):
        write_report([folder], tmp_path / "taken")


@pytest.mark.parametrize(("sync", "end_of_first"), [("asp", 3.0), ("ssp", 3.0), ("bsp", 2.0)])
def test_rounds_end_when_the_worker_was_done(
    tmp_path: Path, sync: str, end_of_first: float
) -> None:
    """Under BSP the server logs a commit when the last worker is there."""
    folder = write_log(
        tmp_path,
        start(sync=sync),
        commit(1, 3.0, 1, train=1.0),
        commit(2, 3.0, 2, train=3.0),
        commit(3, 5.0, 1, train=1.5, wait_seconds=1.0),
    )
    rounds = worker_rounds(load_runs([folder])[0])
    assert rounds[1][0] == pytest.approx((end_of_first - 1.0, end_of_first, 16))
    assert rounds[1][1] == pytest.approx((3.5, 5.0, 16))
    assert rounds[2] == [pytest.approx((0.0, 3.0, 16))]


@pytest.mark.parametrize(
    ("decay", "large", "small"),
    [
        (
            "step",
            [(0, 0.4), (0.5, 0.4), (0.5, 0.04), (1, 0.04)],
            [(0, 0.1), (0.25, 0.1), (0.25, 0.01), (1, 0.01)],
        ),
        ("cosine", [(0, 0.4), (0.5, 0.04)], [(0, 0.1), (0.25, 0.01)]),
    ],
)
def test_the_rates_of_rounds_are_drawn_where_the_rounds_began(
    tmp_path: Path, decay: str, large: list, small: list
) -> None:
    """With step decay they fall at once."""
    folder = write_log(
        tmp_path,
        start(),
        commit(1, 1.0, 1, train=1.0, pulled_at=0, learning_rate=0.4),
        commit(2, 1.0, 2, train=1.0, pulled_at=0, learning_rate=0.1),
        commit(3, 2.0, 2, train=1.0, pulled_at=1, learning_rate=0.01),
        commit(4, 2.0, 1, train=1.0, pulled_at=2, learning_rate=0.04),
    )
    config = f'[schedule]\ndecay = "{decay}"\nscale_with_batch = "linear"\n'
    (folder / "config.toml").write_text(config)
    figure = plot_rate(load_runs([folder]))
    assert figure is not None
    drawn = {line.get_label(): list(map(tuple, line.get_xydata())) for line in figure.axes[0].lines}
    assert drawn == {"large batch": large, "small batch": small}


def test_where_the_groups_have_the_same_rate_there_is_one_line(run: Path) -> None:
    figure = plot_rate(load_runs([run]))
    assert figure is not None
    (line,) = figure.axes[0].lines
    points = list(map(tuple, line.get_xydata()))
    assert {(0, 0.1), (2, 0.1), (2, 0.01), (4, 0.01)} <= set(points)
    assert all(rate == 0.1 for epoch, rate in points if epoch < 2)
    assert all(rate == 0.01 for epoch, rate in points if epoch > 2)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.00025, "0.250 ms"),
        (0.0234, "23.4 ms"),
        (0.234, "0.234 s"),
        (9.896, "9.90 s"),
        (99.96, "1 min 40 s"),
        (3599.7, "1 h 00 min"),
        (33975.0, "9 h 26 min"),
    ],
)
def test_durations_keep_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_numbers_to_compare_share_a_unit() -> None:
    assert format_together([0.0498, 0.00312]) == "49.8 / 3.12 ms"
    assert format_together([0.2, 0.3]) == "0.200 / 0.300 s"
    assert format_number(0.0002) == "<0.001"
    assert format_number(1434.2) == "1434"


def make_plan(small_workers: int = 1) -> Any:
    stages = [Stage(0, 105, 0.1, 160, 0.1, 2330), Stage(105, 140, 0.01, 288, 0.3, 740)]
    timing = {160: BatchTime(4e-4, 0.05), 288: BatchTime(2e-3, 0.06)}
    return plan_training(stages, timing, 1_281_167, 4, small_workers, 1.05)


def test_a_plan_names_its_workers_and_fits_80_columns() -> None:
    assert "3 large-batch workers, 1 small-batch worker (" in plan_lines(make_plan())
    assert "small" not in plan_lines(make_plan(small_workers=0))
    assert "large" not in plan_lines(make_plan(small_workers=4))
    lines = [*plan_lines(make_plan()).splitlines(), *printed(plan_table(make_plan())).splitlines()]
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_all_of_the_closing_tables_is_legible_on_80_columns() -> None:
    numbers = dict.fromkeys(("train", "data", "wait", "communicate", "rebuild"), 98765.4)
    role = numbers | {"checkpoint": 98765.4, "evaluate": 0.0, "workers": 128, "overhead": 0.123}
    roles = {"server": role, "large": role, "small": role}
    table = role_table({"mode": "mpi", "ranks_per_worker": 1, "roles": roles})
    text = printed(table)
    assert "…" not in text
    for word in ("training", "loading", "waiting", "communicating", "rebuilding", "evaluating"):
        assert word in text
    assert text.count("98765") == 3 * 6


def test_the_results_fit_two_lines_of_80_columns() -> None:
    summary = {
        "epochs": 104.667, "seconds": 33975.0, "state": "interrupted", "overhead": 0.1234,
        "images_per_second": 12345.6, "final_accuracy": 0.6789, "best_accuracy": 0.6789,
        "best_epoch": 103.333, "final_loss": 12.3456,
    }  # fmt: skip
    lines = result_lines(summary).splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80


def watch(console: Console) -> str:
    """What a user sees of a run that was resumed, evaluated once and then ended."""
    progress = Progress(console)
    progress.show({"event": "resume", "time": 1.0, "commit": 2})
    plan = make_plan()
    book = RoundBook(plan.shares, plan.stages, plan.samples)
    for number in range(2):
        book.hand_out(Group.LARGE)
        book.commit(Group.LARGE, number)
    progress.begin(plan, Settings(), book)
    progress.show(commit(3, 1.0, 1, train=1.0))
    progress.show({"event": "progress", "time": 1.5, "worker": 2, "samples": 10})
    progress.show(evaluation(4, 12.3, accuracy=0.4321))
    progress.close()
    progress.close()
    progress.note("in [brackets]")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_progress_is_plain_lines_without_a_terminal() -> None:
    text = watch(Console(file=io.StringIO(), width=100))
    assert "\x1b" not in text
    assert "resumed after commit 2" in text
    assert "[    12.3 s] epoch   1.0 of 140: accuracy 43.21%, loss 1.0000\n" in text
    assert "in [brackets]" in text


def test_progress_on_a_terminal_keeps_the_evaluations_above_the_bars() -> None:
    text = watch(Console(file=io.StringIO(), width=80, force_terminal=True))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "[    12.3 s] epoch   1.0 of 140: accuracy 43.21%, loss 1.0000" in plain
    assert "epoch 0.5 of 140" in plain
    assert "worker 4, small batch" in plain
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("in_script", [False, True], ids=["rank", "rank in a script"])
@pytest.mark.parametrize("terminal", [False, True], ids=["to a file", "on a terminal"])
def test_bars_are_for_ranks_whose_launcher_writes_to_a_terminal(
    terminal: bool, in_script: bool, tmp_path: Path
) -> None:
    """A launcher: a process outside the job that pipes what its ranks print."""
    answer = tmp_path / "answer"
    ask = (
        "import sys; from hpc_hdb.report.terminal import find_console; "
        f"open({str(answer)!r}, 'w').write(str(find_console().is_terminal))"
    )
    rank = [sys.executable, "-c", ask]
    if in_script:
        rank = ["sh", "-c", '"$@"; true', "sh", *rank]
    launch = (
        "import os, subprocess; subprocess.run("
        f"{rank!r}, env=os.environ | {{'OMPI_COMM_WORLD_SIZE': '2'}}, stdout=subprocess.PIPE)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMPI_")}
    if terminal:
        output, device = pty.openpty()
        os.set_inheritable(device, True)
        subprocess.run(["stty", "cols", "90", "rows", "30"], stdin=device, check=True)
    else:
        output = device = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    try:
        subprocess.run(
            [sys.executable, "-c", launch], stdout=device, env=environment, check=True, timeout=60
        )
    finally:
        for descriptor in {output, device}:
            os.close(descriptor)
    assert answer.read_text() == str(terminal)
