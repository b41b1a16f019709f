"""Published adapters are taken only as they were published, and only onto their own base."""

import json

import pytest

from lorapar_utils import build
from lorapar_utils.cache import completed, origin
from lorapar_utils.errors import InputError
from lorapar_utils.models.identity import model_identity
from lorapar_utils.models.published import HOME, TRAINED_BY, fits_published, published_adapters, published_items
from lorapar_utils.records import new_record, write_record
from lorapar_utils.report import publish
from lorapar_utils.settings import load_profile


@pytest.fixture
def folder(project):
    settings = load_profile("smoke")
    home = project / "results" / "study" / "adapters" / "lorapar"
    with completed(home, {"model": model_identity(settings)}) as scratch:
        (scratch / "adapter_model.safetensors").write_bytes(b"weights")
        items = [{"id": "a", "stage": stage, "completion": stage} for stage in ("stage1", "stage2")]
        (scratch / "record.items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return home


def test_an_adapter_is_found_with_what_it_answered_after_its_last_stage(folder):
    assert published_adapters() == {"lorapar": folder}
    assert published_items(folder)["a"]["completion"] == "stage2"


def test_an_adapter_whose_hash_differs_is_named_with_the_command_that_brings_it_back(folder, capsys):
    (folder / "adapter_model.safetensors").write_bytes(b"weightz")
    message = "published adapter lorapar: .*its hash differs.*git checkout results/study/adapters/lorapar"
    with pytest.raises(InputError, match=message):
        published_adapters()
    assert build.main(["smoke"]) == 2 and "its hash differs" in capsys.readouterr().err
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        published_adapters()


def test_another_base_is_not_asked_with_them(folder, saved_model):
    assert fits_published(load_profile("smoke"))
    assert not fits_published(load_profile("smoke", model={"source": str(saved_model)}))


def test_without_published_adapters_nothing_fits(project):
    assert published_adapters() == {} and not fits_published(load_profile("smoke"))


def test_adapters_are_published_together_with_the_settings_that_they_are_asked_under(project):
    settings = load_profile("study")
    publish.publish_adapters(settings)  # nothing was trained, so nothing is published
    assert not (project / HOME).exists()
    for name in publish.PUBLISHED:
        stage = settings.runs / "stages" / name
        with completed(stage, {"model": {"source": "packaged"}}, origin()) as scratch:
            (scratch / "adapter").mkdir()
            (scratch / "adapter" / "adapter_model.safetensors").write_bytes(name.encode())
            (scratch / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "/tmp/x"}')
        links = settings.runs / "experiments" / f"{name}-seed0"
        links.mkdir(parents=True)
        for number in (1, 2):
            (links / f"stage{number}").symlink_to(stage)
        write_record(
            new_record(f"{name}-seed0", settings, metrics={}), settings.runs / "records" / f"{name}-seed0.json"
        )
    publish.publish_adapters(settings)
    asked = load_profile(project / TRAINED_BY)
    assert asked.pool == settings.pool
    assert asked.evaluation.max_new_tokens == settings.evaluation.max_new_tokens
    assert list(published_adapters()) == sorted(publish.PUBLISHED)
    for folder in (project / HOME / "lorapar", project / HOME / "lorapar" / "stage1"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == publish.BASE
        assert (folder / "adapter_model.safetensors").read_bytes() == b"lorapar"
