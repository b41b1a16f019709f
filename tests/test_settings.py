import importlib.metadata
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.specifiers import SpecifierSet

from lorapar_utils import records
from lorapar_utils.errors import InputError
from lorapar_utils.settings import load_profile, profile_files


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "profiles").glob("*.yaml") if p.stem != "defaults"))
def test_every_profile_is_valid_and_states_its_command(name):
    settings = load_profile(name)
    assert settings.profile == name
    assert f"make book PROFILE={name}" in (ROOT / "profiles" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert settings.experiment_runs()


def test_short_names_and_sections_override():
    settings = load_profile("smoke", theta=0.8, alpha=0.5, seed=3, sft={"epochs": 2}, beta=None)
    assert (settings.partition.theta, settings.partition.alpha, settings.partition.beta) == (0.8, 0.5, 1.0)
    assert settings.seed == 3 and settings.sft.epochs == 2 and settings.sft.batch_size == 4


def test_a_profile_can_extend_another(project):
    study, laptop = load_profile("study"), load_profile("laptop")
    assert study.adapter == laptop.adapter and len(study.seeds) >= 5 and study.pool != laptop.pool
    assert study.experiments.keys() != laptop.experiments.keys()
    path = project / "profiles" / "mine.yaml"
    path.write_text("extends: nothing\n")
    with pytest.raises(InputError, match="mine.yaml: extends = 'nothing': there is no profiles/nothing.yaml"):
        load_profile("mine")


def test_a_list_can_be_added_to_its_parents_list(project):
    path = project / "profiles" / "mine.yaml"
    teacher = {"name": "mine", "kind": "recorded", "path": "votes.csv"}
    path.write_text(yaml.safe_dump({"extends": "smoke", "voting": {"teachers+": [teacher], "tie": "system2"}}))
    names = [teacher.name for teacher in load_profile("mine").voting.teachers]
    assert names == ["psychologist", "tutor", "examiner", "mine"]
    path.write_text(yaml.safe_dump({"extends": "smoke", "voting": {"teacher+": [teacher]}}))
    with pytest.raises(InputError, match="teacher"):
        load_profile("mine")


@pytest.mark.parametrize("parent", ["study", "llama2-7b-sharded"])
def test_a_profile_has_all_that_its_parents_parents_say(project, parent):
    (project / "profiles" / "mine.yaml").write_text(f"extends: {parent}\nseed: 7\n")
    mine, theirs = load_profile("mine"), load_profile(parent)
    own = {"profile": "mine", "profile_file": "profiles/mine.yaml", "seed": 7}
    assert mine.model_dump() == theirs.model_dump() | own


def test_profiles_extend_files_beside_them_through_any_depth(project):
    outside = project / "elsewhere" / "deep"
    outside.mkdir(parents=True)
    (outside / "mine.yaml").write_text("extends: ../middle.yaml\nsft: {epochs: 5}\n")
    (outside.parent / "middle.yaml").write_text("extends: ./deep/first.yml\nsft: {epochs: 4, batch_size: 3}\n")
    (outside / "first.yml").write_text("extends: smoke\n")
    settings = load_profile(outside / "mine.yaml")
    assert (settings.sft.epochs, settings.sft.batch_size, settings.importance.examples) == (5, 3, 4)
    names = [path.name for path in profile_files(outside / "mine.yaml")]
    assert names == ["defaults.yaml", "smoke.yaml", "first.yml", "middle.yaml", "mine.yaml"]


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("mine", r"mine.yaml: extends = 'mine': .*in a circle \(mine.yaml -> mine\)"),
        (
            "one",
            r"three.yaml: extends = 'one': .*in a circle \(mine.yaml -> one.yaml -> two.yaml -> three.yaml -> one\)",
        ),
        (
            "lost",
            r"lost.yaml: extends = 'gone': there is no profiles/gone.yaml \(mine.yaml -> lost.yaml -> gone\); .*laptop",
        ),
        ("../gone.yaml", r"mine.yaml: extends = '../gone.yaml': there is no ../gone.yaml"),
        ("defaults", "every profile starts from the defaults; leave the line out"),
        ("../profiles/defaults.yaml", "every profile starts from the defaults"),
        ("[laptop, smoke]", r"extends = \['laptop', 'smoke'\] is no name; give that of one profile"),
        ("7", "extends = 7 is no name"),
        ("", "extends = None is no name"),
    ],
)
def test_what_cannot_be_extended_is_said_with_the_way_there(project, extends, message):
    for name, parent in {"mine": extends, "one": "two", "two": "three", "three": "one", "lost": "gone"}.items():
        (project / "profiles" / f"{name}.yaml").write_text(f"extends: {parent}\n")
    with pytest.raises(InputError, match=message):
        load_profile("mine")


