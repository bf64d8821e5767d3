from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_crnet.checkpoint.directory import checkpoint_dir
from megatron_crnet.cli.train import build_parser
from megatron_crnet.config.loading import load_config, read_config, resolved, save_config, save_resolved
from megatron_crnet.config.schema import Config
from megatron_crnet.config.variants import as_variant
from megatron_crnet.hf.configuration_crnet import CRNetConfig
from megatron_crnet.hf.export_config import hugging_face_fields
from megatron_crnet.utils.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {rank: 16, num_layers: 4}\noptimizer: {lr: 2e-3}\ndeepspeed: {zero_optimization: {stage: 1}}\n"
    )
    return path


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(file: Path) -> None:
    config = load_config(file, ["--model.rank", "[1, 2, 3, 4]", "--optimizer.clip_grad=0.5"])
    assert config.model.rank == [1, 2, 3, 4]
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (2e-3, 0.5)
    assert config.training == Config().training


def test_deepspeed_keys_nest_to_any_depth(file: Path) -> None:
    options = ["--deepspeed.zero_optimization.stage", "3", "--deepspeed.zero_optimization.offload_param.device=cpu"]
    assert load_config(file, options).deepspeed == {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}
    }


def test_dry_run_is_seen(file: Path) -> None:
    parser = build_parser("crnet train")
    assert parser.read(["--config", str(file), "--dry-run"])[0].dry_run
    assert not parser.read(["--config", str(file)])[0].dry_run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.rnak", "3"], "unknown key model.rnak: did you mean rank"),
        (["--training.lr", "3"], r"unknown key training.lr: did you mean optimizer\.lr\?"),
        (["--modle.rank", "3"], "unknown section 'modle': did you mean model"),
        (["--model.num_layers", "many"], "model.num_layers"),
        (["--model.variant", "crnett"], "crnett"),
        (["--recompute.strategy", "reply"], "reply"),
        (["--nonsense", "3"], "nonsense"),
        (["--deepspeed.zero_optimization.stage"], "has no value"),
        (["--config", "absent.yaml"], "absent.yaml cannot be read"),
    ],
)
def test_mistakes_on_the_command_line_name_value_and_remedy(file: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(["--config", str(file), *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {hidden: 3}", "unknown key model.hidden: did you mean hidden_size"),
        ("trainning: {seed: 3}", "unknown section 'trainning': did you mean training"),
        ("model: 3", "section model is 3, but must be a mapping"),
        ("- 3", "is not a mapping"),
        ("model: {rank: [1", "is not valid YAML"),
    ],
)
def test_mistakes_in_the_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "wrong.yaml" in str(caught.value)


def test_a_saved_configuration_serves_another_run(tmp_path: Path) -> None:
    config = read_config([f"--logging.output_dir={tmp_path / 'a'}"])
    save_config(config, tmp_path / "saved.yaml")
    changes = {"logging.output_dir": tmp_path / "b", "model.num_attention_heads": 4, "model.variant": "full_rank"}
    again = load_config(tmp_path / "saved.yaml", [f"--{name}={value}" for name, value in changes.items()])
    assert resolved(again) == resolved(read_config([f"--{name}={value}" for name, value in changes.items()]))
    assert checkpoint_dir(again) == tmp_path / "b" / "checkpoints"


def test_the_resolved_configuration_reads_back_as_itself(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    for save, layers in ((save_config, None), (save_resolved, [0])):
        save(config, tmp_path / "saved.yaml")
        assert resolved(load_config(tmp_path / "saved.yaml")) == resolved(config)
        assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["model"]["full_rank_layers"] == layers


@pytest.mark.parametrize("variant", ["full_rank", "low_rank", "crnet", "cola", "relora"])
def test_ranks_of_attention_alone_read_back_for_every_variant(variant: str, tmp_path: Path) -> None:
    """Beside full-rank experts `crnet ranks` names no others; the resolved full_rank has no such experts."""
    model = {"architecture": "qwen3_moe", "num_experts": 4, "moe_router_topk": 2, "num_attention_heads": 4}
    model |= {"full_rank_experts": True, "rank": dict.fromkeys(("q", "k", "v", "o"), 8)}
    config = load_config({"model": {**model, "variant": variant}})
    save_config(config, tmp_path / "resolved.yaml")
    again = load_config(tmp_path / "resolved.yaml")
    assert resolved(again) == resolved(config)
    merged = as_variant(config, "full_rank") if variant == "relora" else config
    assert CRNetConfig(**hugging_face_fields(merged)).variant == merged.model.variant


def test_paths_may_be_path_objects() -> None:
    config = load_config({"logging": {"output_dir": Path("runs/x")}, "data": {"train_data_path": [Path("data/train")]}})
    assert (config.logging.output_dir, config.data.train_data_path) == ("runs/x", ["data/train"])


def write(folder: Path, *texts: str) -> list[str]:
    """The options that read these files."""
    options = []
    for number, text in enumerate(texts):
        path = folder / f"{number}.yaml"
        path.write_text(text)
        options += ["--config", str(path)]
    return options


@pytest.mark.fault("L9")
def test_several_files_are_merged_field_by_field_in_every_section(tmp_path: Path) -> None:
    first = "model: {rank: 16}\ndeepspeed: {zero_optimization: {stage: 1, reduce_bucket_size: 4}}\n"
    second = "model: {num_layers: 4}\ndeepspeed: {wall_clock_breakdown: true, zero_optimization: {stage: 2}}\n"
    config = read_config(write(tmp_path, first, second))
    assert (config.model.rank, config.model.num_layers) == (16, 4)
    assert config.deepspeed == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 4},
        "wall_clock_breakdown": True,
    }
    later = "deepspeed: {wall_clock_breakdown: null, zero_optimization: {reduce_bucket_size: null}}"
    options = write(tmp_path, first, second, later)
    assert read_config(options).deepspeed == {"zero_optimization": {"stage": 2}}
    assert read_config([*options, "--deepspeed.zero_optimization=null"]).deepspeed == {}


