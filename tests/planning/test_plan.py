"""The plan: its memory is that of real tensors, any architecture has one, and what cannot fit is refused."""

import time

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from lorapar_utils import build, models
from lorapar_utils.errors import InputError
from lorapar_utils.fast.decoding import answering
from lorapar_utils.planning import jobs, plan, preflight
from lorapar_utils.settings import load_profile

LAPTOP = plan.Machine("a laptop", 8e9, 0.6e9, cpu=True)
GPU = plan.Machine("one X", 48e9, 0.8e9, flops=100e12, flops32=10e12, bandwidth=1e12)
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
GROUPED = SIZES | {"num_key_value_heads": 2}
# kind of model -> (its configuration, layers that get adapters)
KINDS = {
    "llama": (GROUPED, ["q_proj", "k_proj", "v_proj"]),
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4}, ["c_attn"]),
    "gemma2": (GROUPED, ["q_proj", "down_proj"]),
    "mixtral": (GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, ["q_proj"]),
    "mamba": (SIZES | {"state_size": 8}, ["in_proj"]),
    "lfm2": (GROUPED | {"layer_types": ["conv", "full_attention"]}, ["w1", "q_proj"]),
    "falcon_h1": (GROUPED | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, ["q_proj"]),
}


def planned(monkeypatch, kind="llama", adapter=(), **changes) -> plan.Model:
    """The plan's model of a small configuration."""
    widths, modules = KINDS[kind]
    config = AutoConfig.for_model(kind, vocab_size=512, **widths)
    monkeypatch.setattr(plan, "configuration", lambda settings: config)
    return plan.Model(load_profile("smoke", threads=1, adapter={"modules": modules} | dict(adapter), **changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [{}, {"modules": "QKVGUD"}, {"modules": "QKVGUD", "dropout": 0.1}], ids=str)
def test_activations_are_what_autograd_keeps(monkeypatch, dtype, adapter):
    plan = planned(monkeypatch, adapter=adapter, model={"dtype": dtype})
    model, kept = plan._built().train(), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embedded = torch.randn(4, 64, plan.hidden, dtype=plan.dtype).requires_grad_(True)
    with answering(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.get_base_model().base_model(inputs_embeds=embedded, use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    held = plan.passes(GPU, "sft", 4, 64, 1).held * plan.layers / (plan.layers + 1)  # one more is at work
    assert held == pytest.approx(real, rel=0.1)


def test_the_cache_of_completions_is_that_of_transformers(monkeypatch):
    plan = planned(monkeypatch, model={"dtype": "float32"})
    cache = DynamicCache(config=plan.config)
    with torch.no_grad():
        plan._built()(input_ids=torch.ones(3, 40, dtype=torch.long), past_key_values=cache)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    held = plan.passes(GPU, "decode", 3, 1, 1, before=30, times=20).held
    assert held == pytest.approx(real * (1 + 1 / plan.layers) + 16 * 3 * plan.vocabulary)  # a layer's is written anew


@pytest.mark.parametrize("kind", KINDS)
def test_every_build_has_a_plan_and_layers_that_are_run(monkeypatch, kind):
    model = planned(monkeypatch, kind, model={"dtype": "float32"})
    parameters = list(model._built().parameters())
    weights = model.passes(LAPTOP, "read", 1, 8, 1).weights
    assert weights == 4 * sum(p.numel() for p in parameters if not p.requires_grad)
    assert model.elements == sum(p.numel() for p in parameters if p.requires_grad)
    run, taken = plan.Model._seconds, []
    monkeypatch.setattr(plan.Model, "_seconds", lambda *given: taken.append(run(*given)) or taken[-1])
    for machine in (GPU, LAPTOP._replace(flops=None)):
        phases = plan.phases_of(model, machine)
        assert all(0 < phase.seconds < 1e4 and machine.libraries < phase.bytes < 8e9 for phase in phases)
    assert len(taken) == 8  # of every kind and size of pass
    monkeypatch.setattr(plan.Model, "_seconds", lambda *_: 1 / 0)
    assert 0 < model.passes(machine, "sft", 3, 31, 5).seconds < 100  # by a product


def test_importance_is_planned_with_the_samples_that_stability_compares(monkeypatch):
    def seconds(sizes):
        model = planned(monkeypatch, importance={"examples": 10, "stability": sizes})
        return {phase.name: phase.seconds for phase in plan.phases_of(model, GPU)}["importance"]

    # Three draws of two samples of 5 and of 10, and of the largest under another adapter, beside the ten scored.
    assert seconds([5, 10]) / seconds([]) == pytest.approx((10 + 3 * (2 * 15 + 10)) / 10)


def test_what_is_saved_by_four_bits_shares_and_activations_computed_again():
    changes = {}, {"model": {"quantization": "nf4"}}, {"processes": 4, "model": {"sharded": True}}
    whole, four_bits, shared = (plan.Model(load_profile("llama2-7b", **change)) for change in changes)
    sizes = [model.passes(GPU, "sft", 1, 8, 1).weights for model in (whole, four_bits, shared)]
    assert sizes[0] == pytest.approx(2 * 6.738e9, rel=0.001)
    assert 0.27 < sizes[1] / sizes[0] < 0.32 and 0.25 < sizes[2] / sizes[0] < 0.30
    assert shared.passes(GPU, "decode", 1, 1, 1, before=8).weights == sizes[0]  # whole while completions are written
    [lean], [part] = (model.batches(GPU)["sft"] for model in (whole, shared))
    assert part.held == pytest.approx(lean.held / 4)  # a process's share of a step
    whole.settings = whole.settings.changed(sft={"gradient_checkpointing": False})
    [plain] = whole.batches(GPU)["sft"]
    assert lean.held < plain.held / 5 and 1.4 < lean.seconds / plain.seconds < 1.7


def test_a_cpu_reads_once_what_sequences_share(monkeypatch):
    plan = planned(monkeypatch)
    plan.shared = 30
    padded, together = (plan.passes(machine._replace(flops=1e9), "sft", 8, 50, 1).seconds for machine in (GPU, LAPTOP))
    assert together / padded == pytest.approx((30 + 8 * 20) / (8 * 50), rel=0.2)  # but longer rows to attend to


def test_a_profile_that_cannot_fit_is_refused_with_the_arithmetic(monkeypatch, capsys):
    monkeypatch.setattr(jobs, "would_run", lambda *_: [jobs.Job("prepare", "", "Missing output files: x", "")])
    build.print_plan("llama2-7b", "H100", cores=2)
    shown = capsys.readouterr().out.splitlines()
    assert "on one H100" in shown[-1] and any(line.startswith("importance ") for line in shown)
    monkeypatch.setattr(plan, "memory_here", lambda: LAPTOP)
    monkeypatch.setattr(preflight, "check", lambda settings: None)
    with pytest.raises(
        InputError,
        match=r"llama2-7b: .* needs \d+\.\d GB \(libraries 0.6 \+ weights 13.5 .* has 8.0; lower \w+\.\w+ \(",
    ):
        build._check_before(load_profile("llama2-7b"), here=True)


def test_unknown_machines_and_models_are_named(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(plan.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(InputError, match="MACHINE = 'abacus': choose one of here, H200, H100"):
        plan.machine_named("abacus")
    lost = load_profile("smoke", model={"source": "nobody/nothing-7b"})
    with pytest.raises(InputError, match=r"as a hub id no configuration .* no profiles/architectures/nothing-7b.json"):
        plan.configuration(lost)


def test_without_a_way_to_the_hub_a_mistyped_folder_is_told_at_once(monkeypatch, tmp_path):
    began = time.monotonic()
    for name, value in {"HF_HUB_CACHE": str(tmp_path), "ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("lorapar_utils.models.files.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    lost = load_profile("smoke", model={"source": "models/mistyped"})
    for read in (plan.configuration, models.load_config):
        with pytest.raises(InputError, match="'models/mistyped'.*no such folder.*127.0.0.1 cannot be reached"):
            read(lost)
    assert time.monotonic() - began < 5


def test_a_plan_names_teachers_on_servers_and_the_keys_that_are_not_set(monkeypatch):
    teacher = {"kind": "api", "name": "r1", "role_play": True, "model": "m", "api_key_env": "R1_KEY"}
    asked = load_profile("smoke", voting={"teachers": [teacher]})
    monkeypatch.delenv("R1_KEY", raising=False)
    row = plan.Row("voting", 1, 0, "not made yet", 1e9, 5)
    told = plan.as_text(asked, LAPTOP, [row])
    assert "Asked on servers: r1 (R1_KEY is not set yet). " in told and "split smoke --dry-run" in told
    monkeypatch.setenv("R1_KEY", "x")
    assert "Asked on servers: r1. " in plan.as_text(asked, LAPTOP, [row])
    constructed = asked.changed(voting={"split_by": "construction"})
    assert "not by votes.\nAsked on servers: r1. " in plan.as_text(constructed, LAPTOP, [row])
    with pytest.raises(InputError, match="api_key_env is the name of an environment variable") as caught:
        pasted = load_profile("smoke", voting={"teachers": [teacher | {"api_key_env": "sk-abcdefgh"}]})
        plan.as_text(pasted, LAPTOP, [row])
    assert "sk-abc" not in str(caught.value)


def job(rule, what="", reason="Missing output files: x"):
    return jobs.Job(rule, what, reason, "")


def test_a_plan_has_a_row_for_each_phase_with_a_job_and_tells_what_is_read_back(monkeypatch, project):
    settings = load_profile("smoke")
    (settings.runs / "votes").mkdir(parents=True)
    phases = [plan.Phase("voting by local teachers", 1, 60.0, {"weights": 1e9}), plan.Phase("importance", 1, 30.0, {})]
    phases += [plan.Phase("sft, LoRA-PAR", 1, 40.0, {}, (("sft",), True)), plan.Phase("base", 1, 20.0, {}, ((), False))]
    asked = [
        job("prepare", reason="Updated input files: profiles/smoke.yaml, a.py, b.py"),
        job("experiment", "random_0.9-seed0", "Input files updated by another job: x"),
        job("experiment", "base-seed0"),
        job("page", "00_tour"),
        job("book"),
    ]
    monkeypatch.setattr(plan, "is_whole", lambda folder: folder.parent.name == "votes")
    monkeypatch.setattr(plan, "scores_folder", lambda *_: settings.runs / "scores" / "x")
    monkeypatch.setattr(plan.Examples, "systems", {})
    rows = plan.rows(settings, phases, asked, cores=2, start=5.0)
    found = {row.phase: (row.runs, row.kept, row.why) for row in rows}
    assert found == {
        "voting by local teachers": (0, 1, "changed: profiles/smoke.yaml, a.py and 1 more"),
        "importance": (1, 0, "changed: profiles/smoke.yaml, a.py and 1 more"),
        "sft, LoRA-PAR": (1, 0, "what it reads is made anew"),
        "base": (1, 0, "not made yet"),
        "pages": (1, 0, "not made yet"),
        "book": (1, 0, "not made yet"),
    }
    assert rows[0].seconds == 0 and rows[2].seconds > 40
    text = plan.as_text(settings, LAPTOP, rows)
    assert len(text.splitlines()) == 10 and max(map(len, text.splitlines())) < 120
    assert "split by votes of psychologist, tutor, examiner.\n" in text
    fewer = settings.changed(voting={"panels": {"two": ["tutor", "examiner"]}, "panel": "two", "tie": "system2"})
    assert "split by votes of tutor, examiner (panel two), a tie is system2.\n" in plan.as_text(fewer, LAPTOP, rows)
    constructed = settings.changed(voting={"split_by": "construction"})
    assert "split by construction, not by votes" in plan.as_text(constructed, LAPTOP, rows)


def test_a_plan_of_nothing_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(jobs, "would_run", lambda *_: [])
    monkeypatch.setattr(plan.Model, "_rate_here", lambda *_: 1 / 0)
    build.print_plan("smoke", "here", cores=2)
    assert "everything is made" in capsys.readouterr().out