def test_a_profile_that_says_nothing_is_refused_and_one_that_only_extends_is_not(project):
    path = project / "profiles" / "mine.yaml"
    path.write_text("extends: smoke  # as it is\n")
    assert load_profile("mine").sft == load_profile("smoke").sft
    for nothing in ("", "# later\n", "{}\n", "---\n"):
        path.write_text(nothing)
        with pytest.raises(InputError, match="mine.yaml: the file is empty; begin it with `extends: laptop`"):
            load_profile("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nsft: {epochs: 1}\nseed: 2\n", "mine.yaml: not valid YAML in line 3: the key 'seed' is there twice"),
        ("sft:\n  epochs: 1\n  epochs: 2\n", "line 3: the key 'epochs' is there twice"),
        ("sft:\n\tepochs: 1\n", "line 2: .*; indent with spaces, not with tabs"),
        ("seeds: 3\n", r"seeds = 3: .*; write a list: \[a, b\]"),
        ("partition: {theta: '0,8'}\n", "partition.theta = '0,8': .*; write 0.8$"),
        (
            "voting: {teachers: [{kind: api, name: r1, role_play: true}]}\n",
            "voting.teachers.0.api.model is missing; give it a value, as book/reuse.md does",
        ),
        ("seeds: [0, -1]\n", "seeds.1 = -1: .*greater than or equal to 0"),
        ("model: packaged\n", "model = 'packaged': .*; write its settings below it"),
        (
            "model: {revision: 1234567}\n",
            "model.revision = 1234567: .*; YAML reads it as a number, so put it in quotes",
        ),
        ("model: {target_name: yes}\n", "YAML reads it as true or false, so put it in quotes"),
        ("model: {revision: 2026-13-01}\n", "mine.yaml: not valid YAML .*; put what is meant as text in quotes"),
        ("experiments: [base]\n", "experiments is a list; write a line `name: "),
        ("grids: {name: a}\n", "grids is no list of sections"),
        ("grids: [{name: a, title: b, over: theta}]\n", "grids: a: over is text; write `theta: "),
        ("grids: [{name: 'a{', title: b, over: {theta: [1]}}]\n", "write {theta} where a value of `over` belongs"),
        ("profile: other\n", "profile is not a setting: a profile is called as its file"),
    ],
)
def test_what_yaml_reads_differently_than_meant_is_named(project, text, message):
    path = project / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_profile(path)


def test_files_of_other_editors_are_read(project):
    path = project / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfextends: smoke\r\nmodel: {target_name: M\xc3\xbcller}\r\nseed: 3\r\n")
    assert (load_profile(path).seed, load_profile(path).model.target_name) == (3, "Müller")
    path.write_bytes(b"extends: smoke\nmodel: {target_name: M\xfcller}\n")
    with pytest.raises(InputError, match="mine.yaml: not text in UTF-8"):
        load_profile(path)


def test_a_section_may_be_laid_over_another_with_one_key_changed(project):
    path = project / "mine.yaml"
    path.write_text("extends: smoke\nsft: &long {epochs: 3, learning_rate: 0.1}\ngrpo: {<<: {steps: 2}, steps: 5}\n")
    assert (load_profile(path).sft.epochs, load_profile(path).grpo.steps) == (3, 5)


