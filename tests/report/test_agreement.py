"""This run beside the published one: equal runs agree, and a difference is explained by the machines or flagged."""

import copy
from dataclasses import replace

import pytest

from lorapar_utils.records import Record, intervals, write_record
from lorapar_utils.records.intervals import Metric
from lorapar_utils.report import agreement
from lorapar_utils.settings import load_profile

ENVIRONMENT = {
    "dtype": "float32",
    "hardware": {"instructions": ["avx2"], "gpu": None},
    "packages": dict.fromkeys(("torch", "transformers", "peft", "trl"), "1"),
}


def record(name, metrics=(), tables=(), items=(), seed=0, **parameters):
    run = {"name": name, "profile": "smoke", "seed": seed, "parameters": parameters, "commit": "c", "created": "today"}
    result = {"metrics": {key: metric.as_json() for key, metric in dict(metrics).items()}, "tables": dict(tables)}
    return Record(run=run, result=result, environment=copy.deepcopy(ENVIRONMENT), items=list(items))


def voting(*votes):
    return record("voting", items=[{"id": str(i), "votes": {"tutor": vote}} for i, vote in enumerate(votes)])


def importance(*means):
    rows = [
        {"layer": i, "module": "q_proj", "matrix": "A", "system1": m, "system2": 1.0 + i} for i, m in enumerate(means)
    ]
    return record("importance", tables={"map": rows})


def trained(seed, right):
    metrics = {f"stage1/system{k}": intervals.proportion([True] * right + [False] * (40 - right)) for k in (1, 2)}
    return record(f"lorapar-seed{seed}", metrics, seed=seed, title="LoRA-PAR", stages=["sft"])


@pytest.fixture
def both(project):
    """Writes this run's records and the published ones of `smoke`; gives the verdicts by what was compared."""

    def write(own, published):
        settings = load_profile("smoke")
        for made, folder in ((own, settings.runs / "records"), (published, project / "results" / "smoke")):
            for one in made:
                write_record(one, folder / f"{one.name}.json")
        return agreement.verdicts(settings).set_index("compared")

    return write


def test_equal_runs_agree(both):
    published = [voting(1, 2, 2), importance(1.0, 3.0, 2.0), *(trained(seed, 20 + seed) for seed in range(5))]
    rows = both([voting(1, 2, 2), importance(1.0, 3.0, 2.0), trained(0, 20)], published)
    assert list(rows.index) == ["votes", "importance", "training, LoRA-PAR"]
    assert set(rows["verdict"]) == {"agrees"}
    assert rows.loc["votes", "agreement"] == "3 of 3 equal, example by example"


def test_a_difference_on_equal_machines_is_flagged_and_on_others_put_down_to_them(both):
    published = [voting(1, 2, 2), importance(1.0, 3.0, 2.0), *(trained(seed, 20 + seed) for seed in range(5))]
    own = [voting(1, 2, 1), importance(3.0, 1.0, 2.0), trained(0, 40)]
    flagged = both(own, published)
    assert set(flagged["verdict"]) == {"differs, and should not"}
    other = [replace(one, environment={**one.environment, "dtype": "bfloat16"}) for one in own]
    explained = both(other, published)
    assert set(explained["verdict"]) == {"differs, for a known reason"}
    assert set(explained["because"]) == {"dtype bfloat16 here, float32 there"}


def test_an_experiment_with_a_new_title_is_compared_by_its_name(both):
    renamed = trained(0, 20)
    renamed.run["parameters"]["title"] = "mine"
    rows = both([renamed], [trained(seed, 20 + seed) for seed in range(5)])
    assert rows.loc["training, mine", "verdict"] == "agrees"


def test_seeds_of_one_experiment_share_a_row(both):
    rows = both([trained(0, 20), trained(1, 21)], [trained(seed, 20 + seed) for seed in range(5)])
    assert list(rows.index) == ["training, LoRA-PAR"]
    assert rows.loc["training, LoRA-PAR", "agreement"].startswith("4 of 4 accuracies")


def test_a_record_that_does_not_name_its_machine_explains_nothing(both):
    silent = [
        replace(one, environment={**one.environment, "dtype": None}) for one in (voting(1, 2), importance(1.0, 3.0))
    ]
    rows = both([voting(1, 1), importance(3.0, 1.0)], silent)
    assert set(rows["verdict"]) == {"differs, for a reason not recorded"}
    assert set(rows["because"]) == {"a record does not name its dtype"}


def test_only_examples_and_teachers_of_both_runs_are_compared():
    own, published = voting(1, 2), voting(1)
    own.items[0]["votes"]["mine"] = 2
    assert agreement.votes(own, published).to_dict("records") == [{"teacher": "tutor", "examples": 1, "equal": 1}]


def test_training_is_inside_where_one_more_seed_would_be():
    rows = agreement.training([trained(0, 20)], [trained(seed, right) for seed, right in enumerate((18, 20, 22))])
    assert rows["inside"].tolist() == [True, True] and rows["seeds"].tolist() == [3, 3]
    rows = agreement.training([trained(0, 39)], [trained(seed, right) for seed, right in enumerate((18, 20, 22))])
    assert rows["inside"].tolist() == [False, False]
    assert agreement.training([trained(0, 20)], [trained(0, 20)]).empty  # one seed has no spread


def test_selected_elements_are_compared_where_both_have_a_partition():
    again = record("again", {"partition/system1": Metric(0.5, 10), "partition/system2": Metric(1.0, 10)})
    rows = agreement.importance(importance(1.0, 2.0), importance(1.0, 2.0), again)
    assert rows["Jaccard index"].tolist() == [0.5, 1.0] and rows["rank correlation"].tolist() == [1.0, 1.0]


def test_nothing_published_is_nothing_to_compare(both):
    assert both([voting(1, 2)], []).empty
