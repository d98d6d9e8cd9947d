"""The forms of convolution, in the order in which dispatch asks them."""

from .depthwise import DepthwiseForm
from .few_channels import FewChannelsForm
from .form import Form
from .pointers import PointersForm
from .sliced_k import SlicedKForm
from .tma import TmaForm

try:
    from .in_registers import InRegistersForm
    from .tma_halo import TmaHaloForm
except (ImportError, AttributeError):  # Gluon, in which they are written, is experimental, and may look otherwise
    OF_GLUON: tuple[type[Form], ...] = ()
else:
    OF_GLUON = (InRegistersForm, TmaHaloForm)

FORMS: tuple[Form, ...] = tuple(
    form()
    for form in (
        DepthwiseForm,
        *OF_GLUON[:1],
        SlicedKForm,
        FewChannelsForm,
        *OF_GLUON[1:],
        TmaForm,
        PointersForm,
    )
)
BY_NAME: dict[str, Form] = {form.name: form for form in FORMS}