JUDGE = {"kind": "local", "name": "t", "role_play": False, "persona": "", "question": "?"}
BASELINE = {"sweep": "baseline", "method": "lora", "stages": ["sft_all"], "title": "x"}


@pytest.mark.parametrize("name", ["pissa_rl", "pissa-rl", "theta_0.9", "7b", "_a", "a" * 100])
def test_names_that_work_everywhere_are_taken(name):
    assert name in load_profile("smoke", experiments={name: BASELINE}).experiments


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["my run"], "experiments: 'my run' cannot name a file; use up to 100 of a-z, A-Z, 0-9"),
        (["LoRA/PAR"], "'LoRA/PAR' cannot name a file"),
        (["α=1"], "'α=1' cannot name a file"),
        (["größer"], "'größer' cannot name a file"),
        (["a;b"], "'a;b' cannot name a file"),
        (["a\n"], "cannot name a file"),
        (["-a"], "'-a' cannot name a file"),
        ([".a"], "'.a' cannot name a file"),
        ([".."], "cannot name a file"),
        ([""], "'' cannot name a file"),
        (["a" * 101], "cannot name a file; use up to 100"),
        (["a-seed1"], "'a-seed1' ends as runs do"),
        (["1e3"], "'1e3' would be read as a value, not as a name"),
        (["None"], "'None' would be read as a value"),
        ([0.5], "YAML reads the name 0.5 as a number; put it in quotes, with a letter in it"),
        ([True], "YAML reads the name True as true or false"),
        (["QKV", "qkv"], "'QKV' and 'qkv' would be one file on macOS"),
    ],
)
def test_names_that_would_fail_somewhere_are_refused(project, names, message):
    experiments = {name: BASELINE for name in names}
    with pytest.raises(InputError, match=message):
        load_profile("smoke", experiments=experiments)
    (project / "mine.yaml").write_text(yaml.safe_dump({"experiments": experiments}, allow_unicode=True))
    with pytest.raises(InputError, match=f"mine.yaml: .*{message}"):
        load_profile("mine.yaml")


def test_names_that_a_grid_makes_and_panels_have_follow_the_same_rule(project):
    grid = BASELINE | {"name": "lora {learning_rate}", "over": {"learning_rate": [0.1, 0.2]}}
    (project / "mine.yaml").write_text(yaml.safe_dump({"extends": "smoke", "grids": [grid]}))
    with pytest.raises(InputError, match="experiments: 'lora 0.1' cannot name a file"):
        load_profile("mine.yaml")
    with pytest.raises(InputError, match="voting.panels: 'a/b' cannot name a file"):
        load_profile("smoke", voting={"panels": {"a/b": ["tutor"]}})


def test_a_grid_is_one_experiment_for_each_combination(project):
    grid = {
        "sweep": "theta",
        "method": "lorapar",
        "stages": ["sft"],
        "over": {"modules": ["QKV", "GUD"], "theta": [0.5, 1.0]},
    }
    grid |= {"name": "{modules}_{theta}", "title": "{modules} at {theta}"}
    path = project / "profiles" / "mine.yaml"

    def written(**changes):
        path.write_text(yaml.safe_dump({"extends": "smoke", "grids": [grid | changes]}))
        return load_profile("mine").experiments

    found = written()
    assert [name for name in found if name not in load_profile("smoke").experiments] == [
        "QKV_0.5",
        "QKV_1.0",
        "GUD_0.5",
        "GUD_1.0",
    ]
    assert (found["GUD_0.5"].modules, found["GUD_0.5"].theta, found["GUD_0.5"].title) == ("GUD", 0.5, "GUD at 0.5")
    with pytest.raises(InputError, match="mine.yaml: grids: .* uses 'rank'; its `over` has modules, theta"):
        written(name="{rank}")
    with pytest.raises(InputError, match="mine.yaml: grids: 'QKV' is there twice"):
        written(name="{modules}")
    with pytest.raises(InputError, match="over.theta is no list"):
        written(over={"theta": 0.5})
    with pytest.raises(InputError, match="experiments.QKV_2.theta = 2"):
        written(over={"modules": ["QKV"], "theta": [2]})
    # A profile with experiments of its own takes over neither those of the profile that it extends, nor its grids.
    path.write_text("extends: study\nexperiments: {base: {sweep: baseline, method: lora, stages: [], title: base}}\n")
    assert list(load_profile("mine").experiments) == ["base"]


