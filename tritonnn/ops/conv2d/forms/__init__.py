"""The forms of convolution, in the order in which dispatch asks them: one file or folder, and one line here, each."""

from collections.abc import Iterator
from importlib import import_module

from .form import Form

ORDER = (
    "depthwise",
    "in_registers",
    "sliced_k",
    "few_channels",
    "tma_halo",
    "tma",
    "pointers",
)


def _forms() -> Iterator[Form]:
    """The form `SlicedKForm` of the file sliced_k, and so on."""
    for name in ORDER:
        try:
            module = import_module(f".{name}", __package__)
        except (ImportError, AttributeError):  # Gluon, in which some are written, is experimental: they are left out
            continue
        yield getattr(module, f"{name.title().replace('_', '')}Form")()


FORMS: tuple[Form, ...] = tuple(_forms())
BY_NAME: dict[str, Form] = {form.name: form for form in FORMS}
