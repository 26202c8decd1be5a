"""The slice really is the image: one forward pass on the user's own model, before any feature is stored.

Three images of one prompt are run: A, B, and A with another corner. A wrong row of the table would take text, padding
or registers for image tokens without any error; here it is refused with what was found.

Shapes: t image tokens of an image (h x w), s all tokens of a tensor.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from probekit.backbones.capture import Grid, Reader, batch_first, entering, text_layers
from probekit.backbones.families import BlockList, Call, Family, Tokens
from probekit.errors import BackboneError


def check_slices(transformer: torch.nn.Module, family: Family, call: Call, *, grid: Grid) -> None:
    """Refuse a row of the table that does not fit the model.

    Parameters
    ----------
    transformer, family
        The model and its row.
    call
        Its arguments for three images of one prompt and one size: A, B, and A with another top right corner.
    grid
        Image tokens of an image, (h, w).

    Raises
    ------
    BackboneError
        If some tokens that the row takes as the image's are not, or some that it leaves are; it says which.
    """
    n_tokens = grid[0] * grid[1]
    reader = Reader(family, call, n_tokens)
    blocks = family.modules(transformer)
    with_text = text_layers(family, transformer)
    entered: dict[int, torch.Tensor] = {}
    left: dict[int, torch.Tensor] = {}
    whole: list[torch.Tensor] = []  # the tensor of layer 0 that the slice is cut from
    leaf: list[torch.Tensor] = []
    wrong_text: list[str] = []
    projected: list[torch.Tensor] = []

    def fail(reason: str) -> None:
        msg = f"{family.transformer} in {family.pipeline}: the row of the table does not fit this model: {reason}"
        raise BackboneError(msg)

    def enters(index: int) -> Callable[..., None]:
        def see(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[index] = reader.entering(block, blocks[index][2], args, kwargs, "image").detach()
            if index == 0 and 0 in with_text:
                text = reader.entering(block, blocks[0][2], args, kwargs, "text")
                if not torch.equal(text[0], text[1]):
                    wrong_text.append(f"another image changes what enters {blocks[0][0]} as text")
            if index == 0:
                everything = replace(blocks[0][2], tokens="all")
                whole.append(reader.entering(block, everything, args, kwargs, "image").detach())

        return see

    def leaves(index: int) -> Callable[..., Any]:
        def see(_: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            convention = blocks[index][2]
            left[index] = reader.leaving(convention, output, "image").detach()
            if index + 1 in with_text:
                text = reader.leaving(convention, output, "text")
                same = text.shape == left[index].shape and torch.equal(text, left[index])
                if same or text.ndim != 3 or len(text) != 3:
                    found = "the image" if same else tuple(text.shape)
                    wrong_text.append(f"{found} leaves {blocks[index][0]} as text")
            if index < len(blocks) - 1:
                return None
            leaf.append(reader.entry(convention, output, convention.returns).detach().clone().requires_grad_())
            changeable = leaf[0].clone()  # a leaf itself must not be changed in place
            if isinstance(output, torch.Tensor):
                return changeable
            place = 0 if convention.returns == "first" else len(output) - 1
            return type(output)(changeable if i == place else entry for i, entry in enumerate(output))

        return see

    def projects(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        projected.append(entering(args, kwargs))
        if not projected[0].requires_grad:
            fail(f"what enters {family.output.path} does not depend on what {blocks[-1][0]} returns")
        projected[0].retain_grad()

    handles = [block.register_forward_pre_hook(enters(i), with_kwargs=True) for i, (_, block, _) in enumerate(blocks)]
    handles += [block.register_forward_hook(leaves(i)) for i, (_, block, _) in enumerate(blocks)]
    handles.append(family.projection(transformer).register_forward_pre_hook(projects, with_kwargs=True))
    try:
        with torch.enable_grad():
            result = transformer(**pytree.tree_map_only(torch.Tensor, torch.clone, call))
            outputs = pytree.tree_leaves(dict(result) if isinstance(result, dict) else result)
            tensors = [tensor for tensor in outputs if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
            if not tensors:
                fail(f"the output does not depend on what {blocks[-1][0]} returns")
            loss = torch.stack([reader.returned(tensor).float().square().sum() for tensor in tensors]).sum()
            torch.autograd.backward(loss)
    finally:
        for handle in handles:
            handle.remove()

    for name, found in (("enter", entered), ("leave", left)):
        for index, tokens in found.items():
            if tokens.ndim != 3 or tokens.shape[:2] != (3, n_tokens):
                fail(
                    f"{tuple(tokens.shape)} {name} {blocks[index][0]}, not {n_tokens} image tokens of each of 3 images"
                )
    _check_input(whole[0], reader.places(whole[0].shape, blocks[0][2].tokens), blocks[0][0], fail)
    _check_order(entered[0], grid, fail)
    if wrong_text:
        fail(wrong_text[0])
    for index in range(1, len(blocks)):
        if not torch.equal(left[index - 1], entered[index]):
            worst = (left[index - 1] - entered[index]).abs().amax().item()
            fail(
                f"what leaves {blocks[index - 1][0]} as image tokens does not enter {blocks[index][0]} as such "
                f"(largest difference {worst:.2g})"
            )
    if not projected:
        fail(f"{family.output.path} is never called")
    for name, tensor, taken in (
        (f"what {blocks[-1][0]} returns", leaf[0], family.blocks[-1].tokens),
        (f"what enters {family.output.path}", projected[0], family.output.tokens),
    ):
        _check_gradient(tensor.grad, reader, family.blocks[-1], taken, name, fail)


def _check_input(tokens: torch.Tensor, image: torch.Tensor, name: str, fail: Callable[[str], None]) -> None:
    """Refuse if tokens of layer 0 differ between the images A and B elsewhere than in the slice."""
    differs = (tokens[0] != tokens[1]).any(dim=-1).cpu()
    if not torch.equal(differs, image[0]):
        fail(f"another image changes {_ranges(differs)} of what enters {name}, the row takes {_ranges(image[0])}")


def _check_order(tokens: torch.Tensor, grid: Grid, fail: Callable[[str], None]) -> None:
    """Refuse if another top right corner does not change most the last token of the first row."""
    change = (tokens[0].float() - tokens[2].float()).square().sum(dim=-1)
    place = int(change.argmax())
    if place != grid[1] - 1:
        fail(f"another top right corner changes image token {place} of {grid[0]} x {grid[1]}, not {grid[1] - 1}")


def _check_gradient(
    grad: torch.Tensor | None,
    reader: Reader,
    convention: BlockList,
    tokens: Tokens,
    name: str,
    fail: Callable[[str], None],
) -> None:
    """Refuse if the output does not depend on some of the slice's tokens, or depends on others."""
    if grad is None:
        fail(f"the output does not depend on {name}")
        return
    grad = batch_first(grad, convention)
    used = grad.ne(0).any(dim=-1).cpu()
    image = reader.places(grad.shape, tokens)
    if used.shape != image.shape or not torch.equal(used, image):
        fail(f"the output depends on {_ranges(used[0])} of {name}, the row takes {_ranges(image[0])}")


def _ranges(mask: torch.Tensor) -> str:
    """Write the true places of a mask as ``tokens 0-15 of 24``."""
    places = mask.nonzero().flatten().tolist()
    if not places:
        return f"no token of {len(mask)}"
    whole = places[-1] - places[0] + 1 == len(places)
    text = f"{places[0]}-{places[-1]}" if whole else f"{len(places)} tokens between {places[0]} and {places[-1]}"
    return f"tokens {text} of {len(mask)}"