def test_every_arm_of_the_study_is_tuned_over_four_rates_on_validation():
    study, tuned = load_profile("study"), {}
    for name, spec in study.experiments.items():
        if spec.sweep == "tuning" and name != "gate":
            rate = spec.grpo_learning_rate if "grpo" in spec.stages else spec.learning_rate
            tuned.setdefault(name.rsplit("_", 1)[0], set()).add(rate)
            assert spec.measured_on != "test" and not set(spec.seeds) & set(study.seeds)
    of_stage2 = {name for name in tuned if name.startswith("tune2")}
    assert len(tuned) == 15 and len(of_stage2) == 4 and all(len(rates) >= 4 for rates in tuned.values())


def test_arms_of_stage_1_have_the_rate_with_the_least_loss_on_validation():
    told_apart = ("method", "selection", "r", "init", "theta")
    losses = {}  # of each arm, by rate
    for record in records.study().values():
        asked = record.run["parameters"]
        if asked.get("measured_on") == "validation_loss":
            by_rate = losses.setdefault(tuple(asked[key] for key in told_apart), {})
            by_rate[asked["learning_rate"]] = record.metric("stage1/loss1").value
    profile = load_profile("study")
    arms = [n for n, spec in profile.experiments.items() if spec.stages == ("sft",) and spec.sweep != "tuning"]
    assert len(arms) >= 8
    for name in arms:
        spec, arm = profile.experiments[name], profile.for_experiment(name, 0)
        by_rate = losses[spec.method, spec.selection, arm.adapter.r, arm.adapter.init, arm.partition.theta]
        best = min(by_rate, key=by_rate.get)
        assert best == arm.sft.learning_rate and len(by_rate) >= 4, name
        assert min(by_rate) < best < max(by_rate), name  # an end that wins has to be passed


def test_arms_of_both_stages_have_the_rates_and_kl_that_validation_chose():
    tried = {}
    for record in records.study().values():
        asked = record.run["parameters"]
        if asked.get("sweep") == "tuning" and tuple(asked["stages"]) == ("sft", "grpo"):
            tried.setdefault((asked["method"], asked["selection"], asked["r"]), []).append(record)
    best = {arm: max(runs, key=lambda run: run.metric("stage2/accuracy").value) for arm, runs in tried.items()}
    profile = load_profile("study")
    arms = {name: name for name in ("lorapar", "swapped_rl", "lora_rl", "lora_r3_rl")}
    # The arms of (c) differ from LoRA-PAR in what stage 2 trains alone.
    for name, chosen in (arms | {"beta_0.0": "lorapar", "random_stage2": "lorapar"}).items():
        spec, arm = profile.experiments[chosen], profile.for_experiment(name, 0)
        asked = best[spec.method, spec.selection, arm.adapter.r].run["parameters"]
        assert (asked["learning_rate"], asked["grpo_learning_rate"], asked["kl"]) == (
            arm.sft.learning_rate,
            arm.grpo.learning_rate,
            arm.grpo.kl,
        ), name
    assert len(best) == len(arms)


def test_stage_2_is_tuned_over_stage_1_at_its_frozen_rate():
    study = load_profile("study").experiments
    frozen = {"lora": "lora_sft", "lora_r3": "lora_r3_sft", "importance": "importance_0.9", "swapped": "swapped_0.9"}
    for arm, after_stage1 in frozen.items():
        tuned, chosen = study[f"tune2_{arm}_0.0001"], study[after_stage1]
        for key in ("method", "selection", "r", "lora_alpha", "learning_rate"):
            assert getattr(tuned, key) == getattr(chosen, key), (arm, key)


