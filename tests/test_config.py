"""The structured configs: the same arguments as the callback, and mistakes refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_slt import (
    MALA,
    SGLD,
    SGNHT,
    KineticLangevin,
    RMSpropSGLD,
    SLTMonitor,
    TransitionDetector,
    TransitionMonitor,
    estimate_influence,
    estimate_llc,
)
from lightning_slt.config import (
    DetectorConfig,
    EstimateSamplerConfig,
    EstimateSamplerName,
    InfluenceConfig,
    LLCConfig,
    MonitorConfig,
    RunConfig,
    SamplerConfig,
    SamplerName,
    TransitionMonitorConfig,
    load,
)
from lightning_slt.transitions.settings import threshold_of

NOT_PLAIN_DATA = {
    *("module", "data", "train_data", "query_data", "weights"),
    *("loss_fn", "group_fn", "render", "on_transition"),
}


@dataclass
class TrainingConfig:
    max_epochs: int = 3


@dataclass
class Experiment:
    """A schema of a user's own, with the monitor as one section."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


CONFIGURED: dict[type, Any] = {
    MonitorConfig: SLTMonitor,
    TransitionMonitorConfig: TransitionMonitor,
    LLCConfig: estimate_llc,
    InfluenceConfig: estimate_influence,
    DetectorConfig: TransitionDetector,
}


@pytest.mark.parametrize(("schema", "configured"), CONFIGURED.items(), ids=lambda x: x.__name__)
def test_names_order_and_defaults_are_those_of_what_is_configured(schema: type, configured: Any) -> None:
    parameters = inspect.signature(configured).parameters.items()
    arguments = [(name, p.default) for name, p in parameters if name not in NOT_PLAIN_DATA]
    assert [(f.name, f.default) for f in dataclasses.fields(schema)] == arguments


def test_a_transition_monitor_from_a_mapping() -> None:
    given = {"monitor": "slt_b/llc/mean", "min_change": 2.0, "at_boundary": "suppress"}
    built = load(given, ["alert=false"], schema=TransitionMonitorConfig).build()
    assert built.state_key == TransitionMonitor("slt_b/llc/mean").state_key
    assert (built._settings["min_change"], built._settings["at_boundary"], built._alert) == (2.0, "suppress", False)
    with pytest.raises(ValueError, match=r"min_chang=2: no such setting \(did you mean min_change\?\)"):
        load({"min_chang": 2}, schema=TransitionMonitorConfig)
    with pytest.raises(ValueError, match="at_boundary: expected 'annotate' or 'suppress', got 'ignore'"):
        load({"at_boundary": "ignore"}, schema=TransitionMonitorConfig).build()


def test_names_and_defaults_are_those_of_the_sampler() -> None:
    monitors = (SGLD, RMSpropSGLD, SGNHT)
    for schema, first, kinds in (
        (SamplerConfig, SamplerName.SGLD, monitors),
        (EstimateSamplerConfig, EstimateSamplerName.SGLD, (*monitors, KineticLangevin)),
    ):
        arguments = {name for kind in kinds for name in inspect.signature(kind).parameters} - {"metric"}
        fields = {f.name: f.default for f in dataclasses.fields(schema)}
        assert fields.pop("name") is first
        assert fields == dict.fromkeys(arguments)


@pytest.mark.parametrize("kind", [SGLD, RMSpropSGLD, SGNHT])
def test_every_sampler_by_its_name(kind: type) -> None:
    built = load({"sampler": {"name": kind.__name__, "lr": 1e-4}}).sampler.build()
    assert type(built) is kind and built.lr == 1e-4


def test_a_sampler_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"sampler\.name='MALA'.*SGNHT"):
        load({"sampler": {"name": "MALA"}})


