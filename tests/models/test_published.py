"""Published adapters are taken only as they were published, and only onto their own base."""

import json

import pytest

from lorapar_utils import build
from lorapar_utils.cache import completed
from lorapar_utils.errors import InputError
from lorapar_utils.models.identity import model_identity
from lorapar_utils.models.published import fits_published, published_adapters, published_items
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