def test_a_tuning_run_that_would_read_the_test_split_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("experiments:\n  a: {sweep: tuning, method: lora, stages: [sft], title: a}\n")
    with pytest.raises(InputError, match="measured_on = 'test': a tuning run chooses settings"):
        load_profile(path)


def test_a_selection_of_elements_where_all_are_trained_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("experiments:\n  a: {sweep: baseline, method: lora, selection: swapped, stages: [sft], title: a}\n")
    with pytest.raises(InputError, match="experiments.a: selection = 'swapped': lora trains every element"):
        load_profile(path)


def test_an_experiment_carries_its_own_values(project):
    study = load_profile("study")
    settings = study.for_experiment("tune_importance_0.5_0.002", seed=7)
    assert (settings.partition.theta, settings.sft.learning_rate, settings.seed) == (0.5, 0.002, 7)
    smaller = study.for_experiment("tune_lora_r3_0.001", seed=7).adapter
    assert smaller.lora_alpha / smaller.r == study.adapter.lora_alpha / study.adapter.r


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"seed": -1}, "seed = -1: Input should be greater than or equal to 0"),
        (
            {"voting": {"teachers": [{"name": "majority", "kind": "recorded", "path": "x.csv"}]}},
            "'majority' is what the panel decides",
        ),
        ({"thetta": 0.5}, "thetta is not a setting; allowed here: .*partition"),
        ({"sft": {"epoch": 1}}, "sft.epoch is not a setting; allowed here: epochs, learning_rate"),
        ({"theta": 0}, "partition.theta = 0: .*greater than 0"),
        ({"theta": 1.5}, "partition.theta = 1.5"),
        ({"alpha": 2}, "partition.alpha = 2"),
        ({"beta": -1}, "partition.beta = -1"),
        ({"modules": "XYZ"}, "adapter.modules = 'XYZ': .*'QKV'"),
        ({"grpo": {"micro_batch": 3}}, "micro_batch = 3 does not divide"),
        ({"grpo": {"rollout_batch": 3}}, "rollout_batch = 3 has to be a multiple of completions = 2"),
        ({"grpo": {"rollout_batch": 64}}, "rollout_batch = 64 .* at most prompts_per_step x completions = 4"),
        ({"voting": {"quorum": 4}}, "quorum = 4 exceeds the 3 teachers"),
        ({"voting": {"panels": {"x": ["nobody"]}}}, "panels.x names no teacher: nobody"),
        ({"voting": {"panels": {"x": ["tutor", "examiner"]}}}, "tie: the 2 teachers of panel 'x' can tie; set tie to"),
        ({"voting": {"panel": "five"}}, "panel = 'five' is not in panels"),
        ({"voting": {"teachers": [{"name": "a", "kind": "oracle"}]}}, r"voting.teachers.0.*'local', 'api', 'recorded'"),
        ({"voting": {"teachers": [{"name": "a", "kind": "api", "modle": "x"}]}}, "modle is not a setting; .*base_url"),
    ],
)
def test_bad_settings_name_key_value_and_remedy(override, message):
    with pytest.raises(InputError, match=message):
        load_profile("smoke", **override)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"method": "olora", "init": "normal"}, "init = 'normal': method olora has its own"),
        ({"method": "lora", "panel": "x", "split_by": "random"}, "a.panel = 'x': split_by is random; set it to votes"),
    ],
)
def test_an_arm_says_nothing_that_would_be_passed_over(arm, message):
    asked = {"sweep": "voting", "stages": ["sft"], "title": "an arm"}
    with pytest.raises(InputError, match=message):
        load_profile("smoke", experiments={"a": asked | arm})


