from pathlib import Path

import numpy as np
import pytest
import yaml

from deepskip.config import Config, without_effect
from deepskip.data_shards.origin import Origin
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from deepskip.jobs.options import PredictConfig
from deepskip.jobs.settings import KEYS, absolute, build_parser, check_norm, differences, parse, parse_settings
from deepskip.jobs.train import check

# compare.yaml belongs to another job, and test_compare.py runs it.
CONFIGS = sorted(
    path for path in (Path(__file__).parents[2] / "jobs" / "configs").glob("*.yaml") if path.stem != "compare"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path: Path) -> None:
    config, stem, _ = parse("train", ["--config", str(path)])
    assert stem == path.stem
    for section, values in yaml.safe_load(path.read_text()).items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize("place", [0, 2, 4])
def test_the_command_line_wins_over_the_file(tmp_path: Path, place: int) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {steps: 7, learning_rate: 0.1}\n")
    words = ["--optim.steps", "9", "--loss.class_weights", "[1, 2.5]"]
    for file in (["--config", str(path)], [f"--config={path}"]):
        config, stem, _ = parse("train", [*words[:place], *file, *words[place:]])
        assert (stem, config.optim.steps, config.optim.learning_rate, config.loss.class_weights) == (
            "mine",
            9,
            0.1,
            [1, 2.5],
        )
    path.write_text("model: coins\nout: found\nimages: [a.png]\nthreshold: 0.3\nflips: true\n")
    words = ["--images", "b.png", "c.png", "--threshold", "0.4"]
    place = {0: 0, 2: 3, 4: 5}[place]
    read = parse_settings("predict", PredictConfig, [*words[:place], "--config", str(path), *words[place:]])
    assert (read.images, read.threshold, read.flips, read.model) == (["b.png", "c.png"], 0.4, True, "coins")


def test_the_data_may_come_first() -> None:
    # As in `deepskip train DATA`, `deepskip train --local DATA` and `deepskip submit train DATA`.
    for words in (["here"], ["--local", "here"], ["here", "--local"], ["--data.path", "here"]):
        config, _, local = parse("train", [*words, "--optim.steps", "3"])
        assert (config.data.path, local, config.optim.steps) == ("here", "--local" in words, 3)


