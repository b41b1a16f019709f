"""AdamW that updates, and keeps moments for, active elements only."""

from collections.abc import Iterable

import torch
from torch.optim.adamw import adamw

from lorapar_utils.errors import InputError


class ActiveAdamW(torch.optim.Optimizer):
    """AdamW over the active elements of each parameter.

    Deviation from the paper's script, which zeroes gradients under a dense AdamW. There decoupled weight decay and old
    momentum still move "frozen" elements. Here inactive elements are never written.

    The parameters become views of one buffer, so that a step gathers all active elements into one vector, applies
    `torch.optim.adamw.adamw` to it, and writes the elements back, in as many calls for one matrix as for hundreds.
    Active elements therefore follow `torch.optim.AdamW` exactly. Hooks zero inactive gradients before these are
    accumulated or averaged over processes, so that gradient clipping measures the norm of active elements alone. They
    last until `release`, or until another `ActiveAdamW` takes the parameters over, as the next stage's does. A
    parameter that the loss does not use counts as having a zero gradient. A parameter without an active element stops
    requiring a gradient.

    Parameters
    ----------
    named_parameters
        (name, Parameter) pairs.
    masks
        Parameter name -> BoolTensor of the parameter's shape, True = active.
    lr, betas, eps, weight_decay
        As in `torch.optim.AdamW`.

    Raises
    ------
    InputError
        A mask that is missing or has another shape or dtype, or masks without any active element.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        masks: dict[str, torch.Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        active: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._hooks = []
        for name, parameter in named_parameters:
            mask = _checked_mask(name, parameter, masks)
            _remove_gates(parameter)
            parameter.requires_grad_(bool(mask.any()))
            if parameter.requires_grad:
                active[parameter] = mask.flatten()
                if not mask.all():
                    self._hooks.append(parameter.register_hook(_Gate(mask.to(parameter.device))))
        if not active:
            raise InputError("masks: no element is active; raise theta, alpha or beta")
        self._buffers = [_Buffer({p: active[p] for p in parameters}) for parameters in _alike(active)]
        super().__init__(active.keys(), dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        [group] = self.param_groups
        for buffer in self._buffers:
            values = buffer.active_values()
            state = self._state_of(buffer.parameters[0], values)
            adamw(
                [values],
                [buffer.active_gradients()],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],
                [state["step"]],
                # Not fused: rounding in fused kernels depends on an element's position, which gathering changes.
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            buffer.write(values)
        return loss

    def release(self) -> None:
        """Remove the gradient hooks, so that any other optimizer can train every element."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state_bytes(self) -> int:
        """Bytes of both moments, which exist for active elements only."""
        moments = [state[key] for state in self.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return sum(moment.numel() * moment.element_size() for moment in moments)

    def _state_of(self, first: torch.nn.Parameter, values: torch.Tensor) -> dict:
        """Optimizer state of a buffer's active elements, stored under the first parameter of the buffer."""
        state = self.state[first]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(values), torch.zeros_like(values)
        return state


class _Gate:
    """A gradient hook that lets active elements through."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.mask


def _remove_gates(parameter: torch.nn.Parameter) -> None:
    hooks = parameter._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Gate)]:
        del hooks[key]


def _alike(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters grouped by device and dtype, because one buffer has one device and one dtype."""
    groups: dict[tuple, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(groups.values())


class _Buffer:
    """The memory of parameters of one device and dtype in one piece, and the places of its active elements.

    Parameters
    ----------
    masks
        Parameter -> flat BoolTensor, True = active.
    """

    def __init__(self, masks: dict[torch.nn.Parameter, torch.Tensor]):
        self.parameters = list(masks)
        self._places = torch.cat(list(masks.values())).nonzero().squeeze(1).to(self.parameters[0].device)
        self._take_over()

    def _take_over(self) -> None:
        """Copy the parameters into a new buffer and make them views of it."""
        self._memory = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        parts = self._memory.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.data = part.view(parameter.shape)
        self._addresses = [part.data_ptr() for part in parts]

    def active_values(self) -> torch.Tensor:
        # Whoever has assigned to `parameter.data` since, has given the parameter memory of its own.
        if [parameter.data_ptr() for parameter in self.parameters] != self._addresses:
            self._take_over()
        return self._memory.index_select(0, self._places)

    def active_gradients(self) -> torch.Tensor:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([gradient.reshape(-1) for gradient in gradients]).index_select(0, self._places)

    def write(self, values: torch.Tensor) -> None:
        self._memory.index_copy_(0, self._places, values)


def _checked_mask(name: str, parameter: torch.nn.Parameter, masks: dict[str, torch.Tensor]) -> torch.Tensor:
    if name not in masks:
        raise InputError(f"masks: no mask for parameter {name!r}; build the partition from this model's scores")
    mask = masks[name]
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise InputError(
            f"masks[{name!r}]: expected bool of shape {tuple(parameter.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask
