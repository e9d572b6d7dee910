"""The accuracy of one worker, of all-reduce, of the paper's schemes and of ours, side by side.

Each row of rows.toml is trained by `hdb simulate` with several seeds, on the virtual cluster: the
workers take turns in one process, and the virtual clock counts the time that they would take side
by side. Runs are kept; started again, the study skips what is done and goes on with what was
interrupted. Settings are chosen with --scale half --split validation, for which images are taken
out of the training split, among the candidates too; the test images are for the table.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, Sheet, hdb, run

from accuracy.results import Run, plot, table, verdicts
from hpc_hdb.config import Settings
from hpc_hdb.config_files import parse_settings, read_settings, tomllib

ROWS = Path(__file__).with_name("rows.toml")
_CHOOSES = "half"
HELD_OUT = 10
"""One image in so many is taken out of the training split for the validation."""

Table = dict[str, Any]


def read_study() -> Table:
    """The scales and rows of rows.toml."""
    study = tomllib.loads(ROWS.read_text(encoding="utf-8"))
    scales = study["scales"]
    for name, scale in scales.items():
        if "like" in scale:
            scales[name] = scales[scale["like"]] | scale
    return study


def merged(first: Table, then: Table) -> Table:
    """The settings of both, section by section; those of `then` count."""
    return first | {section: first.get(section, {}) | values for section, values in then.items()}


def settings_of(study: Table, scale: str, row: str) -> Table:
    """The settings of a row at a scale, before data and seed."""
    own, at_scale = study["rows"][row], study["scales"][scale]
    first = settings_of(study, scale, own["like"]) if "like" in own else at_scale["set"]
    return merged(first, filled_in(own["set"], at_scale["values"]))


def filled_in(setting: Any, values: Table) -> Any:
    """A setting, or a table of them, with the scale's value for each "$name"."""
    if isinstance(setting, dict):
        return {key: filled_in(value, values) for key, value in setting.items()}
    if isinstance(setting, list):
        return [filled_in(value, values) for value in setting]
    named = isinstance(setting, str) and setting.startswith("$")
    return values[setting[1:]] if named else setting


def rows_of(study: Table, scale: str) -> list[str]:
    """The rows of a table: at the scale at which settings are chosen, the candidates.

    Of the others, one that differs at this scale in nothing from the one it is like is left out.
    """
    if scale == _CHOOSES:
        return [row for row, own in study["rows"].items() if own.get("candidate")]

    def repeats(row: str) -> bool:
        like = study["rows"][row].get("like")
        return like is not None and (
            settings_of(study, scale, row) == settings_of(study, scale, like)
        )

    return [row for row, own in study["rows"].items() if not (own.get("candidate") or repeats(row))]