def test_lanes_are_a_number_or_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    for text, value in (("auto", "auto"), ("4", 4)):
        config, *_ = parse("train", ["--data.lanes", text, "--data.accept", "d1234567890"])
        assert (config.data.lanes, config.data.accept) == (value, "d1234567890")
    for key, types in (("data.lanes", "int or one of 'auto'"), ("cluster.workers", "int or tuple[int, int] or null")):
        with pytest.raises(SystemExit):
            parse("train", [f"--{key}", "many"])
        assert capsys.readouterr().err == f"error: {key} is 'many'; it must be {types}\n"


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("", ["--optim.lr", "1"], "unknown setting optim.lr (did you mean optim.learning_rate"),
        ("optim: {learning_rates: 1}", [], "unknown setting optim.learning_rates (did you mean optim.learning_rate"),
        ("optimizer: {steps: 1}", [], "optim.steps"),
        ("", ["--model.encoder", "vgg"], "model.encoder is 'vgg'; it must be one of 'vgg16', 'resnet34'"),
        ("optim: {steps: many}", [], "optim.steps is 'many'; it must be int"),
        ("", ["--optim.steps", "0"], "optim.steps is 0; it must be 1 or more"),
        ("", ["--run.seed", "-1"], "run.seed is -1; it must be 0 to"),
        ("", ["--model.levels", "9007199254740991"], "model.levels is 9007199254740991; it must be 3 to 6"),
        (
            "",
            ["--optim.global_batch_size", "9" * 20],
            f"optim.global_batch_size is {'9' * 20}; it must be 1 to 1000000",
        ),
        ("", ["--optim.steps", "9" * 20], f"optim.steps is {'9' * 20}; it must be 1 to {2**53 - 1}"),
        ("", ["--optim.ema_decay", "1"], "optim.ema_decay is 1.0; it must be 0 to 0.99999999"),
        ("", ["--publish.path", ""], "publish.path is empty; name a folder"),
        ("", ["--data.path", ""], "data.path is empty; name a folder"),
        ("", ["--data.cache_gb", "1e300"], "data.cache_gb is 1e+300; it must be 0 to 1000000000"),
        ("", ["--data.cache_gb", ".inf"], "data.cache_gb is inf; it must be finite"),
        ("", ["--run.tracking_uri", ""], "run.tracking_uri is empty"),
        ("", ["--optim.steps", "true"], "optim.steps is 'true'; it must be int or null"),
        ("", ["--optim.steps", "1e3"], "optim.steps is '1e3'; it must be int or null"),
        ("", ["--run", "5"], "run is 5; it is a section of settings, such as run.name"),
        ("model: null", [], "model is null; it is a section of settings, such as model.network"),
        ("optim: adamw", [], "optim is adamw; it is a section of settings, such as optim.optimizer"),
        (
            "data: {crop: 16}",
            ["--optim.global_batch_size", "2", "--cluster.workers", "2"],
            'the lowest level has one pixel, and model.norm "batch" normalises it over one sample alone',
        ),
        (
            "{data: {crop: 16}, model: {norm: instance-batch}}",
            [],
            '"instance-batch" normalises it over each sample alone',
        ),
        (
            "{data: {crop: 16}, optim: {micro_batch: 2}}",
            ["--optim.global_batch_size", "3"],
            'model.norm "batch" normalises it over one sample alone',
        ),
        ("optim: [", [], "--config"),
        ("", ["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_settings_name_key_value_and_what_is_allowed(
    tmp_path: Path, text: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text or "{}")
    with pytest.raises(SystemExit) as stopped:
        parse("train", ["--config", str(path), *arguments])
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert all(line.startswith("error: ") for line in errors.splitlines())
    assert said in errors


def test_one_value_a_channel_is_refused_only_where_there_is_one() -> None:
    small = ["--data.crop", "16", "--optim.global_batch_size"]
    for words in (["2"], ["1", "--model.levels", "4"], ["1", "--model.enlarge", "2"], ["1", "--model.norm", "group"],
                  ["2", "--cluster.workers", "2", "--model.norm", "sync-batch"], ["1", "--model.network", "fcn"]):  # fmt: skip
        parse("train", [*small, *words])
    # Without a number of workers in the settings, it is known when the training starts.
    config, *_ = parse("train", [*small, "2"])
    check_norm(config, 1)
    with pytest.raises(SystemExit):
        check_norm(config, 2)


def test_settings_without_effect_are_named() -> None:
    assert without_effect(Config()) == []
    config, *_ = parse("train", ["--optim.optimizer", "adamw", "--optim.momentum", "0.5", "--publish.min_gain", "0.1"])
    assert without_effect(config) == [
        "optim.momentum is 0.5, which changes nothing without optim.optimizer: muon",
        "publish.min_gain is 0.1, which changes nothing without publish.path",
    ]
    config, *_ = parse("train", ["--optim.steps", "50"])
    assert without_effect(config) == [
        "optim.warmup_steps is 50 of 50 steps: the learning rate rises to the end, and optim.schedule changes nothing"
    ]
    for path in CONFIGS:
        assert without_effect(parse("train", ["--config", str(path)])[0]) == []


def test_the_users_own_folder_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/runs", "run.storage") == absolute("file://~/runs", "run.storage") == tmp_path / "runs"
    assert absolute("a~/b", "run.storage") == Path.cwd() / "a~" / "b"


def test_help_explains_every_setting() -> None:
    text = build_parser("train").format_help()
    assert len(KEYS) > 40
    for key in KEYS:
        assert f"--{key} " in text
    assert "optimizer steps of the whole training" in text


def test_copy_paste_needs_shards_of_several_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [Sample(f"{i}", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)) for i in range(2)]
    for split in ("train", "val"):
        write_shards(made, tmp_path / split, num_classes=1, samples_per_shard=1)
    check(["--data.path", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        check(["--data.path", str(tmp_path), "--data.copy_paste", "0.5"])
    assert stopped.value.code == 2
    assert "error: data.copy_paste is 0.5: it takes objects from other samples of a shard" in capsys.readouterr().err


def test_splits_that_were_packed_otherwise_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [Sample(f"{i}", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)) for i in range(2)]
    plain = {"bands": None, "longest_side": None}
    classes = Origin(classes=("car", "bus"))
    for number, (first, second, said) in enumerate(
        (
            ({}, {"longest_side": 64}, "train was packed with longest_side none, {val} with 64; pack both"),
            ({"bands": 3}, {}, "train was packed with bands 3, {val} with none; pack both"),
            ({"nodata": -1}, {"nodata": 0}, "train was packed with nodata -1, {val} with 0; pack both"),
            ({}, {"ignore_index": 0}, "ignored pixels are 255 in {train}, 0 in {val}; pack both"),
            ({}, {"origin": Origin(classes=("bus", "car"))}, "in {val} the classes are 1 bus, 2 car, but 1 car, 2 bus"),
            ({}, {"origin": None}, None),
        )
    ):
        path = tmp_path / str(number)
        for split, options in (("train", first), ("val", second)):
            other = {name: options[name] for name in ("ignore_index", "origin") if name in options}
            prepared = plain | {name: value for name, value in options.items() if name not in other}
            write_shards(made, path / split, num_classes=3, preparation=prepared, **({"origin": classes} | other))
        if said is None:
            check(["--data.path", str(path)])
        else:
            with pytest.raises(SystemExit):
                check(["--data.path", str(path)])
            assert said.format(train=path / "train", val=path / "val") in capsys.readouterr().err


def test_a_share_that_replays_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [Sample(f"{i}", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)) for i in range(2)]
    for split in ("train", "val"):
        write_shards(made, tmp_path / split, num_classes=1)
    follow = ["--data.path", str(tmp_path), "--data.follow", "true"]
    check([*follow, "--data.replay", "0.07"])  # of 8 samples, 0.56
    for share, batch in (("0.05", "8"), ("0.9", "1")):
        with pytest.raises(SystemExit) as stopped:
            check([*follow, "--data.replay", share, "--optim.global_batch_size", batch])
        assert stopped.value.code == 2
        said = (
            f"error: data.replay is {share} of optim.global_batch_size {batch}, which replays no sample: raise either\n"
        )
        assert capsys.readouterr().err == said


def test_differences() -> None:
    assert differences({"a": {"x": 1, "y": 2}}, {"a": {"x": 1, "y": 3}, "b": {"z": 0}}) == ["a.y", "b.z"]
