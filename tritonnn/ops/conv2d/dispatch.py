"""Which form computes a convolution: asks each form in turn, and knows none by name."""

import torch

from ...runtime.hardware import Gpu
from .epilogue import Epilogue
from .forms import BY_NAME, FORMS
from .forms.form import Form
from .pack import channels_last
from .problem import Choice, Product, problem_of
from .tables import tuned_choice


def choose(product: Product) -> Choice:
    """The form and configuration that were tuned for a product, or else the default.

    The weight need not be packed yet.
    """
    choice = tuned_choice(product)
    return choice if choice is not None and can_run(product, choice) else default_choice(product)


def default_choice(product: Product) -> Choice:
    """The choice of the first form that has a default for the product."""
    for form in FORMS:
        if product.shortcut is None or form.takes_shortcut:
            choice = form.default(product)
            if choice is not None:
                return choice
    raise ValueError("no form takes this convolution")


def choice_with_prologue(product: Product) -> Choice | None:
    """The choice of the first form that applies the product's prologue; None where none does, or not as fast."""
    choices = (form.default(product) for form in FORMS if form.takes_prologue)
    return next((choice for choice in choices if choice is not None), None)


def form_of(choice: Choice) -> Form:
    return BY_NAME[choice.config.form]


def can_run(product: Product, choice: Choice) -> bool:
    """Whether the form of a choice can take the product."""
    form = form_of(choice)
    return form.fits(product) and form.takes(product, choice)


def run(product: Product, choice: Choice) -> None:
    """Fills y."""
    if choice.copies_x:
        x = channels_last(product.x, product.round_x).permute(0, 3, 1, 2)
        product = product._replace(x=x, round_x=False)
    form_of(choice).run(product, choice.config)


def launch_unpacked(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    channels_last_y: bool,
    window: tuple,
    groups: int,
    input_precision: str,
    epilogue: Epilogue,
) -> None:
    """Runs the product of x and a weight [K, C / groups, R, S], which is packed first where its form needs that."""
    packed = weight.permute(0, 2, 3, 1)
    round_x = input_precision == "tf32"
    product = Product(x, packed, y, channels_last_y, *window, groups, input_precision, round_x, epilogue)
    choice = choose(product)
    run(product._replace(packed=form_of(choice).pack(weight, input_precision)), choice)


def candidates(product: Product, gpu: Gpu) -> list[Choice]:
    """Choices worth trying for a product: the default first, and few others, as each costs a compilation."""
    problem, default = problem_of(product), default_choice(product)
    choices = [default]
    if problem is None:
        return choices
    for form in FORMS:
        if form.fits(product):
            most = form.most_candidates if len(choices) == 1 else form.most_beside_others
            choices += [c for c in form.candidates(problem, default, gpu) if form.takes(product, c)][:most]
    return list(dict.fromkeys(choices))
