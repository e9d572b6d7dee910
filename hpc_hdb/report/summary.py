"""The figures of a run, from its events alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hpc_hdb.report.events import Event

ACTIVITIES = ("train", "data", "wait", "communicate", "rebuild", "checkpoint", "evaluate")
"""What a role's time is measured to go into; `data` (waiting for images) is part of `train`."""

_REAL_CLOCK = ("data", "rebuild", "checkpoint")
"""What the virtual clock does not count, and is therefore no part of a virtual run's time."""


def summarise(events: Sequence[Event]) -> dict[str, Any]:
    """Accuracy, loss, time of the stages, and seconds per role.

    Parameters
    ----------
    events : sequence of Event
        As `read_events` returns them; of a run that has ended or one that has not.

    Returns
    -------
    dict
        What a run folder's summary.json holds:

        - ``state`` ("finished", "interrupted", or "unfinished": going on, or killed), ``mode``,
          ``sync``, ``servers``, ``workers``, ``small_workers``, ``ranks_per_worker``,
          ``commits``, ``epochs``, ``images``, ``seconds``, ``images_per_second``, ``device``,
          ``versions``
        - once evaluated: ``final_accuracy``, ``final_loss``, ``best_accuracy``, ``best_epoch``
        - where bad images were left out: ``left_out``, their names
        - where workers died or were dropped: ``lost_workers``, their numbers; where others
          took their places, ``replaced_workers``
        - ``stages``: see `_stages`
        - ``roles``: for each role its ``workers``, the mean seconds of one of them in each of
          `ACTIVITIES` and in none of them (``other``: starting up, rounds that an interruption
          undid), in all (``wall``), and ``overhead``, the share of that not spent training;
          ``server`` has the first server's ``wait``, ``communicate`` and ``evaluate`` alone
        - ``overhead``: that share over all workers
    """
    about = run_facts(events)
    commits = [event for event in events if event["event"] == "commit"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    images = sum(event["samples"] for event in commits)
    seconds = events[-1]["time"] if events else 0.0
    done = commits[-1]["commit"] if commits else 0
    summary: dict[str, Any] = {
        "state": _state(events),
        "mode": about["mode"],
        "sync": about["sync"],
        "servers": about["servers"],
        "workers": about["workers"],
        "small_workers": about["small_workers"],
        "ranks_per_worker": about["ranks_per_worker"],
        "commits": done,
        "epochs": round(_epochs(commits, about["commits_per_epoch"]), 3),
        "images": images,
        "seconds": seconds,
        "images_per_second": images / seconds if seconds else 0.0,
        "device": about["device"],
        "versions": about["versions"],
    }
    if evaluations:
        last = max(evaluations, key=lambda event: event["commit"])
        best = max(evaluations, key=lambda event: event["accuracy"])
        summary |= {
            "final_accuracy": last["accuracy"],
            "final_loss": last["loss"],
            "best_accuracy": best["accuracy"],
            "best_epoch": best["epoch"],
        }
    if lost := [event["worker"] for event in events if event["event"] in ("lost", "dropped")]:
        summary["lost_workers"] = lost
    if replaced := [event["worker"] for event in events if event["event"] == "replaced"]:
        summary["replaced_workers"] = replaced
    if left_out := {event["file"] for event in events if event["event"] == "left_out"}:
        summary["left_out"] = sorted(left_out)
    rounds_per_epoch = about["commits_per_epoch"] // about["workers"]
    summary["stages"] = _stages(events, commits, rounds_per_epoch)
    workers = _workers(events, about["mode"] == "virtual")
    evaluating = sum(event["seconds"] for event in evaluations)
    if not about["servers"] and about["mode"] != "virtual":
        for worker in workers.values():  # all ranks evaluate, and time that as waiting
            worker["evaluate"] = evaluating
            worker["wait"] = max(0.0, worker["wait"] - evaluating)
    summary["roles"] = _roles(workers, _server(events, about["servers"], evaluating))
    summary["overhead"] = _overhead(list(workers.values()))
    return summary


def run_facts(events: Sequence[Event]) -> Event:
    """What the ``start`` event says; where that line is missing, what the commits tell."""
    workers = {event["worker"]: event["group"] for event in events if event["event"] == "commit"}
    parts = 1 + max((event.get("part", 0) for event in events), default=0)
    known: Event = {
        "mode": None,
        "sync": None,
        "servers": 1,
        "device": None,
        "versions": {},
        "workers": max(len(workers), 1),
        "small_workers": list(workers.values()).count("small"),
        "ranks_per_worker": 1,
        "commits_per_epoch": max(len(workers), 1) * parts,
    }
    for event in events:
        if event["event"] == "start":
            known |= event
    return known


def _epochs(commits: Sequence[Event], commits_per_epoch: int) -> float:
    """Epochs done."""
    if not commits:
        return 0.0
    return commits[-1].get("epochs", commits[-1]["commit"] / commits_per_epoch)


def _state(events: Sequence[Event]) -> str:
    names = {"end": "finished", "interrupted": "interrupted"}
    return names.get(events[-1]["event"], "unfinished") if events else "unfinished"


def _stages(
    events: Sequence[Event], commits: Sequence[Event], rounds_per_epoch: int
) -> list[dict[str, Any]]:
    """Predicted and measured seconds of an epoch's training in each stage with commits.

    A round belongs to one stage, also where the stage changes within an epoch. A worker's
    epoch takes as long as its rounds of that stage do on average, times the rounds in an
    epoch. The groups train side by side, so the slower one's epoch is the epoch; ``groups``
    holds each one's own.
    """
    stages = {event["stage"]: event for event in events if event["event"] == "stage"}
    rows = []
    for number, stage in sorted(stages.items()):
        groups: dict[str, dict[str, float]] = {}
        for group in ("large", "small"):
            own = [e for e in commits if e["stage"] == number and e["group"] == group]
            if own:
                scale = rounds_per_epoch / len(own)
                groups[group] = {
                    "predicted": scale * sum(e.get("predicted_seconds", 0.0) for e in own),
                    "measured": scale * sum(e["train_seconds"] for e in own),
                }
        if groups:
            rows.append(
                {
                    "stage": number,
                    "start_epoch": stage["start_epoch"],
                    "end_epoch": stage["end_epoch"],
                    "learning_rate": stage.get("learning_rate"),
                    "resolution": stage["resolution"],
                    "large_batch": stage.get("large_batch"),
                    "small_batch": stage.get("small_batch"),
                    "predicted_epoch_seconds": max(g["predicted"] for g in groups.values()),
                    "measured_epoch_seconds": max(g["measured"] for g in groups.values()),
                    "groups": groups,
                }
            )
    return rows


def _workers(events: Sequence[Event], virtual: bool) -> dict[int, dict[str, Any]]:
    """For each worker its ``group``, and its seconds by activity and in all (``wall``).

    A worker may join before the run's clock starts: that wait is not counted. One that has
    left waits for the end of the run: for others that still train, and for the last evaluation.
    """
    workers: dict[int, dict[str, Any]] = defaultdict(lambda: dict.fromkeys(ACTIVITIES, 0.0))
    session, joined, left = 0.0, set[int](), dict[int, float]()
    for event in events:
        if event["event"] == "start":
            session, joined = event["time"], set()
        elif event["event"] in ("commit", "leave"):
            worker, number = workers[event["worker"]], event["worker"]
            spent = {
                activity: event.get(f"{activity}_seconds", 0.0)
                for activity in ACTIVITIES
                if not (virtual and activity in _REAL_CLOCK)
            }
            if number not in joined:
                joined.add(number)
                total = sum(spent.values()) - spent.get("data", 0.0)
                early = max(0.0, total - (event["time"] - session))
                spent["wait"] = max(0.0, spent["wait"] - early)
            for activity, seconds in spent.items():
                worker[activity] += seconds
            worker["group"], worker["wall"] = event["group"], event["time"]
            if event["event"] == "leave":
                left[number] = event["time"]
    if _state(events) == "finished":
        end = events[-1]["time"]
        for number, worker in workers.items():
            worker["wait"] += max(0.0, end - left.get(number, worker["wall"]))
            worker["wall"] = end
    for worker in workers.values():
        measured = sum(worker[activity] for activity in ACTIVITIES if activity != "data")
        worker["other"] = max(0.0, worker["wall"] - measured)
    return dict(workers)


def _server(events: Sequence[Event], servers: int, evaluating: float) -> dict[str, Any]:
    """What `_roles` says of the servers: the seconds of the first; empty where there is none."""
    if not servers:
        return {}
    role: dict[str, Any] = {"workers": servers, "evaluate": evaluating}
    for activity in ("wait", "communicate"):
        key = f"server_{activity}_seconds"
        if known := [event[key] for event in events if key in event]:
            role[activity] = sum(known)
    return role


def _roles(workers: dict[int, dict[str, Any]], server: dict[str, Any]) -> dict[str, dict[str, Any]]:
    roles = {"server": server} if server else {}
    for group in ("large", "small"):
        members = [worker for worker in workers.values() if worker["group"] == group]
        if members:
            roles[group] = {"workers": len(members), "overhead": _overhead(members)} | {
                key: sum(member[key] for member in members) / len(members)
                for key in (*ACTIVITIES, "other", "wall")
            }
    return roles


def _overhead(workers: Sequence[dict[str, Any]]) -> float:
    """Share of the workers' time in which they did not train.

    Measured against the time that passed, so that what no timer covers counts as well.
    """
    wall = sum(worker["wall"] for worker in workers)
    return max(0.0, 1 - sum(worker["train"] for worker in workers) / wall) if wall else 0.0