@pytest.mark.fault("L9")
def test_the_command_line_overrides_files_wherever_it_stands(file: Path) -> None:
    assert read_config(["--model.rank", "3", "--config", str(file)]).model.rank == 3


@pytest.mark.fault("L10")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {rank: 3}\ndata: {}\nmodel: {rank: 4}\n", "the key model twice, in lines 1 and 3: remove one"),
        ("model:\n  rank: 3\n  rank: 4\n", "the key rank twice, in lines 2 and 3"),
        ("model: {rank: 3, rank: 4}", "the key rank twice, in lines 1 and 1"),
        ("deepspeed:\n  zero_optimization:\n    stage: 1\n    stage: 2\n", "the key stage twice, in lines 3 and 4"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, text))


@pytest.mark.fault("M6")
@pytest.mark.parametrize("text", ["", "optimizer:\n", "optimizer: {}\n", "deepspeed:\n", "# nothing\n", "---\n"])
def test_an_empty_section_changes_nothing(tmp_path: Path, text: str) -> None:
    assert read_config(write(tmp_path, text)) == Config()
    filled = "optimizer: {lr: 2e-3}\ndeepspeed: {zero_optimization: {stage: 1}}\n"
    assert read_config(write(tmp_path, filled, text)) == read_config(write(tmp_path, filled))


@pytest.mark.fault("M7")
def test_help_shows_every_field_and_nothing_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser("crnet train").read(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--model.num_layers VALUE\n      Transformer layers.\n      an integer from 1 to 1000; default 8" in shown
    assert "--training.seed VALUE" in shown
    assert "+ " not in shown.replace(" + ", "")
    with pytest.raises(ConfigError, match=r"unknown key data.train_data_path\+: did you mean train_data_path"):
        read_config(["--data.train_data_path+", "x"])


@pytest.mark.fault("D7", "B17")
def test_weights_and_prefixes_are_told_apart_from_both_ways_in(tmp_path: Path) -> None:
    blend = "[0.3, a, 7e-1, b]"
    for config in (
        read_config(["--data.train_data_path", blend]),
        read_config(write(tmp_path, f"data: {{train_data_path: {blend}}}")),
    ):
        assert config.data.train_data_path == [0.3, "a", 0.7, "b"]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").data.train_data_path == [0.3, "a", 0.7, "b"]
    for options in (["--data.data_path", "[-1, a]"], write(tmp_path, "data: {data_path: [-1, a]}")):
        with pytest.raises(ConfigError, match=r"data.data_path is .*, but must be a list of prefixes, or of a weight"):
            read_config(options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024", "2024"),
        ("2024.10", "2024.10"),
        ("1_0", "1_0"),
        ("on", "on"),
        ("0x10", "0x10"),
        ("2024-01-02", "2024-01-02"),
    ],
)
def test_text_stays_as_it_is_spelt(tmp_path: Path, text: str, value: str) -> None:
    named = read_config(write(tmp_path, f"logging: {{output_dir: {text}}}"))
    assert named.logging.output_dir == value
    assert read_config(["--logging.output_dir", text]) == named


