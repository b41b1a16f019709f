"""The published adapters: where they lie, whether they are whole, and whether a profile's model is their base."""

import json
from pathlib import Path

from lorapar_utils.cache import MANIFEST, is_whole
from lorapar_utils.errors import InputError
from lorapar_utils.models.identity import model_identity
from lorapar_utils.settings import Settings, project_root

HOME = Path("results", "study", "adapters")
# The profile that trained them lies beside them; its pool's test split is what they are asked.
TRAINED_BY = HOME / "trained_by.yaml"


def published_adapters() -> dict[str, Path]:
    """Folders of the published adapters, by experiment; each has PEFT's files, a partition and the experiment's record.

    Raises
    ------
    InputError
        A file of one is missing or is not the published one.
    """
    home = project_root() / HOME
    folders = {manifest.parent.name: manifest.parent for manifest in sorted(home.glob(f"*/{MANIFEST}"))}
    for name, folder in folders.items():
        if not is_whole(folder):
            where = folder.relative_to(project_root())
            raise InputError(
                f"published adapter {name}: a file of {where} is not the one that was published (its hash differs, or "
                f"it is missing); `git checkout {where}` brings it back"
            )
    return folders


def fits_published(settings: Settings) -> bool:
    """Whether the published adapters exist and belong onto the model of this profile."""
    manifests = sorted((project_root() / HOME).glob(f"*/{MANIFEST}"))
    if not manifests:
        return False
    base = json.loads(manifests[0].read_text(encoding="utf-8"))["inputs"]["model"]["source"]
    return model_identity(settings)["source"] == base


def published_items(folder: Path) -> dict[str, dict]:
    """What an adapter answered when it was published: the test outcomes after its last stage, by id."""
    lines = (folder / "record.items.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    last = max(item["stage"] for item in items)
    return {item["id"]: item for item in items if item["stage"] == last}
