"""LoRA-PAR, reproduced: what the notebooks of the book call.

Import the module that answers your question: `settings`, `data`, `models`, `voting`, `importance`,
`partition`, `optim`, `training`, `evaluation`, `records`, `plots`, `tables`; `phases` chains them.
Importing the package itself loads none of them, so figures and tables never pay for torch.
"""

import os

__version__ = "0.1.0"

# TRL reports each trainer that is made to the Hugging Face hub, without asking. Set to 0 to allow.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