def test_a_prompt_may_look_like_yaml() -> None:
    for prompt in ("Hello: world", "[x", "# no comment", "5", "- a", "{"):
        assert read_config(["--logging.sample_prompt", prompt]).logging.sample_prompt == prompt


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("1_000", 1000), ("+5", 5)])
def test_integers_are_decimal(tmp_path: Path, text: str, value: int) -> None:
    assert read_config(write(tmp_path, f"training: {{seed: {text}}}")).training.seed == value
    assert read_config(["--training.seed", text]).training.seed == value


@pytest.mark.parametrize("text", ["1:30", "0x10", "0b1", "2024-01-02", "inf", "1,000"])
def test_what_only_some_yaml_calls_a_number_is_refused(tmp_path: Path, text: str) -> None:
    for options in (write(tmp_path, f"training: {{seed: '{text}'}}"), ["--training.seed", text]):
        with pytest.raises(ConfigError, match=r"training.seed is .*, but must be an integer"):
            read_config(options)


@pytest.mark.fault("F13")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deepspeed: " + "[" * 5000 + "]" * 5000, "is not valid YAML"),
        ("deepspeed: {aio: " + "[" * 60 + "]" * 60 + "}", "nests deeper than 50 levels"),
        (
            "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else '1'}]" for i in range(12)),
            "more than 100000 values with its aliases written out",
        ),
        ("deepspeed: &a {x: *a}", "nests deeper than 50 levels"),
        ("model: {num_layers: !!python/object/apply:os.system [id]}", "is not valid YAML"),
        ("logging: {output_dir: !!python/name:os.system }", "is not valid YAML"),
        ("? [1, 2]\n: 3\n", "is not valid YAML"),
        ("? {a: 2}\n: 3\n", "is not valid YAML"),
        ("5", "is not a mapping of sections"),
        ("training: {eval_only: !!bool maybe}", "is not valid YAML"),
        ("training: {train_steps: !!timestamp abc}", "is not valid YAML"),
        ("training: {train_steps: !!float ''}", "is not valid YAML"),
        ("1: 2", "unknown section 1"),
        ("model: {1: 2}", "unknown key model.1"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("training: {seed: " + "9" * 5000 + "}", "is not valid YAML"),
        ("model: {rank: \x07}", "is not valid YAML"),
    ],
)
def test_files_that_are_no_configuration_end_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(write(tmp_path, text))
    assert len(str(caught.value)) < 600


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"logging: {wandb_project: caf\xe9}")
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    for path, message in (
        (tmp_path, "cannot be read"),
        (tmp_path / "latin", "utf-8"),
        (tmp_path / "large", "more than"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbftraining: {seed: 5}")
    assert load_config(tmp_path / "bom.yaml").training.seed == 5


@pytest.mark.fault("M5")
@pytest.mark.parametrize(
    "options", [["--deepspeed", "FILE"], ["--deepspeed_config=FILE"], ["--deepspeed", "--deepspeed_config", "FILE"]]
)
def test_deepspeeds_own_file_is_read(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n\t"zero_optimization": {"stage": 2, "reduce_bucket_size": 500}\n}')
    config = read_config([option.replace("FILE", str(path)) for option in options])
    assert config.deepspeed == {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500}}


@pytest.mark.fault("M5")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "has the key stage twice"),
        ("[1]", "is not a mapping"),
        ("{", "is not valid JSON"),
        ("[" * 10**5, "is not valid JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(["--deepspeed", str(path)])


@pytest.mark.fault("M5")
def test_deepspeed_as_a_bare_flag_is_explained() -> None:
    with pytest.raises(ConfigError, match="DeepSpeed is always on here: leave it out, or give its settings"):
        read_config(["--deepspeed", "--model.rank", "3"])


def test_ranks_of_single_positions_can_be_given(file: Path) -> None:
    ranks = "{q: 1, k: 1, v: 1, o: 1, gate: 2, up: 2, down: 2}"
    assert load_config(file, ["--model.rank", ranks, "--model.rank.q", "5"]).model.rank["q"] == 5


def test_versions_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_config(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("megatron_crnet ")
