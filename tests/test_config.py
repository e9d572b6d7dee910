"""What a configuration may say, and what the user is told of one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dali_pipelines.augmentation import Augmentation
from hpc_hdb.config import Settings
from hpc_hdb.config_files import load_settings, parse_settings, preset_names, read_settings, tomllib
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime
from hpc_hdb.report.plan_notes import idle_settings


def complaint(config: str, *overrides: str) -> str:
    """The one line that a user reads of a wrong configuration."""
    with pytest.raises(UserError) as caught:
        load_settings(config, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder: Path, text: str | bytes) -> str:
    """A configuration file of that text; its path."""
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# ---- presets and files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "source", "model", "resolutions", "workers"),
    [
        ("digits", "digits", "resnet8", [16, 24], (3, 1)),
        ("cifar10", "cifar10", "resnet18", [16, 20, 24, 32], (4, 3)),
        ("cifar100", "cifar100", "resnet18", [24, 32], (4, 3)),
        ("imagenet", "folder", "resnet18", [160, 224, 288], (4, 4)),
        ("paper-cifar100", "cifar100", "resnet18", [24, 32], (4, 3)),
        ("paper-imagenet", "folder", "resnet18", [160, 224, 288], (4, 4)),
    ],
)
def test_presets(
    preset: str, source: str, model: str, resolutions: list[int], workers: tuple[int, int]
) -> None:
    settings = load_settings(preset)
    assert settings.data.source == source
    assert settings.model.name == model
    assert settings.schedule.resolutions == resolutions
    assert (settings.plan.workers, settings.plan.small_workers) == workers


def test_these_are_all_presets() -> None:
    ours, papers = (
        ["cifar10", "cifar100", "digits", "imagenet"],
        ["paper-cifar100", "paper-imagenet"],
    )
    assert preset_names() == ours + papers


def test_the_papers_presets_have_its_optimizer_and_augmentation() -> None:
    for preset in ("paper-cifar100", "paper-imagenet"):
        train = load_settings(preset).train
        assert (train.momentum, train.weight_decay) == (0.9, 1e-4)
        assert (train.flip, train.rotation, train.zoom) == (True, 18, 0.25)


@pytest.mark.parametrize("preset", ["paper-cifar100", "paper-imagenet"])
def test_the_papers_presets_have_nothing_that_the_paper_has_not(preset: str) -> None:
    settings, plain = load_settings(preset), Settings()
    assert settings.server == plain.server
    for section, keys in {
        "schedule": ("decay", "warmup", "scale_with_workers", "scale_with_batch"),
        "train": ("label_smoothing", "keep_momentum", "decay_norms", "crop_area"),
    }.items():
        for key in keys:
            assert getattr(getattr(settings, section), key) == getattr(getattr(plain, section), key)


def test_cifar100_is_the_papers() -> None:
    assert load_settings("cifar100") == load_settings("paper-cifar100")


def test_our_imagenet_keeps_the_papers_plan_and_its_epochs_at_each_resolution() -> None:
    own, papers = load_settings("imagenet"), load_settings("paper-imagenet")
    assert own.plan == papers.plan

    def epochs_at(settings: Settings) -> dict[tuple[int, int | None], int]:
        """Epochs of each resolution with its large batch, over all cycles."""
        total: dict[tuple[int, int | None], int] = {}
        for stage in settings.schedule.stages():
            key = (stage.resolution, stage.large_batch)
            total[key] = total.get(key, 0) + stage.end_epoch - stage.start_epoch
        return total

    assert epochs_at(own) == epochs_at(papers)
    assert set(epochs_at(own).values()) == {35}


def test_our_imagenet_only_crops_and_flips_its_images() -> None:
    settings = load_settings("imagenet")
    train = settings.train
    how = Augmentation(train.flip, train.rotation, train.zoom, train.crop_area)
    assert (how.crops, how.change) == (True, "flip")
    assert {stage.dropout for stage in settings.schedule.stages()} == {0.0}
    assert not train.decay_norms


def test_our_presets_have_a_cosine_and_one_cycle_of_resolutions() -> None:
    for preset in ("cifar10", "imagenet"):
        schedule = load_settings(preset).schedule
        assert schedule.decay == "cosine"
        assert [stage.resolution for stage in schedule.stages()] == schedule.resolutions


def test_a_file_says_only_what_differs_from_the_defaults(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, "[schedule]\nepochs = 3\n"))
    assert settings.schedule.epochs == 3
    assert settings.server == Settings().server
    assert load_settings(written(tmp_path, "")) == Settings()


def test_a_file_goes_before_the_preset_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("[run]\nseed = 9\n")
    assert load_settings("digits").run.seed == 9


def test_a_file_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, b"\xef\xbb\xbf[run]\r\nseed = 9\r\n")).run.seed == 9


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_settings_survive_being_written_as_toml(preset: str | None) -> None:
    settings = load_settings(preset) if preset else Settings()
    assert parse_settings(tomllib.loads(settings.to_toml()), "again") == settings


@given(
    name=st.text(st.characters(codec="utf-8")), output=st.text("a\"'\\\x7f\x1f \tü💡", min_size=1)
)
def test_any_text_survives_being_written_as_toml(name: str, output: str) -> None:
    settings = Settings.model_validate({"model": {"name": name}, "run": {"output": output}})
    assert parse_settings(tomllib.loads(settings.to_toml()), "again") == settings


def test_inline_timing_survives_being_written_as_toml() -> None:
    settings = load_settings("digits", ["plan.timing={16=[4e-4,2e-3],24=[7e-4,2e-3]}"])
    again = parse_settings(tomllib.loads(settings.to_toml()), "again")
    assert again.inline_timing() == {16: BatchTime(4e-4, 2e-3), 24: BatchTime(7e-4, 2e-3)}


def test_a_run_folders_settings_are_read_back(tmp_path: Path) -> None:
    settings = load_settings("digits", ["run.seed=4"])
    (tmp_path / "config.toml").write_text(settings.to_toml())
    assert read_settings(tmp_path / "config.toml") == settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is not a run folder: it has no config.toml"),
        (b"[run\n", "config.toml is damaged"),
        (b"\xff\xfe", "config.toml is damaged"),
        (b"[run]\nsede = 1\n", "unknown setting 'run.sede'; did you mean 'run.seed'?"),
    ],
)
def test_a_damaged_run_folder_is_refused(tmp_path: Path, text: bytes | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.toml").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.toml") as caught:
        read_settings(tmp_path / "config.toml")
    assert words in str(caught.value)


# ---- --set ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.seed=7", 7),
        ("run.seed = 7", 7),
        ("run.seed=7 # lucky", 7),
        ("plan.workers=1_000", 1000),
        ("plan.time_ratio=1.25", 1.25),
        ("train.weight_decay=5e-4", 5e-4),
        ("train.flip=true", True),
        ("schedule.resolutions=[8, 12]", [8, 12]),
        ("schedule.milestones=[]", []),
        ('server.sync="bsp"', "bsp"),
        ("server.sync=bsp", "bsp"),
        ("data.path=/data/my images", Path("/data/my images")),
        ("data.path='/data/2024'", Path("/data/2024")),
        ("run.output=a=b", Path("a=b")),
        ("run.output=#1", Path("#1")),
        ("model.name=my.models:make", "my.models:make"),
        ("plan.timing=profile", "profile"),
        ("plan.timing=gpu/timing.json", Path("gpu/timing.json")),
        ("plan.timing={16=[1e-3,2e-3]}", {"16": (1e-3, 2e-3)}),
    ],
)
def test_a_setting_on_the_command_line(override: str, value: object) -> None:
    settings = load_settings("digits", [override])
    section, key = override.partition("=")[0].strip().split(".")
    assert getattr(getattr(settings, section), key) == value
    others = {section: {key}}
    assert settings.model_dump(exclude=others) == load_settings("digits").model_dump(exclude=others)


def test_the_last_of_several_values_counts() -> None:
    assert load_settings("digits", ["run.seed=1", "plan.workers=5", "run.seed=2"]).run.seed == 2


def test_a_setting_on_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    config = written(tmp_path, "[run]\nseed = 1\nthreads = 3\n")
    run = load_settings(config, ["run.seed=2"]).run
    assert (run.seed, run.threads) == (2, 3)


@pytest.mark.parametrize(
    "override",
    ["run.seed", "seed=1", ".seed=1", "run.=1", "=1", "", "run.output=", "run.output=  "],
)
def test_an_override_without_section_key_or_value_is_explained(override: str) -> None:
    assert complaint("digits", override) == (
        f"--set {override}: write section.key=value, such as run.seed=1"
    )


# ---- what is wrong, and what is nearest -------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("plan.workrs=3", "unknown setting 'plan.workrs'; did you mean 'plan.workers'?"),
        ("server.syn=asp", "unknown setting 'server.syn'; did you mean 'server.sync'?"),
        ("train.momentun=0", "unknown setting 'train.momentun'; did you mean 'train.momentum'?"),
        ("run.thread=2", "unknown setting 'run.thread'; did you mean 'run.threads'?"),
        ("plan.epochs=3", "unknown setting 'plan.epochs'; did you mean 'schedule.epochs'?"),
        (
            "train.learning_rate=1",
            "unknown setting 'train.learning_rate'; did you mean 'schedule.learning_rate'?",
        ),
        (
            "model.lr=1",
            "unknown setting 'model.lr'; choose from model.name, model.stem",
        ),
        ("server.sink=bsp", "unknown setting 'server.sink'; did you mean 'server.sync'?"),
        (
            "plan.epocs=3",
            "unknown setting 'plan.epocs'; did you mean 'schedule.epochs'?",
        ),
        ("plan.timing.16=[1,1]", "unknown setting 'plan.timing.16'; did you mean 'plan.timing'?"),
        ("pln.workers=3", "unknown section 'pln'; did you mean 'plan'?"),
        ("optimizer.lr=3", "unknown section 'optimizer'; choose from data, model, plan, "),
        ("server.sync=bps", "server.sync: there is no 'bps'; did you mean 'bsp'?"),
        ("server.merge=wieghted", "server.merge: there is no 'wieghted'; did you mean 'weighted'?"),
        ("data.source=cifar", "data.source: there is no 'cifar'; did you mean 'cifar10'?"),
        (
            "train.precision=half",
            "train.precision: there is no 'half'; choose from auto, fp32, bf16, fp16",
        ),
    ],
)
def test_a_misspelt_name_is_told_the_nearest_right_one(override: str, told: str) -> None:
    assert complaint("digits", override).startswith(f"digits: {told}")


@pytest.mark.parametrize(
    ("preset", "told"),
    [
        ("digts", "; did you mean 'digits'?"),
        ("cifar1000", "; did you mean 'cifar100'?"),
        ("ImageNet", "; did you mean 'imagenet'?"),
        ("mnist", f"; choose from {', '.join(preset_names())}"),
        ("", f"; choose from {', '.join(preset_names())}"),
    ],
)
def test_a_misspelt_preset_is_told_the_nearest_right_one(preset: str, told: str) -> None:
    assert complaint(preset) == f"'{preset}' is neither a TOML file nor a preset{told}"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.seed=x", "run.seed: input should be a valid integer"),
        ("run.seed=1.5", "run.seed: input should be a valid integer"),
        ("run.seed=-1", "run.seed: input should be greater than or equal to 0, not -1"),
        ("run.seed=1\nrun.threads=2", "run.seed: input should be a valid integer"),
        ("plan.workers=0", "plan.workers: input should be greater than or equal to 1, not 0"),
        ("plan.time_ratio=0.9", "plan.time_ratio: input should be greater than or equal to 1"),
        ("plan.time_ratio=nan", "plan.time_ratio: input should be a finite number"),
        ("plan.time_ratio=inf", "plan.time_ratio: input should be a finite number"),
        ("train.flip=perhaps", "train.flip: input should be a valid boolean"),
        ("train.momentum=1", "train.momentum: input should be less than 1, not 1"),
        ("train.rotation=181", "train.rotation: input should be less than or equal to 180"),
        ("train.zoom=1", "train.zoom: input should be less than 1, not 1"),
        ("schedule.dropout=[0, 1]", "schedule.dropout: input should be less than 1, not 1"),
        ("schedule.resolutions=16", "schedule.resolutions: input should be a valid list, not 16"),
        ("schedule.resolutions=[16,", "schedule.resolutions: input should be a valid list"),
        ("schedule.resolutions=[2, 16]", "schedule.resolutions: input should be greater than or"),
        ("schedule.large_batch=[0, 64]", "schedule.large_batch: input should be greater than or"),
        ("data.path=1", "data.path: give a path in quotes, not 1"),
        ("run.output=2024-01-31", "run.output: give a path in quotes, not 2024-01-31"),
        ("plan.timing=3", 'plan.timing: give a timing.json, "profile", or { resolution ='),
        ("plan.timing={16=[1]}", 'plan.timing: give a timing.json, "profile", or { resolution ='),
    ],
)
def test_a_wrong_value_names_its_setting(override: str, told: str) -> None:
    assert complaint("digits", override).startswith(f"digits: {told}")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["schedule.resolutions=[24,16]"], "schedule.resolutions must rise, not [24, 16]"),
        (["schedule.resolutions=[16]"], "schedule.dropout has 2 values for 1 resolutions"),
        (["schedule.large_batch=[64]"], "schedule.large_batch has 1 values for 2 resolutions"),
        (["schedule.milestones=[24]"], "schedule.milestones must rise and lie between 1 and 23"),
        (
            ["server.average=swa", "server.average_from=24"],
            "server.average_from = 24 leaves nothing",
        ),
        (["schedule.epochs=21"], "from epoch 20 to 21 is too short to cycle through 2 resolutions"),
    ],
)
def test_settings_that_do_not_go_together_are_told_so(overrides: list[str], told: str) -> None:
    assert told in complaint("digits", *overrides)


ALL_REDUCE = "server.sync=allreduce"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["schedule.reference_batch=64"],
            "schedule.reference_batch = 64 does nothing: it is for "
            'schedule.scale_with_batch = "linear" or "sqrt"',
        ),
        (["schedule.decay=cosine", "schedule.factor=0.5"], 'it is for schedule.decay = "step"'),
        (["server.outer_rate=0.7"], 'it is for server.optimizer = "nesterov" or "slowmo"'),
        (["server.outer_momentum=0.9"], 'it is for server.optimizer = "nesterov" or "slowmo"'),
        (["server.average=ema", "server.average_from=3"], 'it is for server.average = "swa"'),
        (["server.average=swa", "server.average_half_life=3"], 'it is for server.average = "ema"'),
        (["server.sync=bsp", "server.merge=compsac"], 'it is for server.sync = "asp" or "ssp"'),
        (
            ["server.staleness=2"],
            'server.staleness = 2 does nothing: it is for server.sync = "ssp"',
        ),
        (["server.adaptive=true"], "server.adaptive = true does nothing"),
        (
            [ALL_REDUCE, "schedule.scale_with_workers=linear"],
            'schedule.scale_with_workers = "linear" does nothing with server.sync = "allreduce"',
        ),
    ],
)
def test_a_setting_that_does_nothing_is_named(overrides: list[str], told: str) -> None:
    (line,) = idle_settings(load_settings("digits", overrides))
    assert told in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.scale_with_batch=sqrt", "schedule.reference_batch=64"],
        ["server.optimizer=slowmo", "server.outer_rate=0.7", "server.outer_momentum=0.9"],
        ["server.average=swa", "server.average_from=3"],
        ["server.average=ema", "server.average_half_life=3", "server.average_from=0"],
        ["server.sync=ssp", "server.staleness=2", "server.merge=compsac", "server.adaptive=true"],
        [
            *(ALL_REDUCE, "schedule.scale_with_workers=linear"),
            *("schedule.scale_with_batch=linear", "schedule.reference_batch=64"),
        ],
    ],
)
def test_a_setting_that_does_something_is_not(overrides: list[str]) -> None:
    assert not list(idle_settings(load_settings("digits", overrides)))


@pytest.mark.parametrize("preset", preset_names())
def test_the_presets_have_no_setting_that_does_nothing(preset: str) -> None:
    assert not list(idle_settings(load_settings(preset)))


@pytest.mark.parametrize(
    ("timing", "told"),
    [
        ("{small=[1e-3,1e-2]}", "plan.timing: its keys are resolutions, not small"),
        ("{16=[0,1e-2]}", "positive seconds per image (a), not 0"),
        ("{16=[1e-3,-1]}", "positive overhead per batch (c), not -1"),
    ],
)
def test_inline_timing_that_is_none_is_told_so(timing: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings("digits", [f"plan.timing={timing}"]).inline_timing()
    assert told in str(caught.value)


@pytest.mark.parametrize("timing", ["profile", "timing.json"])
def test_timing_from_elsewhere_is_not_inline(timing: str) -> None:
    assert load_settings("digits", [f"plan.timing={timing}"]).inline_timing() is None


# ---- files that are none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[data\n", "mine.toml is not valid TOML: Expected ']'"),
        ("seed = \n", "mine.toml is not valid TOML: "),
        ("[run]\nseed = 1\nseed = 2\n", "mine.toml is not valid TOML: "),
        (b"\xff\xfe[\0", "cannot read "),
        ("data = 3\n", "mine.toml: data is a section: write [data] with its settings below"),
        ("[[data]]\n", "mine.toml: data is a section: write [data] with its settings below"),
        ("seed = 3\n", "mine.toml: unknown section 'seed'; "),
    ],
)
def test_a_file_that_is_no_configuration_names_itself(
    tmp_path: Path, text: str | bytes, told: str
) -> None:
    told_of = complaint(written(tmp_path, text))
    assert told in told_of
    assert "mine.toml" in told_of


def test_a_file_with_a_value_for_a_section_takes_no_override(tmp_path: Path) -> None:
    config = written(tmp_path, "data = 3\n")
    assert "[data] is not a table in this configuration" in complaint(config, "data.path=x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert complaint(f"{tmp_path}/none.toml") == f"no configuration file {tmp_path}/none.toml"


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "mine.toml"
    folder.mkdir()
    assert complaint(str(folder)).startswith(f"cannot read {folder}: ")