def images_of(data: Path, folder: Path, split: str, most: int) -> Path:
    """Link the images of a split into `folder`, `most` of each class where it is not 0.

    Of those held out a quarter as many.

    Parameters
    ----------
    split : {"test", "validation"}
        "validation" trains on nine of ten training images and is tested on the tenth.
    """
    if folder.is_dir():
        return folder
    classes = sorted(entry.name for entry in (data / "train").iterdir() if entry.is_dir())
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        for name in classes:
            train = sorted((data / "train" / name).iterdir())
            test = sorted((data / "test" / name).iterdir())
            if split == "validation":
                test = train[::HELD_OUT]
                del train[::HELD_OUT]
            if most:
                train, test = train[:most], test[: max(1, most // 4)]
            for part, images in (("train", train), ("test", test)):
                (unfinished / part / name).mkdir(parents=True)
                for image in images:
                    (unfinished / part / name / image.name).symlink_to(image.resolve())
        try:
            unfinished.rename(folder)
        except OSError:  # another study, started at the same time, was first
            if not folder.is_dir():
                raise
    return folder


def time_model(rows: list[Table], folder: Path) -> Path:
    """That of the device, measured once at all resolutions of the rows."""
    path = folder / "timing.json"
    if not path.exists():
        schedules = [row["schedule"] for row in rows]
        sides = sorted({side for schedule in schedules for side in schedule["resolutions"]})
        every = {"resolutions": sides, "dropout": [0.0] * len(sides), "large_batch": []}
        every |= {"cyclic": True, "milestones": []}
        configuration = folder / "profile.toml"
        settings = parse_settings(merged(rows[0], {"schedule": every}), "profile")
        configuration.write_text(settings.to_toml(), encoding="utf-8")
        largest = max(max(schedule["large_batch"]) for schedule in schedules)
        run(
            [hdb(), "profile", configuration, "--bound", str(largest), "--output", path],
            show=True,
        )
    return path


def train(settings: Settings, folder: Path) -> None:
    """One run to its end, unless it is there already."""
    if (folder / "config.toml").exists():
        if read_settings(folder / "config.toml") != settings:
            sys.exit(f"{folder} was made with other settings: remove it, or choose another --work")
        if (folder / "summary.json").exists():
            return
        words: list[str | Path] = ["--resume", folder]
    else:
        configuration = folder.with_suffix(".toml")
        configuration.write_text(settings.to_toml(), encoding="utf-8")
        words = [configuration]
    run([hdb(), "simulate", *words])


def train_rows(study: Table, options: argparse.Namespace) -> None:
    """Train all runs that are asked for, seed by seed."""
    if not (options.data / "train").is_dir():
        sys.exit(f"no images in {options.data}: make data/cifar10-jpeg, or say where with --data")
    work = folder_of(options)
    work.mkdir(parents=True, exist_ok=True)
    about = study["scales"][options.scale]
    data = images_of(options.data, work / "images", options.split, about["images"])
    source = {"data": {"source": "folder", "path": str(data)}}
    usual = rows_of(study, options.scale)
    chosen = options.rows or usual
    rows = {
        row: merged(settings_of(study, options.scale, row), source)
        for row in dict.fromkeys([*usual, *chosen])
    }
    if about["set"]["plan"]["timing"] == "profile":
        timing = {"plan": {"timing": str(time_model(list(rows.values()), work))}}
        rows = {row: merged(settings, timing) for row, settings in rows.items()}
    for seed in range(options.seeds or about["seeds"]):
        for row in chosen:
            folder = work / f"{row}-{seed}"
            own = merged(rows[row], {"run": {"seed": seed, "output": str(folder)}})
            print(f"{row}, seed {seed} ...", file=sys.stderr, flush=True)
            train(parse_settings(own, row), folder)


def done_runs(study: Table, options: argparse.Namespace) -> list[Run]:
    """The runs that are asked for and have ended; each must have been made as its row now says."""
    work = folder_of(options)
    runs = [
        Run(row, seed, work / f"{row}-{seed}")
        for row in options.rows or rows_of(study, options.scale)
        for seed in range(options.seeds or study["scales"][options.scale]["seeds"])
    ]
    done = [run for run in runs if (run.folder / "summary.json").exists()]
    for one in done:
        row = merged(settings_of(study, options.scale, one.row), {"run": {"seed": one.seed}})
        made = read_settings(one.folder / "config.toml")
        if wherever(made) != wherever(parse_settings(row, one.row)):
            sys.exit(f"{one.folder} was made with other settings: remove it, or leave out its row")
    return done


def wherever(settings: Settings) -> Table:
    """The settings but for paths, and what the time model was measured to be."""
    sections = settings.model_dump(exclude={"data": {"source", "path"}, "run": {"output"}})
    if not isinstance(sections["plan"]["timing"], dict):
        del sections["plan"]["timing"]
    return sections


def folder_of(options: argparse.Namespace) -> Path:
    """Where the runs of a scale and a split are."""
    return options.work / f"{options.scale}-{options.split}"


def save_events(runs: list[Run], path: Path) -> None:
    """The runs' event logs, from which all figures come, as one compressed archive."""
    with tarfile.open(path, "w:xz") as archive:
        for one in runs:
            for name in ("config.toml", "events.jsonl", "summary.json"):
                archive.add(one.folder / name, f"{one.row}-{one.seed}/{name}")
    print(f"saved {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    scales = ["cpu", "half", "gpu"]
    parser.add_argument("--scale", choices=scales, default="cpu", help="of rows.toml")
    parser.add_argument(
        "--small",
        dest="scale",
        action="store_const",
        const="small",
        default=argparse.SUPPRESS,
        help="a few minutes, to see that it works",
    )
    parser.add_argument(
        "--data", type=Path, default="data/cifar10-jpeg", help="the JPEGs (make data/cifar10-jpeg)"
    )
    parser.add_argument(
        "--split", choices=["test", "validation"], default="test", help="to test on"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these")
    parser.add_argument("--seeds", type=int, help="runs of each row, instead of the scale's number")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="keeps the runs")
    parser.add_argument("--only-table", action="store_true", help="train nothing more")
    parser.add_argument(
        "--save",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FOLDER",
        help="write table, figure and event logs, to benchmarks/results where no folder is named",
    )
    options = parser.parse_args()
    study = read_study()
    if unknown := set(options.rows or ()) - set(study["rows"]):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(study['rows'])}")
    if not options.only_table:
        train_rows(study, options)
    runs = done_runs(study, options)
    if not runs:
        sys.exit(f"no run of these rows is done in {options.work}")
    name = f"accuracy-{options.scale}-{options.split}"
    sheet = Sheet(name, command="accuracy/study")
    sheet.table(*table(runs, study["rows"]))
    sheet.line(f"{study['scales'][options.scale]['about']}. Held out: {options.split} images.")
    sheet.line("The workers take turns on one device; virtual time is that of their time model,")
    sheet.line("side by side, in which exchanging models costs nothing.")
    for line in verdicts(runs):
        sheet.line(line)
    if options.save is not None:
        for earlier in options.save.glob(f"{name}-*.txt"):
            earlier.unlink()
        sheet.save(options.save)
        plot(runs, study["rows"]).savefig(options.save / f"{name}.png")
        save_events(runs, options.save / f"{name}-events.tar.xz")


if __name__ == "__main__":
    main()
