"""The forms of convolution, in the order in which dispatch asks them."""

from .depthwise import DepthwiseForm
from .few_channels import FewChannelsForm
from .form import Form
from .in_registers import InRegistersForm
from .pointers import PointersForm
from .sliced_k import SlicedKForm
from .tma import TmaForm
from .tma_halo import TmaHaloForm

FORMS: tuple[Form, ...] = (
    DepthwiseForm(),
    InRegistersForm(),
    SlicedKForm(),
    FewChannelsForm(),
    TmaHaloForm(),
    TmaForm(),
    PointersForm(),
)
BY_NAME: dict[str, Form] = {form.name: form for form in FORMS}
