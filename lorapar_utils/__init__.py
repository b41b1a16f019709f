"""LoRA-PAR, reproduced: what the notebooks of the book call.

The method is `importance`, `partition` and `optim`. The folders are the experiment around it: `data`, `voting`,
`models`, `training` and `evaluation`, chained by `pipeline`, noted by `records`, shown by `report`. Importing the
package itself loads none of them, so figures and tables never pay for torch.
"""

import os

__version__ = "0.2.0"

# TRL reports each trainer that is made to the Hugging Face hub, without asking. Set to 0 to allow.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# TRL warns at each trainer that `rollout_func` may change. Its version is pinned.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
