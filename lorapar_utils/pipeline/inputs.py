"""What scores, training and measurements are all made from."""

from lorapar_utils import models
from lorapar_utils.cache import code_of, libraries
from lorapar_utils.models.identity import model_identity
from lorapar_utils.settings import Settings


def common_inputs(file: str, settings: Settings) -> dict:
    """Code of the phase in `file` (its `__file__`), libraries, model and its dtype, shortcuts, seed."""
    model = model_identity(settings)
    del model["target_name"]  # only the teachers read it
    return {
        "code": code_of(file),
        "libraries": libraries(),
        "dtype": str(models.compute_dtype(settings)),
        "model": model,
        "speed": settings.shortcuts,
        "seed": settings.seed,
    }