def test_builds_the_callback_with_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "every_n_train_steps": 5,
        "every_n_epochs": 2,
        "at_steps": [1, 2],
        "log_spaced": 3,
        "max_overhead": 0.1,
        "sampler": {"lr": 1e-4},
        "num_chains": 2,
        "num_draws": 7,
        "num_burnin_steps": 8,
        "num_steps_bw_draws": 3,
        "batch_size": 16,
        "nbeta": 12.5,
        "localization": 2.5,
        "restrict": ["net.*"],
        "on_failure": "raise",
        "seed": 9,
        "warm_start": False,
        "num_samples": 100,
        "name": "first",
        "dirpath": "here",
        "method": "sequential",
        "probe": 500,
        "query": 100,
        "execution": "background",
        "devices": ["cpu"],
        "max_pending": 3,
        "when_full": "wait",
        "max_wait": 60.0,
        "measures": ["llc"],
    }
    assert set(given) == {f.name for f in dataclasses.fields(MonitorConfig)}
    assert isinstance(load(given).build(), SLTMonitor)

    taken: dict[str, Any] = {}
    monkeypatch.setattr("lightning_slt.config.SLTMonitor", lambda **arguments: taken.update(arguments))
    load(given).build()
    assert taken == {**given, "sampler": SGLD(lr=1e-4)}
    assert type(taken["at_steps"]) is list and type(taken["restrict"]) is list  # no ListConfig in a checkpoint


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_draws": 0}, "num_draws=0"),
        ({"probe": 0}, "probe=0: must be at least 1"),
        ({"probe": 10, "query": -1}, "query=-1: must be at least 1"),
        ({"query": 10}, "query=10: is given without probe"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_the_callback(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(given).build()


def test_samples_to_look_at_from_a_file_and_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "monitor.yaml").write_text("probe: 2000\n")
    config = load(tmp_path / "monitor.yaml", ["query=64"])
    assert (config.probe, config.query) == (2000, 64)
    samples = config.build()._samples
    assert samples.wanted and samples.describe() == {"probe": 2000, "query": 64}
    assert load({"probe": True}).build()._samples.describe() == {"probe": True, "query": None}
    assert load({}, ["probe=true"]).probe is True
    for nothing in (None, False):
        assert not load({"probe": nothing}).build()._samples.wanted


def test_file_mapping_and_node_give_the_same(tmp_path: Path) -> None:
    text = "num_chains: 8\nsampler:\n  lr: 1e-5\nat_steps: [1, 10]\n"
    path = tmp_path / "monitor.yaml"
    path.write_text(text)
    expected = MonitorConfig(num_chains=8, sampler=SamplerConfig(lr=1e-5), at_steps=[1, 10])
    plain = {"num_chains": 8, "sampler": {"lr": 1e-5}, "at_steps": [1, 10]}
    for source in (path, str(path), plain, OmegaConf.create(text)):
        assert load(source) == expected
    assert plain == {"num_chains": 8, "sampler": {"lr": 1e-5}, "at_steps": [1, 10]}
    (tmp_path / "empty.yaml").write_text("# nothing set\n")
    assert load(tmp_path / "empty.yaml") == MonitorConfig()


def test_overrides_win_and_the_later_one_wins() -> None:
    config = load({"num_chains": 8, "seed": 1}, ["num_chains=2", "sampler.lr=1e-6", "seed=3", "seed=4", "name=null"])
    assert config == MonitorConfig(num_chains=2, sampler=SamplerConfig(lr=1e-6), seed=4)


def test_a_single_pattern_is_a_list_of_one() -> None:
    assert load({"restrict": "net.*"}).restrict == ["net.*"]
    assert load({}, ["restrict=net.*"]).restrict == ["net.*"]
    assert load({"monitor": {"restrict": "net.*"}}, schema=Experiment).monitor.restrict == ["net.*"]


def test_a_section_of_a_larger_schema() -> None:
    config = load({"training": {"max_epochs": 5}}, ["monitor.num_draws=${training.max_epochs}"], schema=Experiment)
    assert config == Experiment(TrainingConfig(5), MonitorConfig(num_draws=5))


def test_a_node_that_refers_to_its_siblings() -> None:
    whole = OmegaConf.create({"chains": 6, "monitor": {"num_chains": "${chains}"}})
    assert load(whole.monitor).num_chains == 6


@pytest.mark.parametrize(
    ("given", "key", "also"),
    [
        ({"num_chain": 8}, "num_chain=8", "did you mean num_chains"),
        ({"every_steps": 8}, "every_steps=8", "every_n_train_steps"),
        ({"num_chains": "two"}, "num_chains='two'", "Integer"),
        ({"num_chains": 2.5}, "num_chains=2.5", "Integer"),
        ({"num_chains": None}, "num_chains=None", "int"),
        ({"nbeta": "hot"}, "nbeta='hot'", "Float"),
        ({"at_steps": 5}, "at_steps=5", "list"),
        ({"at_steps": ["a"]}, "at_steps[0]=['a']", "Integer"),
        ({"seed": {"a": 1}}, "seed={'a': 1}", "Integer"),
        (
            {"sampler": {"learning_rate": 1.0}},
            "sampler.learning_rate=1.0",
            "SamplerConfig has name, lr, kappa, diffusion_factor.",
        ),
        ({"sampler": {"lr": "x"}}, "sampler.lr='x'", "SamplerConfig has name, lr, kappa, diffusion_factor."),
        ({"probes": 100}, "probes=100", "did you mean probe"),
        ({"probe": "all of them"}, "probe='all of them'", "Union[bool, int]"),
        ({"query": 0.5}, "query=0.5", "Union[bool, int]"),
        ({"probe": [1, 2]}, "probe=[1, 2]", "Union[bool, int]"),
        ({"group_fn": "class"}, "group_fn='class'", "no such setting"),
        ({"sampler": 3}, "sampler=3", "expected the settings of a SamplerConfig"),
        ({"num_draws": "${nothing}"}, "num_draws='${nothing}'", "nothing"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_what_there_is(given: dict[str, Any], key: str, also: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(given)
    message = str(caught.value)
    assert message.startswith(f"{key}: ") and also in message
    assert "\n" not in message
    if not key.startswith("sampler."):
        assert "MonitorConfig has every_n_train_steps, " in message and "num_chains" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"monitor": {"num_chain": 3}}, "monitor.num_chain=3: no such setting (did you mean num_chains?). Monitor"),
        (
            {"monitor": {"sampler": {"l": 3}}},
            "monitor.sampler.l=3: no such setting (did you mean lr?). SamplerConfig has name, lr, kappa, ",
        ),
        ({"monitors": {}}, "monitors={}: no such setting (did you mean monitor?). Experiment has training, monitor."),
        ({"training": [1]}, "training=[1]: expected the settings of a TrainingConfig."),
        ({"monitor": 5}, "monitor=5: expected the settings of a MonitorConfig."),
    ],
)
def test_a_mistake_in_a_larger_schema(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(given, schema=Experiment)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("override", ["num_chains", "=3", ""])
def test_an_override_without_a_value(override: str) -> None:
    with pytest.raises(ValueError, match="write it as key=value"):
        load({}, [override])


def test_text_that_is_no_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overrides"):
        load({}, ["at_steps=[1"])
    path = tmp_path / "monitor.yaml"
    for text, what in (
        ("- 1\n- 2\n", "expected settings"),
        ("a: [1\n", "not a YAML file"),
        ("just text", "just text=None: no such setting"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=what):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("source", [None, [], 3])
def test_a_source_of_another_kind(source: Any) -> None:
    with pytest.raises(TypeError, match=rf"^source={re.escape(repr(source))}: .*YAML file, or a dict"):
        load(source)


@pytest.mark.parametrize("source", ["", "."])
def test_a_source_that_is_no_file(source: str) -> None:
    with pytest.raises(ValueError, match=rf"^source='{re.escape(source)}': is no file.*YAML file, or a dict"):
        load(source)


# ------------------------------------------------------------------------------------------------------- a whole run


def test_a_whole_run_from_one_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        """
        monitor: {every_n_train_steps: 500, max_overhead: 0.05}
        components:
          encoder: {restrict: encoder.*, num_chains: 2}
          head: {restrict: [head.*], every_n_epochs: 1}
        transitions: {min_change: 1.0}
        watch_components: true
        """
    )
    config = load(tmp_path / "run.yaml", ["components.head.num_chains=8"], schema=RunConfig)
    assert config.components["encoder"] == MonitorConfig(restrict=["encoder.*"], num_chains=2)
    whole, encoder, head, *watches = config.build()
    assert [monitor._asked.name for monitor in (whole, encoder, head)] == [None, "encoder", "head"]
    assert (head._asked.settings.num_chains, head._asked.restrict) == (8, ["head.*"])
    keys = ["slt/llc/mean", "slt_encoder/llc/mean", "slt_head/llc/mean"]
    assert [watch.state_key for watch in watches] == [TransitionMonitor(key).state_key for key in keys]
    assert {watch._settings["min_change"] for watch in watches} == {1.0}


def test_parts_of_a_run_can_be_left_out() -> None:
    assert [type(c) for c in RunConfig().build()] == [SLTMonitor, TransitionMonitor]
    assert [type(c) for c in load({"transitions": None}, schema=RunConfig).build()] == [SLTMonitor]
    assert load({"monitor": None, "transitions": None}, schema=RunConfig).build() == []
    only = load({}, ["monitor=null", "components.a.seed=1", "transitions.monitor=slt_a/llc/mean"], schema=RunConfig)
    assert [type(c) for c in only.build()] == [SLTMonitor, TransitionMonitor]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"monitor": None}, "transitions.monitor='slt/llc/mean': nothing here measures that curve; there is none"),
        ({"transitions": {"monitor": "slt_b/llc/mean"}}, "there is slt/llc/mean. transitions: null watches none"),
        ({"components": {"a": {"name": "b"}}}, "components.a.name='b': a component's name is its key"),
        ({"components": {"Not A Key": {}}}, "name='Not A Key': only lower-case letters"),
        ({"monitor": {"num_draws": 0}}, "num_draws=0: must be at least 1"),
    ],
)
def test_parts_of_a_run_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(given, schema=RunConfig).build()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"components": {"head": {"num_chain": 3}}},
            "components.head.num_chain=3: no such setting (did you mean num_ch",
        ),
        ({"components": {"head": 3}}, "components.head=3: expected the settings of a MonitorConfig."),
        ({"components": [1]}, "components=[1]: expected the settings of a MonitorConfig. RunConfig has"),
        ({"monitor": {"sampler": [1]}}, "monitor.sampler=[1]: expected the settings of a SamplerConfig. MonitorConfig"),
        ({"monitor": {"restrict": {"a": 1}}}, "monitor.restrict={'a': 1}: expected a list. MonitorConfig has every"),
        ({"monitor": {"devices": "cpu"}}, "monitor.devices='cpu': expected a list. MonitorConfig has every"),
        ({"components": {"a": {"at_steps": {"b": 1}}}}, "components.a.at_steps={'b': 1}: expected a list. Monit"),
        ({"components": {"head": {"sampler": {"lr": "x"}}}}, "components.head.sampler.lr='x': Value 'x' of type 'str'"),
        ({"transition": {}}, "transition={}: no such setting (did you mean transitions?). RunConfig has monitor, "),
        ({"transitions": {"min_change": "a"}}, "transitions.min_change='a': Value 'a' of type 'str' could not be"),
        ({"watch_components": "maybe"}, "watch_components='maybe': Value 'maybe' is not a valid bool"),
    ],
)
def test_a_mistake_in_a_whole_run(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(given, schema=RunConfig)
    assert str(caught.value).startswith(message)


# -------------------------------------------------------------------------------------------- one call, no trainer


@pytest.mark.parametrize("schema", [LLCConfig, InfluenceConfig])
def test_a_call_gets_every_argument(schema: type, monkeypatch: pytest.MonkeyPatch) -> None:
    function = CONFIGURED[schema].__name__
    taken: dict[str, Any] = {}
    monkeypatch.setattr(f"lightning_slt.config.{function}", lambda *args, **given: taken.update(given, args=args))
    overrides = ["num_chains=3", "sampler.name=MALA", "sampler.lr=0.1", "restrict=fc.*", "device=cpu"]
    config = load({}, overrides, schema=schema)
    config.estimate("module", "data", loss_fn="loss", weights="state")
    names = set(inspect.signature(CONFIGURED[schema]).parameters)
    positional = taken.pop("args")
    assert positional[:2] == ("module", "data") and positional[-1] == "loss"
    assert set(taken) | {"module", "data", "train_data", "query_data", "loss_fn"} >= names
    assert (taken["num_chains"], taken["restrict"], taken["device"], taken["weights"]) == (3, ["fc.*"], "cpu", "state")
    assert taken["sampler"] == MALA(lr=0.1)


@pytest.mark.parametrize("name", EstimateSamplerName)
def test_every_sampler_of_a_call(name: EstimateSamplerName) -> None:
    built = EstimateSamplerConfig(name, 0.5).build()
    assert (type(built).__name__, built.lr) == (name.value, 0.5)


@pytest.mark.parametrize("schema", [SamplerConfig, EstimateSamplerConfig])
def test_what_only_one_sampler_has(schema: type) -> None:
    assert load({"name": "RMSpropSGLD", "kappa": 0.2}, schema=schema).build() == RMSpropSGLD(kappa=0.2)
    assert load({"name": "SGNHT", "diffusion_factor": 0.1}, schema=schema).build() == SGNHT(diffusion_factor=0.1)
    if schema is EstimateSamplerConfig:
        assert load({"name": "KineticLangevin", "friction": 2}, schema=schema).build() == KineticLangevin(friction=2.0)
    with pytest.raises(ValueError, match=r"kappa=-1.0: must be positive"):
        load({"name": "RMSpropSGLD", "kappa": -1}, schema=schema).build()
    for name in ("SGLD", "SGNHT", "MALA")[: 3 if schema is EstimateSamplerConfig else 2]:
        with pytest.raises(ValueError, match=rf"unknown key \['kappa'\]; {name} has"):
            load({"name": name, "kappa": 0.2}, schema=schema).build()


def test_a_detector_and_a_whole_curve_with_the_same_settings() -> None:
    config = load({"false_alarms": 0.2}, ["min_change=30", "at_boundary=suppress"], schema=DetectorConfig)
    built = config.build()
    assert (built.threshold, built.min_change, built.at_boundary) == (threshold_of(0.2), 30.0, "suppress")
    curve = range(40), [10.0] * 20 + [20.0] * 20, [1.0] * 40, [2.0] * 20 + [1.0] * 20
    assert config.detect(*curve) == []  # a change of 10
    assert [t.kind for t in dataclasses.replace(config, min_change=5.0).detect(*curve)] == ["A"]
    with pytest.raises(ValueError, match="at_boundary"):
        load({"at_boundary": "ignore"}, schema=DetectorConfig).build()
    with pytest.raises(ValueError, match=r"min_chang=1: no such setting \(did you mean min_change\?\)"):
        load({"min_chang": 1}, schema=DetectorConfig)


@pytest.mark.parametrize(("text", "value"), [("5%", "5%"), ("0.5", 0.5), ("2", 2), ("null", None)])
def test_a_tolerance_in_per_cent_or_in_units_of_the_llc(text: str, value: Any) -> None:
    assert load({}, [f"tolerance={text}"], schema=LLCConfig).tolerance == value


def test_a_mistake_in_the_settings_of_a_call() -> None:
    with pytest.raises(ValueError, match=r"tolerence='5%': no such setting \(did you mean tolerance\?\)"):
        load({"tolerence": "5%"}, schema=LLCConfig)
    with pytest.raises(
        ValueError, match=r"max_train='all': Value 'all' of type 'str' could not be converted to Integer"
    ):
        load({"max_train": "all"}, schema=InfluenceConfig)
