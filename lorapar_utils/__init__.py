"""LoRA-PAR, reproduced: what the notebooks of the book call.

Import the module that answers your question: `settings`, `data`, `models`, `voting`, `importance`,
`partition`, `optim`, `training`, `evaluation`, `records`, `plots`, `tables`; `phases` chains them.
Importing the package itself loads none of them, so figures and tables never pay for torch.
"""

__version__ = "0.1.0"