def test_an_arm_without_seeds_does_not_run_and_lists_grow_in_a_copy_too():
    arm = {"sweep": "voting", "method": "lora", "stages": ["sft"], "title": "an arm"}
    settings = load_profile("smoke", experiments={"none": arm | {"seeds": []}, "all": arm})
    assert [name for name, _ in settings.experiment_runs()] == ["all"] * len(settings.seeds)
    two = [{"name": name, "kind": "recorded", "path": "x.csv"} for name in ("fourth", "fifth")]
    assert len(settings.changed(voting={"teachers+": two}).voting.teachers) == len(settings.voting.teachers) + 2


def test_a_parameter_that_is_bad_is_not_called_the_files(tmp_path):
    with pytest.raises(InputError, match=r"^parameter over .*smoke\.yaml: partition\.theta = 1\.8: "):
        load_profile("smoke", theta=1.8)
    profile = tmp_path / "mine.yaml"
    profile.write_text("extends: smoke\npartition: {theta: 1.8}\n")
    with pytest.raises(InputError, match=rf"^{profile}: partition\.theta = 1\.8: "):
        load_profile(profile, alpha=0.5)


def test_unknown_profile_lists_those_there_are():
    with pytest.raises(InputError, match="no 'gpu'; choose one of gemma3-270m, laptop, llama2-7b"):
        load_profile("gpu")


def test_mistyped_key_in_a_file_names_the_file(project):
    path = project / "mine.yaml"
    path.write_text("grpo: {step: 3}\n")
    with pytest.raises(InputError, match=r"mine.yaml: grpo.step is not a setting"):
        load_profile(path)
    path.write_text("just words")
    with pytest.raises(InputError, match="mine.yaml: expected 'key: value' lines"):
        load_profile(path)


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pins.items()}


def test_conda_environment_pins_what_the_lock_pins():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert {n.lower().replace("_", "-"): v for n, v in (d.split("==") for d in listed)}.items() <= locked().items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    assert len(listed) == len(wanted)


def test_locked_packages_run_on_the_oldest_python_that_we_name():
    """Debian 12 has Python 3.11.2; a package that wants 3.11.5 stops the install there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    wanted = {d.name: d.metadata.get("Requires-Python") or "" for d in importlib.metadata.distributions()}
    assert len(wanted) > 100
    assert not {n: r for n, r in wanted.items() if not SpecifierSet(r).contains(oldest)}


def test_lock_holds_every_direct_dependency_at_its_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for dependency in project["dependencies"] + project["optional-dependencies"]["test"]:
        name, _, version = dependency.partition("==")
        assert locked()[name] == version if version else name in locked(), dependency


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": {"sharded": True}}, "model.sharded = true shares the base over processes; set processes above 1"),
        ({"model": {"sharded": True, "quantization": "nf4"}, "processes": 2}, "a 4-bit base cannot be shared out"),
        ({"model": {"quantization": "nf4"}, "adapter": {"init": "pissa"}}, "which 4 bits cannot take"),
        ({"grpo": {"rollouts": "vllm-server"}}, "vllm_server is null; give the address"),
        ({"voting": {"teachers": [JUDGE | {"labels": ("yes", "yes ")}]}}, "both are 'yes', so that no margin says"),
    ],
)
def test_bases_and_samplers_that_cannot_be_had_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        load_profile("smoke", **overrides)


def test_local_files_are_those_behind_every_path(tmp_path):
    model, votes = tmp_path / "model", tmp_path / "votes.csv"
    (model / "inner").mkdir(parents=True)
    for path in (model / "config.json", model / "inner" / "weights.bin", model / ".hidden", votes):
        path.write_text("{}")
    teacher = {"name": "file", "kind": "recorded", "path": str(votes)}
    settings = load_profile(
        "smoke", model={"source": str(model)}, voting={"teachers": [teacher], "panels": {}, "panel": None}
    )
    assert settings.local_files() == [model / "config.json", model / "inner" / "weights.bin", votes]
    assert load_profile("smoke").local_files() == []
