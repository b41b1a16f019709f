"""Importance of every LoRA element to a set of examples (paper, section 3.2).

For an element phi_j, with g_j the mean and F_jj the mean square of the per-example gradients d loss_i / d phi_j:

    I(phi_j) = | g_j phi_j - 1/2 F_jj phi_j^2 |

Deviation from the paper's script: dropout is off, and examples are scored in batches. Per-example gradients stay exact,
because a LoRA matrix computes W x: an example's gradient is the sum over tokens of (output gradient) x (input), and one
batched matrix product gives this sum for every example. Two examples are compared with autograd first. If the gradients
differ, the model is scored one example at a time. On a GPU, adapters over a bf16 or fp16 base compute in its dtype, as
they do in training; gradients are summed in fp32 everywhere.

Under `accelerate launch` each process scores a share of the examples, and every process returns the scores of all.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from accelerate.utils import reduce
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from lorapar_utils import distributed
from lorapar_utils.errors import InputError

# The label of a token without a loss, as in torch's cross_entropy.
IGNORED = -100
# Score of an element from g, F and phi as above: the paper's score first, then those of the ablation.
SCORES = {
    "second_order": lambda g, f, phi: (g * phi - 0.5 * f * phi.square()).abs(),
    "first_order": lambda g, f, phi: (g * phi).abs(),
    "fisher": lambda g, f, phi: f,
    "magnitude": lambda g, f, phi: phi.abs(),
    "random": lambda g, f, phi: torch.rand(phi.shape),
}
# Largest difference between padded batches and single examples that is rounding, relative to the gradients' norm.
ROUNDING, LOW_PRECISION = {torch.float32: 1e-3, torch.float64: 1e-6}, 0.1
# Scores that need no example.
WITHOUT_GRADIENTS = ("magnitude", "random")


def lora_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Parameter name -> LoRA matrix (A: rank x in, B: out x rank), in model order."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def score_importance(
    model: PeftModel,
    examples: Sequence[dict[str, list[int]]],
    *,
    batch_size: int,
    score: str = "second_order",
    in_batches: bool = True,
) -> dict[str, torch.Tensor]:
    """Importance of each LoRA element of the active adapters, exact per example whatever the batch size.

    Parameters
    ----------
    model
        A PEFT model whose LoRA matrices are non-zero and trainable. The parameters are not changed.
    examples
        `{"input_ids", "labels"}`, two lists of equal length. A token without a loss has label -100. The loss of an
        example is the mean over the answer tokens.
    batch_size
        Examples per pass. It changes speed and memory, not the result.
    score
        `second_order`, the paper's score. For the ablation `first_order` (`|g phi|`), `fisher` (F), `magnitude`
        (`|phi|`) or `random` (uniform, from torch's global generator).
    in_batches
        False computes one example after the other by plain autograd, in about twice the time.

    Returns
    -------
    dict of str to Tensor
        Parameter name -> float32 scores >= 0 on the CPU, in the parameter's shape (A: rank x in, B: out x rank).

    Raises
    ------
    InputError
        No example, an example without answer tokens or longer than the model's context, an unknown score, a model
        without LoRA, scores that are NaN or infinite, or only zeros (with B = 0 both the gradient of A and phi in B
        are zero; use `adapter.init: normal`, `pissa` or `olora`).
    """
    if score not in SCORES:
        raise InputError(f"score = {score!r}: use one of {', '.join(SCORES)}")
    _check_examples(examples, getattr(model.config, "max_position_embeddings", None))
    active = set(model.active_adapters)
    parameters = {name: p for name, p in lora_parameters(model).items() if name.split(".")[-2] in active}
    if not parameters:
        raise InputError("model: it has no LoRA matrices; attach an adapter first")
    shapes = {name: p.shape for name, p in parameters.items()}
    device = next(iter(parameters.values())).device
    # One vector for all matrices: what is done to hundreds of small ones, a GPU would wait for.
    totals = [torch.zeros(sum(shape.numel() for shape in shapes.values()), device=device) for _ in range(2)]
    gradient, fisher = (_as_matrices(total, shapes) for total in totals)
    if score not in WITHOUT_GRADIENTS:
        was_training = model.training
        model.eval()
        trainable = {p: p.requires_grad for p in model.parameters()}
        try:
            for p in model.parameters():
                p.requires_grad_(False)
            _add_gradients(model, parameters, examples, batch_size if in_batches else None, gradient, fisher)
        finally:
            for p, requires_grad in trainable.items():
                p.requires_grad_(requires_grad)
            model.train(was_training)
    g, f = (reduce(total, "sum") / len(examples) for total in totals)
    phi = torch.cat([p.detach().flatten() for p in parameters.values()]).float()
    scores = SCORES[score](g, f, phi)
    _check_scores(scores, shapes)
    # Matrices without shared memory, so that safetensors can write them.
    return {name: values.to("cpu", copy=True) for name, values in _as_matrices(scores, shapes).items()}


def _as_matrices(vector: torch.Tensor, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Views of a vector as matrices, one after the other."""
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _add_gradients(
    model: PeftModel, parameters: dict, examples: Sequence[dict], batch_size: int | None, gradient: dict, fisher: dict
) -> None:
    """Add the gradients, and squared gradients, of this process's share of the examples, one by one without a size."""
    in_batches = batch_size is not None and _batches_are_exact(model, parameters, examples)
    batches = _batches(examples, batch_size if in_batches else 1)
    state = distributed.state()
    share = batches[state.process_index :: state.num_processes]
    # With FSDP every process must take part in each all-gather. A process with fewer batches therefore makes extra
    # passes whose gradients are not counted.
    extra = batches[: -(-len(batches) // state.num_processes) - len(share)]
    progress = tqdm(share, desc="importance", leave=False)
    if in_batches:
        with ExampleSums(model, gradient, fisher) as sums:
            for batch in progress:
                sums.add(batch)
        for batch in extra:
            _pass(model, batch)
        return
    for batch in progress:
        _accumulate(_example_gradients(model, parameters, batch[0]), gradient, fisher)
    for batch in extra:
        _example_gradients(model, parameters, batch[0])


class ExampleSums:
    """Add every example's gradient and squared gradient of every matrix to sums; a context, in which hooks are set.

    Hundreds of matrices are added up in a few calls: on a GPU the calls would take longer than the sums.

    Parameters
    ----------
    gradient, fisher
        Parameter name -> fp32 sum in the parameter's shape; added to in place.
    """

    # Per-example gradients that wait to be added up, in elements: 64 MB.
    WAITING = 16 << 20

    def __init__(self, model: PeftModel, gradient: dict[str, torch.Tensor], fisher: dict[str, torch.Tensor]):
        self.model, self.gradient, self.fisher = model, gradient, fisher
        self._waiting: dict[str, torch.Tensor] = {}
        self._undo = ExitStack()

    def __enter__(self) -> "ExampleSums":
        for name in self.gradient:
            layer = self.model.get_submodule(name.removesuffix(".weight"))
            self._undo.callback(layer.register_forward_hook(_capture(name, self._keep)).remove)
        # PEFT casts a layer's input to the adapter's fp32, and autocast casts it back.
        self._undo.enter_context(disable_input_dtype_casting(self.model, active=_is_low(self.model)))
        return self

    def __exit__(self, *_) -> None:
        self._undo.close()

    def add(self, batch: list[dict[str, list[int]]]) -> None:
        """Pass a batch through the model, and add its examples up."""
        _pass(self.model, batch)
        self.add_up()

    def _keep(self, name: str, inputs: torch.Tensor, grad_output: torch.Tensor) -> None:
        if name in self._waiting:  # a layer that the model calls twice
            self.add_up()
        # [batch, out, tokens] @ [batch, tokens, in]: one gradient per example, in fp32.
        if inputs.is_cuda and inputs.dtype == grad_output.dtype != torch.float32:
            product = torch.bmm(grad_output.transpose(1, 2), inputs, out_dtype=torch.float32)
        else:
            product = torch.bmm(grad_output.transpose(1, 2).float(), inputs.float())
        self._waiting[name] = product.flatten(1)
        if sum(gradients.numel() for gradients in self._waiting.values()) >= self.WAITING:
            self.add_up()

    def add_up(self) -> None:
        if not self._waiting:
            return
        per_example = torch.cat(list(self._waiting.values()), dim=1)
        sizes = [gradients.shape[1] for gradients in self._waiting.values()]
        for sums, added in (self.gradient, per_example.sum(0)), (self.fisher, per_example.square_().sum(0)):
            torch._foreach_add_([sums[name].view(-1) for name in self._waiting], added.split(sizes))
        self._waiting.clear()


def _capture(name, accumulate):
    """Keep the input of a LoRA linear layer only until the gradient of the layer's output arrives."""

    def forward_hook(_module, inputs, output):
        if output.requires_grad:
            layer_inputs = [inputs[0].detach()]
            output.register_hook(lambda grad: accumulate(name, layer_inputs.pop(), grad))

    return forward_hook


def _batches_are_exact(model: PeftModel, parameters: dict, examples: Sequence[dict]) -> bool:
    """Whether padded batches give the same gradients as single examples. Tested once per model, on two examples.

    The gradients agree if padding is masked and every LoRA layer sees tokens as (batch, tokens, width). Attention does
    so; some convolutions, recurrences and mixtures of experts do not.
    """
    base = model.get_base_model()
    if hasattr(base, "_scores_in_batches"):
        return base._scores_in_batches
    shortest, *others = sorted(examples, key=lambda example: len(example["input_ids"]))
    # The second example is longer, so that the first one is padded.
    longer = next((e for e in others if len(e["input_ids"]) > len(shortest["input_ids"])), None)
    if longer is None:
        return True
    pair = [shortest, longer]
    alone, batched = (
        [{name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()} for _ in range(2)]
        for _ in range(2)
    )
    for example in pair:
        _accumulate(_example_gradients(model, parameters, example), *alone)
    try:
        with ExampleSums(model, *batched) as sums:
            sums.add(pair)
        rounding = ROUNDING.get(base.dtype, LOW_PRECISION)
        exact = all(_near(total, expected, rounding) for total, expected in zip(batched, alone, strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model's own code may raise anything on a padded batch
        exact = False
    exact = distributed.by_first(lambda: exact)  # every process must make the same passes
    if not exact:
        print(f"{type(base).__name__}: importance is scored one example at a time, because padded batches differ there")
    base._scores_in_batches = exact
    return exact


def _near(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rounding: float) -> bool:
    """Whether the difference is at most `rounding` times the expected norm, over all matrices."""
    squared_error = sum(float((values[name] - expected[name]).square().sum()) for name in expected)
    return squared_error <= rounding**2 * sum(float(matrix.square().sum()) for matrix in expected.values())


def _accumulate(gradients: dict[str, torch.Tensor], gradient: dict, fisher: dict) -> None:
    for name, values in gradients.items():
        gradient[name] += values
        fisher[name] += values.square()


def _example_gradients(model: PeftModel, parameters: dict, example: dict) -> dict[str, torch.Tensor]:
    """One example's gradient for every matrix, by plain autograd."""
    device = next(iter(parameters.values())).device
    ids, labels = (torch.tensor([example[key]], device=device) for key in ("input_ids", "labels"))
    for p in parameters.values():
        p.requires_grad_(True)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
    answer = labels[0, 1:] != IGNORED
    loss = cross_entropy(logits[answer].float(), labels[0, 1:][answer])
    # An unused matrix, such as one of an expert that received no token, has a gradient of zero.
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    for p in parameters.values():
        p.requires_grad_(False)
    return {name: values.float() for name, values in zip(parameters, gradients, strict=True)}


def _pass(model: PeftModel, batch: list[dict[str, list[int]]]) -> None:
    """Forward and backward, for the hooks. Returning from the function frees the graph before the next batch."""
    base, device = model.get_base_model(), next(model.parameters()).device.type
    with torch.autocast(device, dtype=base.dtype, enabled=_is_low(model)):
        loss, embedded = _summed_loss(model, batch)
    # Only activations get gradients here; the hooks compute those of the weights.
    torch.autograd.grad(loss, embedded)


def _is_low(model: PeftModel) -> bool:
    """Whether adapters compute in bf16 or fp16: on a GPU, if the base does."""
    on_gpu = next(model.parameters()).is_cuda
    return on_gpu and model.get_base_model().dtype in (torch.bfloat16, torch.float16)


def _summed_loss(model: PeftModel, batch: list[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the examples' mean losses (scalar), and the embeddings (B, T, hidden) where backward ends."""
    device = next(model.parameters()).device
    longest = max(len(example["input_ids"]) for example in batch)
    # Left padding aligns the answers at the end, so only the last positions need logits.
    answer_span = max(len(e["labels"]) - _first_answer(e["labels"]) for e in batch) + 1
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long, device=device)
    labels = torch.full((len(batch), longest), IGNORED, device=device)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(batch):
        count = len(example["input_ids"])
        input_ids[row, longest - count :] = torch.tensor(example["input_ids"])
        labels[row, longest - count :] = torch.tensor(example["labels"])
        attention_mask[row, longest - count :] = 1
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    embedded = model.get_input_embeddings()(input_ids).detach().requires_grad_(True)
    options = {"use_cache": False, "logits_to_keep": min(answer_span, longest)}
    logits = model(inputs_embeds=embedded, attention_mask=attention_mask, position_ids=position_ids, **options).logits[
        :, :-1
    ]
    targets = labels[:, -logits.shape[1] :]
    answer = targets != IGNORED
    # Indexing makes the vocabulary contiguous: over a strided one, torch's float32 sum is 15 times less exact.
    losses = cross_entropy(logits[answer].float(), targets[answer], reduction="none")
    per_example = losses.new_zeros(len(batch)).index_add(0, answer.nonzero()[:, 0], losses) / answer.sum(1)
    # The sum, not the mean: a mean over the batch would scale each example's gradient by 1/n.
    return per_example.sum(), embedded


def _first_answer(labels: list[int]) -> int:
    return next(i for i, label in enumerate(labels) if label != IGNORED)


def _batches(examples: Sequence[dict], size: int) -> list[list[dict]]:
    """Batches of examples of similar length, so that there is little padding."""
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _check_examples(examples: Sequence[dict], context: int | None) -> None:
    if not examples:
        raise InputError("examples: none to score; is this system empty? Check the votes, or lower voting.quorum")
    for number, example in enumerate(examples):
        if len(example["input_ids"]) != len(example["labels"]):
            raise InputError(f"examples[{number}]: input_ids and labels differ in length")
        if context is not None and len(example["input_ids"]) > context:
            raise InputError(
                f"examples[{number}]: {len(example['input_ids'])} tokens exceed the model's context of {context}; "
                "lower sft.max_length or leave it out"
            )
        # Nothing precedes the first token, so its label gives no loss.
        if all(label == IGNORED for label in example["labels"][1:]):
            raise InputError(f"examples[{number}]: no answer token has a label; was the answer truncated away?")


def _check_scores(scores: torch.Tensor, shapes: dict[str, torch.Size]) -> None:
    if not torch.isfinite(scores).all():
        name = next(name for name, values in _as_matrices(scores, shapes).items() if not torch.isfinite(values).all())
        raise InputError(f"scores of {name} hold NaN or infinity; load the model in float32 or check its weights")
    if not scores.any():
        raise InputError(
            "scores: every one is 0, as with B = 0 (init 'lora' or 'gaussian'); "
            "use adapter.init: normal, pissa or olora"
        )
